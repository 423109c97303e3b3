"""Attention to the key blocks of other processes, all of them fetched at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.parallel.collectives import all_to_all
from vsparse.parallel.needs import Needs, Shards, places, submap
from vsparse.parallel.parts import Places, attend_part, attend_part_backward, chosen_places, kept_map

__all__ = ["GatherAttention"]


class GatherAttention(torch.autograd.Function):
    """`sharded_attention` with ``how="gather"``; what was fetched is kept for the backward.

    The buffer of a call holds the blocks of this process, then what came for each sample and head, ascending.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, shards: Shards, needs: Needs, scale: float
    ) -> tuple[Tensor, Tensor]:
        (batch, slots, heads, width), size = k.shape, blocks.k.block
        place = _place(shards, needs.mine)
        came = _swap(shards, [x.take(k, v, size) for x in _lent(shards, needs)], needs.amounts.fetched, "blocks")
        room = shards.held + needs.amounts.together
        all_k, all_v = (k.new_empty(batch, room * size, heads, width) for _ in range(2))
        for x, own in ((all_k, k), (all_v, v)):
            x[:, :slots] = own
        for found, payload in zip(_fetched(shards, needs, place), came, strict=True):
            found.put(payload, all_k, all_v)
        near = submap(blocks, place, room)
        out, lse = attend_part(q, all_k, all_v, near, scale)
        ctx.shards, ctx.amounts, ctx.scale = shards, needs.amounts, scale
        ctx.map, tensors = kept_map(near)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, all_k, all_v, out, lse, needs.mine, needs.asked, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, all_k, all_v, out, lse, mine, asked, *tensors = ctx.saved_tensors
        needs, shards, blocks = Needs(mine=mine, asked=asked, amounts=ctx.amounts), ctx.shards, ctx.map.map(tensors)
        dq, all_dk, all_dv = attend_part_backward(grad, q, all_k, all_v, out, lse, blocks, ctx.scale)
        size, slots = blocks.k.block, shards.held * blocks.k.block
        leaving = [x.take(all_dk, all_dv, size) for x in _fetched(shards, needs, _place(shards, mine))]
        came = _swap(shards, leaving, ctx.amounts.sent, "gradients")
        dk, dv = (x[:, :slots].to(lse.dtype) for x in (all_dk, all_dv))
        for lent, payload in zip(_lent(shards, needs), came, strict=True):
            lent.add(payload, dk, dv)
        return dq, dk.to(all_k.dtype), dv.to(all_v.dtype), None, None, None, None


def _place(shards: Shards, mine: Tensor) -> Tensor:
    """``[B|1, H|1, K]`` int64: where each block stands in the buffer of a call, -1 where it does not."""
    held = places(shards.holds(mine.device))
    return torch.where(mine, places(mine) + shards.held, held)


def _lent(shards: Shards, needs: Needs) -> list[Places]:
    """The blocks held here that each process fetches."""
    standing = torch.arange(shards.mine.start, shards.mine.stop, device=needs.mine.device)[None, None]
    return [chosen_places(*both, standing) for both in zip(needs.asked, needs.amounts.sent, strict=True)]


def _fetched(shards: Shards, needs: Needs, place: Tensor) -> list[Places]:
    """Where the blocks that each process sends stand in the buffer of a call."""
    every = needs.mine.expand(*needs.asked.shape[1:3], -1)
    runs = [shards.run(process) for process in range(shards.group.size)]
    return [
        chosen_places(every[..., run], amount, place[..., run])
        for run, amount in zip(runs, needs.amounts.fetched, strict=True)
    ]


def _swap(shards: Shards, payloads: list[Tensor], amounts: tuple[int, ...], what: str) -> tuple[Tensor, ...]:
    """Blocks to every process, ``[2, n, BK, D]`` each, and so many from each."""
    _, _, size, width = payloads[0].shape
    return all_to_all(shards.group, payloads, [(2, amount, size, width) for amount in amounts], what=what)
