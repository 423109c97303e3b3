"""Attention of maps that choose per token, in Triton. Importing this registers it; README.md says how it works."""

from __future__ import annotations

from vsparse.backend import Implementation, register

from . import keys_launch
from .launch import block_sparse_attention, block_sparse_attention_backward, unsupported, unsupported_backward

__all__ = ["block_sparse_attention", "block_sparse_attention_backward"]

# Before the tiled kernels: those take such maps, too, but a tile of theirs would hold one token. Maps that have
# query blocks and key blocks of one token go to those that gather queries, which are registered first.
register(
    "block_sparse_attention", Implementation("triton-gather", "cuda", block_sparse_attention, unsupported), priority=1
)
register(
    "block_sparse_attention_backward",
    Implementation("triton-gather", "cuda", block_sparse_attention_backward, unsupported_backward),
    priority=1,
)
register(
    "block_sparse_attention",
    Implementation("triton-gather-keys", "cuda", keys_launch.block_sparse_attention, keys_launch.unsupported),
    priority=1,
)
register(
    "block_sparse_attention_backward",
    Implementation(
        "triton-gather-keys",
        "cuda",
        keys_launch.block_sparse_attention_backward,
        keys_launch.unsupported_backward,
    ),
    priority=1,
)
