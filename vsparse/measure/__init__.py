"""Quality, pictures, videos, and the runs that compare a sparse pipeline with its dense self."""
