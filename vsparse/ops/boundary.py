"""How maps cross the op boundary as tensors and ints, and the checks that stand before it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking

__all__ = ["as_blocking", "as_map", "as_tensors", "check_attention", "check_sequence", "like", "scale_of"]


def as_blocking(length: Tensor, start: Tensor | None, block: int) -> Blocking:
    return Blocking(length=length, start=start, block=block)


def as_map(
    index: Tensor,
    count: Tensor,
    q_length: Tensor,
    k_length: Tensor,
    q_start: Tensor | None,
    k_start: Tensor | None,
    key_bias: Tensor | None,
    q_block: int,
    k_block: int,
) -> BlockMap:
    return BlockMap(
        index, count, as_blocking(q_length, q_start, q_block), as_blocking(k_length, k_start, k_block), key_bias
    )


def as_tensors(blocks: BlockMap) -> tuple[Any, ...]:
    q, k = blocks.q, blocks.k
    return blocks.index, blocks.count, q.length, k.length, q.start, k.start, blocks.key_bias, q.block, k.block


def like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def scale_of(scale: float | None, q: Tensor) -> float:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None (D ** -0.5), got {scale}")
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def check_attention(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap) -> None:
    check_sequence("q", q, blocks.q)
    check_sequence("k", k, blocks.k)
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, got {tuple(v.shape)} and {tuple(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q and k must share B, H and D, got {tuple(q.shape)} and {tuple(k.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    check_lead("index", blocks.index, q)
    if blocks.index.device != q.device:
        raise ValueError(f"the block map lies on {blocks.index.device}, q on {q.device}")


def check_sequence(name: str, x: Tensor, blocking: Blocking) -> None:
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating tensor [B, S, H, D], got {x.dtype} {tuple(x.shape)}")
    if blocking.start is None and x.shape[1] != blocking.blocks * blocking.block:
        raise ValueError(
            f"{name} has S={x.shape[1]} slots, its blocking {blocking.blocks} blocks of {blocking.block}: "
            f"pack it with Blocking.pack"
        )
    check_lead(f"{name} length", blocking.length, x)


def check_lead(name: str, per_head: Tensor, x: Tensor) -> None:
    if per_head.shape[0] not in (1, x.shape[0]) or per_head.shape[1] not in (1, x.shape[2]):
        raise ValueError(f"{name}: leading sizes {tuple(per_head.shape[:2])} do not fit B={x.shape[0]}, H={x.shape[2]}")
