"""Rows of a sequence in another order."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reorder"]


def reorder(x: Tensor, index: Tensor) -> Tensor:
    """Implements `vsparse.reference.reorder`: rows are copied as they are; only empty slots are zeroed."""
    batch, rows, heads, width = x.shape
    source, lost = index.clamp_min(0), index < 0
    if index.shape[:2] == (1, 1):
        y = x.index_select(1, source[0, 0])
        empty = lost[0, 0].nonzero().squeeze(1)
        return y.index_fill_(1, empty, 0) if len(empty) else y
    first = torch.arange(batch)[:, None, None] * rows
    if index.shape[1] == 1:
        place, flat = (source + first)[:, 0], x.reshape(batch * rows, heads, width)
    else:
        place = ((source + first) * heads + torch.arange(heads)[:, None]).transpose(1, 2)
        flat = x.reshape(batch * rows * heads, width)
    y = flat.index_select(0, place.expand(batch, *place.shape[1:]).flatten())
    lost = lost[:, 0] if index.shape[1] == 1 else lost.transpose(1, 2)
    empty = lost.expand(batch, *lost.shape[1:]).flatten().nonzero().squeeze(1)
    y = y.index_fill_(0, empty, 0) if len(empty) else y
    return y.view(batch, index.shape[2], heads, width)
