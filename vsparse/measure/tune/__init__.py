"""Finding a profile: which method, which density for each layer and head, how many dense steps."""
