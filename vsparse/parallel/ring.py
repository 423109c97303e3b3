"""Attention to the key blocks of other processes, one process after the other."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.ops.merge import merge_attention
from vsparse.parallel.collectives import Group, note_traffic
from vsparse.parallel.needs import Needs, Shards, places, submap
from vsparse.parallel.parts import Places, attend_part, attend_part_backward, chosen_places, kept_map

__all__ = ["Flight", "RingAttention"]


class Flight:
    """A message to one process and one from another, on their way; neither is sent where it would be empty."""

    def __init__(self, group: Group, leaving: Tensor, to: int, coming: Tensor, source: int, what: str) -> None:
        self._group, self._what, self._kept = group, what, [leaving, coming]
        operations = []
        for function, x, process in ((dist.isend, leaving, to), (dist.irecv, coming, source)):
            if x.numel():
                peer = process if group.handle is None else dist.get_global_rank(group.handle, process)
                operations.append(dist.P2POp(function, x, peer, group.handle))
        note_traffic(what, leaving.nbytes)
        with group.sending(what):
            self._works = dist.batch_isend_irecv(operations) if operations else []

    def land(self) -> Tensor:
        """What came; what left is let go."""
        with self._group.sending(self._what):
            for work in self._works:
                work.wait()
        coming = self._kept[1]
        self._kept.clear()
        return coming


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class _Part:
    """A part of the keys: those held here, or what one exchange brought.

    Args:
        exchange: Its number; 0 for those held here.
        k, v: ``[B, room * BK, H, D]``. blocks: rows of this process over them.
        places: Where in ``k`` and ``v`` the blocks that came were put; None for those held here.
    """

    exchange: int
    k: Tensor
    v: Tensor
    blocks: BlockMap
    places: Places | None


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class _Ring:
    """The exchanges of one call: in the i-th, process r fetches from ``r + i`` and is asked by ``r - i``."""

    k: Tensor
    v: Tensor
    blocks: BlockMap
    shards: Shards
    needs: Needs

    def asking(self, exchange: int) -> int:
        """The process that fetches from this one."""
        return (self.shards.group.rank - exchange) % self.shards.group.size

    def asked(self, exchange: int) -> int:
        """The process that this one fetches from."""
        return (self.shards.group.rank + exchange) % self.shards.group.size

    def lent(self, exchange: int) -> Places:
        """The blocks held here that are fetched from here."""
        process, mine = self.asking(exchange), self.shards.mine
        standing = torch.arange(mine.start, mine.stop, device=self.k.device)[None, None]
        return chosen_places(self.needs.asked[process], self.needs.amounts.sent[process], standing)

    def parts(self) -> Iterator[_Part]:
        """The keys held here, then those of each exchange; while one part is used, the next is on its way."""
        group, place = self.shards.group, places(self.shards.holds(self.k.device))
        flight = self._fetch(1)
        yield _Part(exchange=0, k=self.k, v=self.v, blocks=submap(self.blocks, place, self.shards.held), places=None)
        for exchange in range(1, group.size):
            part = self._unpacked(exchange, flight.land())
            if exchange + 1 < group.size:
                flight = self._fetch(exchange + 1)
            yield part

    def send_home(self, exchange: int, gradients: Tensor) -> Flight:
        """Send the gradients of what an exchange brought, and receive those of `lent`."""
        coming = self._room(self.needs.amounts.sent[self.asking(exchange)])
        return Flight(self.shards.group, gradients, self.asked(exchange), coming, self.asking(exchange), "gradients")

    def _fetch(self, exchange: int) -> Flight:
        leaving = self.lent(exchange).take(self.k, self.v, self.blocks.k.block)
        coming = self._room(self.needs.amounts.fetched[self.asked(exchange)])
        return Flight(self.shards.group, leaving, self.asking(exchange), coming, self.asked(exchange), "blocks")

    def _room(self, amount: int) -> Tensor:
        return self.k.new_empty(2, amount, self.blocks.k.block, self.k.shape[-1])

    def _unpacked(self, exchange: int, payload: Tensor) -> _Part:
        source, (batch, _, heads, width) = self.asked(exchange), self.k.shape
        run, room = self.shards.run(source), self.needs.amounts.widest[source]
        chosen = torch.zeros_like(self.needs.mine)
        chosen[..., run] = self.needs.mine[..., run]
        place = places(chosen)
        found = chosen_places(
            chosen[..., run].expand(batch, heads, -1), self.needs.amounts.fetched[source], place[..., run]
        )
        k, v = (self.k.new_empty(batch, room * self.blocks.k.block, heads, width) for _ in range(2))
        found.put(payload, k, v)
        return _Part(exchange=exchange, k=k, v=v, blocks=submap(self.blocks, place, room), places=found)


class RingAttention(torch.autograd.Function):
    """`sharded_attention` with ``how="ring"``; the backward fetches the blocks again and sends their gradients home.

    Parts are added up in the dtype of the LSE, so that each is rounded once, however many there are.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, shards: Shards, needs: Needs, scale: float
    ) -> tuple[Tensor, Tensor]:
        parts = _Ring(k=k, v=v, blocks=blocks, shards=shards, needs=needs).parts()
        held = next(parts)
        found, lse = attend_part(q, held.k, held.v, held.blocks, scale)
        wide = found.to(lse.dtype)
        for part in parts:
            if part.k.numel():
                found, found_lse = attend_part(q, part.k, part.v, part.blocks, scale)
                wide, lse = merge_attention([wide, found.to(wide.dtype)], [lse, found_lse])
        out = wide.to(q.dtype)
        ctx.shards, ctx.amounts, ctx.scale = shards, needs.amounts, scale
        ctx.map, tensors = kept_map(blocks)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, needs.mine, needs.asked, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mine, asked, *tensors = ctx.saved_tensors
        needs = Needs(mine=mine, asked=asked, amounts=ctx.amounts)
        ring = _Ring(k=k, v=v, blocks=ctx.map.map(tensors), shards=ctx.shards, needs=needs)
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        homeward: Flight | None = None
        for part in ring.parts():
            part_dq, part_dk, part_dv = attend_part_backward(grad, q, part.k, part.v, out, lse, part.blocks, ctx.scale)
            dq += part_dq
            if part.places is None:
                dk += part_dk
                dv += part_dv
                continue
            if homeward is not None:
                ring.lent(part.exchange - 1).add(homeward.land(), dk, dv)
            homeward = ring.send_home(part.exchange, part.places.take(part_dk, part_dv, part.blocks.k.block))
        if homeward is not None:
            ring.lent(ctx.shards.group.size - 1).add(homeward.land(), dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None
