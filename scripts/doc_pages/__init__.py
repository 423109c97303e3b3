"""The pages that `write_docs.py` writes."""
