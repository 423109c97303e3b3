"""Attention over a part of the keys, and key blocks on their way from one buffer to another."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.ops.attention import attend, attend_backward, load_map, save_map
from vsparse.ops.boundary import as_map, as_tensors
from vsparse.reference import statistics_dtype

__all__ = ["Places", "SavedMap", "attend_part", "attend_part_backward", "chosen_places", "kept_map"]


def attend_part(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, scale: float) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention` without autograd, for any number of rows and key blocks, none included."""
    if q.numel() and k.numel():
        out, lse = attend(q, k, v, *as_tensors(blocks), scale, None)
        return out, lse
    return q.new_zeros(q.shape), q.new_full(q.shape[:3], -torch.inf, dtype=statistics_dtype(q.dtype))


def attend_part_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: BlockMap, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What a part of the keys adds to dQ, and dK and dV of that part, from the result and LSE over all keys."""
    if q.numel() and k.numel():
        dq, dk, dv = attend_backward(grad, None, q, k, v, out, lse, *as_tensors(blocks), scale)
        return dq, dk, dv
    return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Places:
    """``n`` blocks, each of one sample and head.

    Args:
        sample, head: ``[n]`` int64. block: ``[n]`` int64, its place in the buffer at hand.
    """

    sample: Tensor
    head: Tensor
    block: Tensor

    def take(self, k: Tensor, v: Tensor, size: int) -> Tensor:
        """From ``[B, K * size, H, D]`` the blocks, ``[2, n, size, D]``, keys first."""
        return torch.stack([_blocks(x, size)[self.sample, self.block, :, self.head] for x in (k, v)])

    def put(self, payload: Tensor, k: Tensor, v: Tensor) -> None:
        """Write ``[2, n, size, D]`` where the blocks stand."""
        for x, values in zip((k, v), payload, strict=True):
            _blocks(x, payload.shape[2])[self.sample, self.block, :, self.head] = values

    def add(self, payload: Tensor, k: Tensor, v: Tensor) -> None:
        """Add ``[2, n, size, D]`` where the blocks stand, which are all different."""
        for x, values in zip((k, v), payload, strict=True):
            _blocks(x, payload.shape[2])[self.sample, self.block, :, self.head] += values.to(x.dtype)


def chosen_places(chosen: Tensor, amount: int, place: Tensor) -> Places:
    """The blocks chosen by ``[B, H, n]`` bool, ascending, of which there are ``amount``; without a device sync.

    Args:
        place: ``[B|1, H|1, n]`` int64, where each of the n blocks stands in the buffer at hand.
    """
    entry = torch.arange(1, amount + 1, device=chosen.device)
    _, heads, columns = chosen.shape
    flat = torch.searchsorted(chosen.flatten().cumsum(0), entry)
    lane = flat // max(1, columns)
    return Places(sample=lane // heads, head=lane % heads, block=place.expand(chosen.shape).flatten()[flat])


def _blocks(x: Tensor, size: int) -> Tensor:
    """``[B, K * size, H, D]`` -> ``[B, K, size, H, D]``, a view."""
    seen: Tensor = x.unflatten(1, (x.shape[1] // size, size))
    return seen


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class SavedMap:
    """The numbers of a map whose tensors autograd keeps for the backward.

    Args:
        capacity: Of the lists where they were kept as bits. sizes: BQ and BK.
    """

    capacity: int | None
    sizes: tuple[int, int]

    def map(self, tensors: Sequence[Tensor]) -> BlockMap:
        """The map again."""
        stored, count, q_length, k_length, q_start, k_start, key_bias = tensors
        index = load_map(stored, self.capacity, q_length, k_length)
        return as_map(index, count, q_length, k_length, q_start, k_start, key_bias, *self.sizes)


def kept_map(blocks: BlockMap) -> tuple[SavedMap, tuple[Tensor | None, ...]]:
    """A map for a backward, in whichever form is smaller: its numbers, and its tensors for ``save_for_backward``."""
    index, count, q_length, k_length, *rest, q_block, k_block = as_tensors(blocks)
    stored, capacity = save_map(index, count, q_length, k_length)
    return SavedMap(capacity=capacity, sizes=(q_block, k_block)), (stored, count, q_length, k_length, *rest)
