"""Quality, paired clip by clip: how far sparse videos lie from dense ones, next to what exactness itself differs by."""
