"""CPU implementations of the ops, in PyTorch. Importing this registers them; README.md says how they work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vsparse.backend import Implementation, register
from vsparse.blocks import BlockMap
from vsparse.reference import select_blocks

from .attention import block_sparse_attention, block_sparse_attention_backward
from .mass import block_mass, search_attention
from .merge import merge_attention, merge_attention_backward
from .order import reorder
from .pool import block_pool, block_pool_backward

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _unsupported(
    *args: Any,
    scale: float | None = None,
    skip_threshold: float | None = None,
    candidates: BlockMap | None = None,
    rows: Tensor | None = None,
) -> list[str]:
    """Any shape and map will do; only dtypes and skipping are refused."""
    tensors = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else (arg,)) if isinstance(x, Tensor)]
    strange = sorted({x.dtype for x in tensors} - set(_DTYPES), key=str)
    found = [f"{dtype} is not among {', '.join(map(str, _DTYPES))}" for dtype in strange]
    if skip_threshold is not None:
        found.append(f"{skip_threshold=}: skipping blocks saves nothing in one call over gathered keys; pass None")
    return found


_RUN: dict[str, Callable[..., Any]] = {
    "block_sparse_attention": block_sparse_attention,
    "block_sparse_attention_backward": block_sparse_attention_backward,
    "block_mass": block_mass,
    "search_attention": search_attention,
    "block_pool": block_pool,
    "block_pool_backward": block_pool_backward,
    "merge_attention": merge_attention,
    "merge_attention_backward": merge_attention_backward,
}

for _op, _run in _RUN.items():
    register(_op, Implementation("gathered", "cpu", _run, _unsupported), priority=0)
register("reorder", Implementation("copied", "cpu", reorder, lambda *_: []), priority=0)
# Sorting is what a CPU does well: the definition is the implementation.
register("select_blocks", Implementation("sorted", "cpu", select_blocks, lambda *_, **__: []), priority=0)
