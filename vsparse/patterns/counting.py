"""Rules that are known over boxes by counting: one relation per axis, or any rule over differences of positions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from vsparse.geometry import Grid
from vsparse.patterns.boxes import Bounds, Box

__all__ = [
    "AxisTables",
    "Relations",
    "all_differences",
    "axis_tables",
    "both",
    "count_axes",
    "count_differences",
    "difference_table",
    "negated",
]

Relations = tuple[Tensor | None, Tensor | None, Tensor | None]
"""``[T, T]``, ``[H, H]``, ``[W, W]`` bool over query and key positions; all must hold; None: any positions."""

AxisTables = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Prefix sums ``[n + 1, n + 1]`` of the relation of each axis; None: any positions."""


def both(a: Relations, b: Relations) -> Relations:
    """Two rules of this form that must both hold."""
    t, h, w = (y if x is None else x if y is None else x & y for x, y in zip(a, b, strict=True))
    return t, h, w


def negated(relations: Relations | None, grid: Grid) -> Relations | None:
    """The complement, which is of this form only if at most one axis is restricted; else None."""
    if relations is None:
        return None
    bound = [axis for axis, relation in enumerate(relations) if relation is not None]
    if len(bound) > 1:
        return None
    axis = bound[0] if bound else 0
    relation = relations[axis]
    new: list[Tensor | None] = [None, None, None]
    new[axis] = torch.zeros(grid.t, grid.t, dtype=torch.bool) if relation is None else ~relation
    return new[0], new[1], new[2]


def axis_tables(relations: Relations) -> AxisTables:
    """Prefix sums, so that four entries tell how many pairs of two intervals a relation holds."""
    t, h, w = (None if x is None else F.pad(x.long(), (1, 0, 1, 0)).cumsum(0).cumsum(1) for x in relations)
    return t, h, w


def count_axes(tables: AxisTables, q: Box, k: Box) -> Bounds:
    """Exact: the pairs of two boxes are the product of those of their intervals."""
    some = every = torch.ones((), dtype=torch.bool)
    for axis, table in enumerate(tables):
        if table is None:
            continue
        q0, q1, k0, k1 = q.low[axis], q.high[axis] + 1, k.low[axis], k.high[axis] + 1
        held = table[q1, k1] - table[q0, k1] - table[q1, k0] + table[q0, k0]
        some, every = some & (held > 0), every & (held == (q1 - q0) * (k1 - k0))
    return Bounds.exact(some, every)


def all_differences(grid: Grid) -> tuple[Box, Box, tuple[int, int, int]]:
    """Single tokens q and k for every difference of positions, and its shape ``[2T - 1, 2H - 1, 2W - 1]``."""
    spans = [torch.arange(1 - n, n) for n in (grid.t, grid.h, grid.w)]
    steps = torch.stack(torch.meshgrid(*spans, indexing="ij")).flatten(1)
    q, k = (-steps).clamp_min(0), steps.clamp_min(0)
    t, h, w = map(len, spans)
    return Box(q, q), Box(k, k), (t, h, w)


def difference_table(kept: Tensor) -> Tensor:
    """Prefix sums ``[2T, 2H, 2W]`` of a rule over all differences, of which d lies at ``d + size - 1``."""
    return F.pad(kept.long(), (1, 0, 1, 0, 1, 0)).cumsum(0).cumsum(1).cumsum(2)


def count_differences(table: Tensor, q: Box, k: Box) -> Bounds:
    """Exact: every difference between the limits of two boxes occurs."""
    zero = [n // 2 - 1 for n in table.shape]
    low = [k.low[a] - q.high[a] + zero[a] for a in range(3)]
    high = [k.high[a] - q.low[a] + zero[a] + 1 for a in range(3)]
    held, volume = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.int64)
    for corner in itertools.product((0, 1), repeat=3):
        entry = table[tuple(high[a] if upper else low[a] for a, upper in enumerate(corner))]
        held = held + entry if sum(corner) % 2 else held - entry
    for first, past in zip(low, high, strict=True):
        volume = volume * (past - first)
    return Bounds.exact(held > 0, held == volume)
