"""From a block map: which key blocks a process needs from the others, and the map over those alone."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from vsparse.blocks import BlockMap, pack_bits, unpack_bits
from vsparse.layouts import Blocking
from vsparse.parallel.collectives import Group, all_to_all

__all__ = ["Amounts", "Needs", "Shards", "exchange_needs", "places", "submap"]


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Shards:
    """Which key blocks each process of a group holds: a run of the video blocks, and the common ones.

    Args:
        group: Who takes part.
        blocks: K, of the whole sequence.
        bounds: R + 1 ints; process r holds the video blocks ``bounds[r]:bounds[r + 1]``, which may be none.
        common: First and last (exclusive) of the blocks that every process holds; before or after the video.

    Raises:
        ValueError: bounds and common blocks are not the whole sequence, each block once.
    """

    group: Group
    blocks: int
    bounds: tuple[int, ...]
    common: tuple[int, int]

    def __post_init__(self) -> None:
        bounds, (first, last) = self.bounds, self.common
        if len(bounds) != self.group.size + 1 or list(bounds) != sorted(bounds):
            raise ValueError(f"bounds must be {self.group.size + 1} ascending block numbers, got {bounds}")
        ends = (bounds[0], bounds[-1])
        before = first == 0 and ends == (last, self.blocks)
        after = last == self.blocks and ends == (0, first)
        if first > last or not (before or after):
            raise ValueError(
                f"bounds={bounds} and common={self.common} must be the K={self.blocks} key blocks, each once, with the "
                "common ones at either end"
            )

    @property
    def mine(self) -> slice[int, int, None]:
        """Where the video blocks of this process stand among the blocks that it holds."""
        run = self.run(self.group.rank)
        return slice(self.bounds[0], self.bounds[0] + run.stop - run.start)

    @property
    def held(self) -> int:
        """Number of blocks that this process holds, the common ones included."""
        run = self.run(self.group.rank)
        return run.stop - run.start + self.common[1] - self.common[0]

    def run(self, process: int) -> slice[int, int, None]:
        """The video blocks of a process, as columns of the map."""
        return slice(self.bounds[process], self.bounds[process + 1])

    def holds(self, device: torch.device) -> Tensor:
        """``[1, 1, K]`` bool: the blocks that this process holds."""
        column = torch.arange(self.blocks, device=device)
        run, (first, last) = self.run(self.group.rank), self.common
        return (((column >= run.start) & (column < run.stop)) | ((column >= first) & (column < last)))[None, None]


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Amounts:
    """Numbers of blocks that travel; a block is the slots of one sample and head.

    Args:
        fetched: R ints, what comes from each process. sent: what goes to each.
        widest: R ints, the most for one sample and head that come from each process. together: from all of them.
    """

    fetched: tuple[int, ...]
    sent: tuple[int, ...]
    widest: tuple[int, ...]
    together: int


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Needs:
    """What a process fetches from the others, and what they fetch from it.

    Args:
        mine: ``[B|1, H|1, K]`` bool, blocks of others that rows of this process keep.
        asked: ``[R, B, H, n]`` bool, of the n video blocks of this process those that each process fetches.
        amounts: How many these are.
    """

    mine: Tensor
    asked: Tensor
    amounts: Amounts


def exchange_needs(blocks: BlockMap, shards: Shards, batch: int, heads: int) -> Needs:
    """Tell each process which of its blocks are needed here, and hear what they need; every process must call.

    One bit for each block, sample and head travels, whatever the map, so that the sizes of these messages need no
    message of their own. What follows from them, the amounts, is read on the host: the one device sync of a call.

    Args:
        blocks: Rows of this process, columns of the whole sequence. shards: who holds what.
        batch, heads: B and H of the tensors that the map is for.
    """
    group = shards.group
    runs = [shards.run(process) for process in range(group.size)]
    mine = blocks.kept() & ~shards.holds(blocks.index.device)
    every = mine.expand(batch, heads, -1)
    held = runs[group.rank].stop - runs[group.rank].start
    bits = [pack_bits(every[..., run]) for run in runs]
    came = all_to_all(group, bits, [bits[group.rank].shape] * group.size, what="ids")
    asked = torch.stack([unpack_bits(x, held) for x in came])
    by_lane = torch.stack([every[..., run].sum(-1) for run in runs]).flatten(1)
    counts = [by_lane.sum(1), asked.flatten(1).sum(1), by_lane.amax(1), by_lane.sum(0).amax()[None]]
    numbers = torch.cat(counts).tolist()
    fetched, sent, widest = (tuple(numbers[i * group.size : (i + 1) * group.size]) for i in range(3))
    return Needs(
        mine=mine, asked=asked, amounts=Amounts(fetched=fetched, sent=sent, widest=widest, together=numbers[-1])
    )


def places(chosen: Tensor) -> Tensor:
    """``[..., K]`` bool -> int64: where each chosen block stands when they are put side by side, -1 for the others."""
    return torch.where(chosen, chosen.cumsum(-1) - 1, -1)


def submap(blocks: BlockMap, place: Tensor, room: int) -> BlockMap:
    """The same rows over some of the key blocks, which stand in another buffer.

    Args:
        place: ``[B|1, H|1, K]`` int64, where in the buffer each key block of the map stands, -1 where it does not.
        room: Key blocks of the buffer. Where a head has fewer, the rest is padding without a valid token.

    Returns:
        A map with a padded grid of ``room`` key blocks. Its full rows are those that keep all of them: a full row of
        ``blocks`` must find ``room`` blocks in its head, as it does where every block that rows keep has its place.
    """
    lead = torch.broadcast_shapes(blocks.index.shape[:2], place.shape[:2])
    used = blocks.used()
    listed = torch.where(used, blocks.index, 0).flatten(2).long().expand(*lead, -1)
    stands = place.expand(*lead, -1).gather(2, listed).unflatten(2, blocks.index.shape[2:])
    stands = torch.where(used & (stands >= 0), stands, room).int()
    count = torch.where(blocks.count == blocks.k.blocks, (place >= 0).sum(-1)[..., None], (stands < room).sum(-1)).int()
    index = stands.sort(-1).values[..., : min(room, blocks.capacity)].contiguous()
    key_bias = None if blocks.key_bias is None else _moved(blocks.key_bias, place, room)
    return BlockMap(
        index, count, blocks.q, Blocking(length=_moved(blocks.k.length, place, room), block=blocks.k.block), key_bias
    )


def _moved(values: Tensor, place: Tensor, room: int) -> Tensor:
    """``[B|1, H|1, K]`` values of blocks -> ``[B|1, H|1, room]`` in the buffer, 0 for padding."""
    lead = torch.broadcast_shapes(values.shape[:2], place.shape[:2])
    place = torch.where(place < 0, room, place).expand(*lead, -1)
    return values.new_zeros(*lead, room + 1).scatter(-1, place, values.expand(*lead, -1))[..., :room].contiguous()
