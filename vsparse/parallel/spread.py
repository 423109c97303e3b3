"""Attention of the same rows on every process, each to keys of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.ops.attention import block_sparse_attention
from vsparse.ops.boundary import check_attention, scale_of
from vsparse.ops.merge import merge_attention
from vsparse.parallel.collectives import Group, all_to_all, total
from vsparse.parallel.parts import attend_part, attend_part_backward, kept_map

__all__ = ["spread_attention"]


def spread_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, group: Group, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of rows that every process has, over the keys of all processes; exact, differentiable in q, k, v.

    Every process must call, and take part in the backward. Each sends its result over its own keys to each other one:
    fit for few rows, those of the text or samples. No device sync.

    Args:
        q: ``[B, Sq, H, D]`` in block order, the same on every process.
        k, v: ``[B, Sk, H, D]``, keys of this process alone; their number may differ, and be 0.
        blocks: Rows of q, columns of this process's keys.
        group: Who takes part. scale: of the logits; None: ``D ** -0.5``.

    Returns:
        out ``[B, Sq, H, D]`` in the dtype of q and lse ``[B, Sq, H]`` over the keys of all, equal to the bit on every
        process; rows without a key anywhere give 0 and -inf. No gradient goes through lse. Each process may go on with
        its result in its own way, and its gradient of q is what its own keys add: the gradient of q is their sum.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. NotImplementedError: no implementation can run this.
    """
    check_attention(q, k, v, blocks)
    if group.size == 1:
        out, lse = block_sparse_attention(q, k, v, blocks, scale=scale)
        return out, lse.detach()
    out, lse = _Spread.apply(q, k, v, blocks, group, scale_of(scale, q))  # type: ignore[no-untyped-call]
    return out, lse


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, group: Group, scale: float
    ) -> tuple[Tensor, Tensor]:
        part = attend_part(q, k, v, blocks, scale)
        came = all_to_all(group, [*part] * group.size, [x.shape for x in part] * group.size, what="outputs")
        out, lse = merge_attention(came[::2], came[1::2])
        ctx.group, ctx.scale = group, scale
        ctx.map, tensors = kept_map(blocks)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        grad = total(ctx.group, grad, what="gradients")
        return *attend_part_backward(grad, q, k, v, out, lse, ctx.map.map(tensors), ctx.scale), None, None, None
