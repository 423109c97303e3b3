"""The exact block form of a rule: which block pairs hold a token pair that satisfies it, without an N x N mask."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsparse.geometry import Grid
from vsparse.layouts import Layout

__all__ = ["Bounds", "Box", "Rule", "kept_pairs", "shifted_pairs"]

_BATCH = 1 << 19  # box pairs that are judged at once; 2^19 of them take some 50 MB of temporaries


@dc.dataclass(frozen=True, eq=False)
class Box:
    """Boxes of the token lattice.

    Args:
        low, high: ``[3, ...]`` int64, first and last frame, row and column of each box, both inside it.
    """

    low: Tensor
    high: Tensor

    def at(self, *index: Any) -> Box:
        """The boxes at an index over the trailing axes."""
        return Box(self.low[(slice(None), *index)], self.high[(slice(None), *index)])

    @staticmethod
    def lattice(grid: Grid) -> Box:
        """Every token as a box of its own, ``[3, T * H * W]`` in raster order."""
        token = torch.arange(grid.video)
        place = torch.stack((token // grid.frame, token % grid.frame // grid.w, token % grid.w))
        return Box(place, place)


class Bounds(NamedTuple):
    """What is known about a rule over the token pairs of two boxes; bool tensors that broadcast together.

    Args:
        some: Some pair certainly satisfies it. maybe: some pair may (False: certainly none does).
        every: All pairs certainly satisfy it. nearly: all pairs may (False: certainly one does not).

    For two single tokens the four are equal.
    """

    some: Tensor
    maybe: Tensor
    every: Tensor
    nearly: Tensor

    @classmethod
    def exact(cls, some: Tensor, every: Tensor) -> Bounds:
        """For a rule that is known exactly."""
        return cls(some, some, every, every)

    def __invert__(self) -> Bounds:
        """Of the complement."""
        return Bounds(~self.nearly, ~self.every, ~self.maybe, ~self.some)

    def meet(self, other: Bounds) -> Bounds:
        """Of "both rules hold for the pair"."""
        return Bounds(
            (self.some & other.every) | (self.every & other.some),
            self.maybe & other.maybe,
            self.every & other.every,
            self.nearly & other.nearly,
        )


Rule = Callable[[Box, Box], Bounds]


@dc.dataclass(frozen=True, eq=False)
class _Shapes:
    """What the V blocks of a layout with video tokens look like along the axes that count: U different shapes.

    Args:
        block: ``[V]`` those blocks, ascending. shape: ``[V]`` the shape of each.
        hull: ``[3, U]`` the smallest box around each shape. parts: ``[3, P]`` boxes that make up the shapes, in order.
        first: ``[U]`` first part of each shape. count: ``[U]`` its parts.
    """

    block: Tensor
    shape: Tensor
    hull: Box
    parts: Box
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, layout: Layout, axes: Sequence[int]) -> _Shapes:
        grid = layout.grid
        slot_token = layout.slot_token[0, 0]
        token = slot_token[slot_token >= 0]
        owner, place = layout.token_block[0, 0][token], token - grid.text_before
        video = (place >= 0) & (place < grid.video)
        owner, cells = owner[video], Box.lattice(grid).at(place[video])
        for axis in (2, 1, 0):
            owner, cells = _joined(owner, cells, axis)
        counted = torch.zeros(3, 1, dtype=torch.int64)
        counted[list(axes)] = 1
        cells = Box(cells.low * counted, cells.high * counted)
        block, rank, count = owner.unique_consecutive(return_inverse=True, return_counts=True)
        example, shape = _alike(cells, rank, count).unique(return_inverse=True)
        chosen = torch.isin(rank, example)
        parts, count = cells.at(chosen), count[example]
        index = torch.arange(len(example)).repeat_interleave(count).expand(3, -1)
        blank = index.new_zeros(3, len(example))
        low = blank.scatter_reduce(1, index, parts.low, "amin", include_self=False)
        high = blank.scatter_reduce(1, index, parts.high, "amax", include_self=False)
        return cls(block, shape, Box(low, high), parts, count.cumsum(0) - count, count)


def _alike(parts: Box, rank: Tensor, count: Tensor) -> Tensor:
    """``[V]``: for each block, given its parts one after another, a block with the same parts."""
    table = parts.low.new_full((len(count), int(count.max()), 6), -1)
    table[rank, torch.arange(len(rank)) - (count.cumsum(0) - count)[rank]] = torch.cat((parts.low, parts.high)).T
    _, kind = table.unique(dim=0, return_inverse=True)
    example = torch.empty_like(kind)
    example[kind] = torch.arange(len(kind))
    return example[kind]


def _joined(owner: Tensor, box: Box, axis: int) -> tuple[Tensor, Box]:
    """Neighbours in the list that continue each other along one axis, within one block, become one box."""
    others = [a for a in range(3) if a != axis]
    same = owner[1:] == owner[:-1]
    for side in (box.low, box.high):
        same = same & (side[others, 1:] == side[others, :-1]).all(0)
    same = same & (box.low[axis, 1:] == box.high[axis, :-1] + 1)
    edge = torch.ones(1, dtype=torch.bool)
    starts, ends = torch.cat((edge, ~same)), torch.cat((~same, edge))
    return owner[starts], Box(box.low[:, starts], box.high[:, ends])


def kept_pairs(rule: Rule, layout: Layout, axes: Sequence[int] = (0, 1, 2)) -> Tensor:
    """``[K, K]`` bool on the CPU: block pairs with at least one pair of video tokens that satisfies the rule.

    Block pairs are judged by the boxes around them; those that stay open by their parts, then by halves of these, down
    to single tokens where it must be. The result is exact; the time grows with the border of the rule, not with N^2.

    Args:
        axes: Those that the rule depends on.
    """
    shapes = _Shapes.of(layout, axes)
    whole = shapes.count == 1
    keep = torch.zeros(len(whole), len(whole), dtype=torch.bool)
    rows = max(1, _BATCH // len(whole))
    for first in range(0, len(whole), rows):
        part = slice(first, first + rows)
        found = rule(shapes.hull.at(part, None), shapes.hull.at(None))
        keep[part] = found.every | (found.some & whole[part, None] & whole)
        row, column = (found.maybe & ~keep[part]).nonzero().unbind(1)
        for owner, box in _part_pairs(shapes, row + first, column):
            _settle(rule, keep.view(-1), owner, box, axes)
    out = torch.zeros(layout.blocks, layout.blocks, dtype=torch.bool)
    out[shapes.block[:, None], shapes.block] = keep[shapes.shape][:, shapes.shape]
    return out


def shifted_pairs(steps: Sequence[Sequence[int]], layout: Layout) -> Tensor:
    """``[K, K]`` bool on the CPU: block pairs with a key position that lies one of ``steps`` from a query position.

    One pass over the tokens for each step, whatever the shape of the blocks: the pieces of a curve fill no boxes.
    """
    grid = layout.grid
    owner = layout.token_block[0, 0, grid.text_before : grid.text_before + grid.video].view(grid.t, grid.h, grid.w)
    keep = torch.zeros(layout.blocks, layout.blocks, dtype=torch.bool)
    for step in steps:
        q, k = owner, owner
        for axis, shift in enumerate(step):
            room = owner.shape[axis] - abs(shift)
            q, k = q.narrow(axis, max(0, -shift), room), k.narrow(axis, max(0, shift), room)
        keep[q.flatten(), k.flatten()] = True
    return keep


_Work = tuple[Tensor, Box]  # owner [n]: entry of the flat mask; box [6, n]: query box above key box


def _settle(rule: Rule, keep: Tensor, owner: Tensor, box: Box, axes: Sequence[int]) -> None:
    """Decide pairs of boxes, depth first, so that few are held at a time.

    One random pair of tokens is tried before a pair of boxes is halved: most that hold a hit hold many.
    """
    chance = torch.Generator().manual_seed(0)
    stack = [(owner, box)]
    while stack:
        owner, box = stack.pop()
        live = ~keep[owner]
        owner, box = owner[live], box.at(live)
        found = rule(*_sides(box))
        keep[owner[found.some]] = True
        live = found.maybe & ~keep[owner]
        owner, box = owner[live], box.at(live)
        keep[owner[rule(*_sides(_random_tokens(box, chance))).some]] = True
        live = ~keep[owner]
        if bool(live.any()):
            stack += _halves(owner[live], box.at(live), axes)


def _sides(box: Box) -> tuple[Box, Box]:
    """The query boxes and the key boxes of pairs of boxes ``[6, n]``."""
    return Box(box.low[:3], box.high[:3]), Box(box.low[3:], box.high[3:])


def _random_tokens(box: Box, chance: torch.Generator) -> Box:
    """One token of each side of pairs of boxes."""
    extent = box.high - box.low + 1
    place = box.low + (torch.rand(extent.shape, generator=chance) * extent).long()
    place = place.minimum(box.high)
    return Box(place, place)


def _part_pairs(shapes: _Shapes, row: Tensor, column: Tensor) -> Iterator[_Work]:
    """All pairs of parts of the given pairs of shapes, in batches."""
    most = int(shapes.count.max())
    step = max(1, _BATCH // most**2)
    for q, k in zip(row.split(step), column.split(step), strict=True):
        columns, pairs = shapes.count[k], shapes.count[q] * shapes.count[k]
        of = torch.arange(len(q)).repeat_interleave(pairs)
        place = torch.arange(len(of)) - (pairs.cumsum(0) - pairs)[of]
        a = shapes.parts.at(shapes.first[q][of] + place // columns[of])
        b = shapes.parts.at(shapes.first[k][of] + place % columns[of])
        owner = (q * len(shapes.count) + k)[of]
        yield owner, Box(torch.cat((a.low, b.low)), torch.cat((a.high, b.high)))


def _halves(owner: Tensor, box: Box, axes: Sequence[int]) -> list[_Work]:
    """Each pair of boxes as two, cut in the middle of its longest side along one of the axes."""
    sides = torch.tensor([axis + side for axis in sorted(axes, reverse=True) for side in (0, 3)])
    extent, longest = (box.high - box.low)[sides].max(0)
    assert bool((extent > 0).all()), "a rule left a pair of single tokens undecided"
    axis, line = sides[longest], torch.arange(len(owner))
    cut = (box.low[axis, line] + box.high[axis, line]) // 2
    low, high = box.low.clone(), box.high.clone()
    high[axis, line], low[axis, line] = cut, cut + 1
    return [(owner, Box(box.low, high)), (owner, Box(low, box.high))]
