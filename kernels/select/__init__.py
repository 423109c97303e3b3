"""Scores to lists in Triton. Importing this registers it; README.md says how it works."""

from __future__ import annotations

from vsparse.backend import Implementation, register

from .launch import select_blocks, unsupported

__all__ = ["select_blocks"]

register("select_blocks", Implementation("triton", "cuda", select_blocks, unsupported), priority=0)
