"""Mean and self-similarity of blocks in Triton, and the gradient of the mean. Importing this registers them."""

from __future__ import annotations

from vsparse.backend import Implementation, register

from .launch import block_pool, block_pool_backward, unsupported, unsupported_backward

__all__ = ["IMPLEMENTATIONS", "block_pool", "block_pool_backward"]

IMPLEMENTATIONS = {
    "block_pool": Implementation("triton", "cuda", block_pool, unsupported),
    "block_pool_backward": Implementation("triton", "cuda", block_pool_backward, unsupported_backward),
}
for _op, _implementation in IMPLEMENTATIONS.items():
    register(_op, _implementation, priority=0)
