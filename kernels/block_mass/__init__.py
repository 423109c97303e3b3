"""Exact attention mass of block pairs in Triton, and the search that reports it. Importing this registers both."""

from __future__ import annotations

from vsparse.backend import Implementation, register

from .launch import block_mass, search_attention, unsupported, unsupported_search

__all__ = ["IMPLEMENTATIONS", "block_mass", "search_attention"]

IMPLEMENTATIONS = {
    "block_mass": Implementation("triton", "cuda", block_mass, unsupported),
    "search_attention": Implementation("triton", "cuda", search_attention, unsupported_search),
}
for _op, _implementation in IMPLEMENTATIONS.items():
    register(_op, _implementation, priority=0)
