"""From scores of block pairs to lists: the op behind the row-wise selectors of `vsparse.select`."""

from __future__ import annotations

import torch
from torch import Tensor

from vsparse import backend

__all__ = ["select_blocks"]


@torch.library.custom_op("vsparse::select_blocks", mutates_args=())
def select_blocks(
    scores: Tensor,
    length: Tensor,
    forced: Tensor | None,
    limit: Tensor,
    rule: str,
    budget: str,
    least: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """`vsparse.reference.select_blocks` as an op; its arguments are those, checked by the selectors."""
    args = (scores, length, forced, limit)
    options = {"rule": rule, "budget": budget, "least": least, "capacity": capacity}
    index, count = backend.lookup("select_blocks", scores.device.type, *args, **options).run(*args, **options)
    return index, count


@select_blocks.register_fake
def _(
    scores: Tensor,
    length: Tensor,
    forced: Tensor | None,
    limit: Tensor,
    rule: str,
    budget: str,
    least: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    lead = torch.broadcast_shapes(scores.shape[:3], (*length.shape[:2], 1), limit.shape)
    lead = lead if forced is None else torch.broadcast_shapes(lead, forced.shape[:3])
    return scores.new_empty((*lead, capacity), dtype=torch.int32), scores.new_empty(lead, dtype=torch.int32)
