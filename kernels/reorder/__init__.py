"""Rows in another order, in Triton. Importing this registers it."""

from __future__ import annotations

from vsparse.backend import Implementation, register

from .launch import reorder, unsupported

__all__ = ["reorder"]

register("reorder", Implementation("triton", "cuda", reorder, unsupported), priority=0)
