"""What is trained: the parts of the embedded model and their losses."""
