"""Training data: finding clips, decoding, buckets of equal size, the cache of latents, batches in a fixed order."""
