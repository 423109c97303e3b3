"""Pooling over the valid slots of each block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vsparse.layouts import Blocking
from vsparse.reference import statistics_dtype

from .rows import Lanes, flat, lane_groups

__all__ = ["block_pool", "block_pool_backward"]


def block_pool(x: Tensor, blocking: Blocking) -> tuple[Tensor, Tensor]:
    """Implements `vsparse.reference.block_pool`; reads every valid slot once, the others never."""
    wide = statistics_dtype(x.dtype)
    mean = x.new_zeros(x.shape[0], blocking.blocks, *x.shape[2:], dtype=wide)
    spread, source = torch.zeros_like(mean), flat(x)
    for row, block in _slots(blocking, x):
        value = source.index_select(0, row).to(wide)
        flat(mean).index_add_(0, block, value)
        norm = value.norm(dim=-1, keepdim=True)
        flat(spread).index_add_(0, block, torch.where(norm > 0, value / torch.where(norm > 0, norm, 1), 0))
    count = _counts(blocking, x)
    return mean.div_(count), spread.div_(count).square_().sum(-1)


def block_pool_backward(grad: Tensor, x: Tensor, blocking: Blocking) -> Tensor:
    """Implements `vsparse.reference.block_pool_backward`."""
    out = x.new_zeros(x.shape)
    share, target = flat(grad / _counts(blocking, x)), flat(out)
    for row, block in _slots(blocking, x):
        target[row] = share.index_select(0, block).to(x.dtype)
    return out


def _counts(blocking: Blocking, x: Tensor) -> Tensor:
    """``[B, K, H, 1]``: valid slots of each block, at least 1."""
    return blocking.length.expand(x.shape[0], x.shape[2], -1).transpose(1, 2)[..., None].clamp_min(1)


def _slots(blocking: Blocking, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row ids of the valid slots of ``x`` and of their blocks in a ``[B, K, H, D]``, some lanes at a time."""
    batch, slots, heads, width = x.shape
    lanes = Lanes(blocking, x)
    for group in lane_groups(batch * heads, slots * width):
        group = group[lanes.size[group].sum(1) > 0]
        if not len(group):
            continue
        found = lanes.tokens(group, label=True)
        assert found.label is not None
        first = (group // heads * blocking.blocks * heads + group % heads)[:, None]
        block = first + found.label * heads
        if found.valid is None:
            yield found.row.flatten(), block.flatten()
        else:
            yield found.row[found.valid], block[found.valid]
