"""Merging attention over disjoint key sets in Triton, forward and backward. Importing this registers it."""

from __future__ import annotations

from vsparse.backend import Implementation, register

from .launch import merge_attention, merge_attention_backward, unsupported, unsupported_backward

__all__ = ["IMPLEMENTATIONS", "merge_attention", "merge_attention_backward"]

IMPLEMENTATIONS = {
    "merge_attention": Implementation("triton", "cuda", merge_attention, unsupported),
    "merge_attention_backward": Implementation("triton", "cuda", merge_attention_backward, unsupported_backward),
}
for _op, _implementation in IMPLEMENTATIONS.items():
    register(_op, _implementation, priority=0)
