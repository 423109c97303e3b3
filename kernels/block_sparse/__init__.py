"""Block-sparse attention in Triton, forward and backward. Importing this registers it; README.md says how it works."""

from __future__ import annotations

from vsparse.backend import Implementation, register

from .launch import block_sparse_attention, block_sparse_attention_backward, notes, unsupported, unsupported_backward

__all__ = ["IMPLEMENTATIONS", "block_sparse_attention", "block_sparse_attention_backward"]

IMPLEMENTATIONS = {
    "block_sparse_attention": Implementation("triton", "cuda", block_sparse_attention, unsupported, notes),
    "block_sparse_attention_backward": Implementation(
        "triton", "cuda", block_sparse_attention_backward, unsupported_backward
    ),
}
for _op, _implementation in IMPLEMENTATIONS.items():
    register(_op, _implementation, priority=0)
