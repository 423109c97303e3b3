"""What every pattern means, position by position: loops over the lattice, written from the docstrings."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from vsparse import Grid, patterns
from vsparse.layouts import Layout
from vsparse.patterns import Pattern

Place = tuple[int, int, int]


def places(grid: Grid) -> list[Place | None]:
    """Frame, row and column of every token in host order; None for text."""
    video = list(itertools.product(range(grid.t), range(grid.h), range(grid.w)))
    return [None] * grid.text_before + video + [None] * grid.text_after


def holds(pattern: Pattern, grid: Grid) -> Tensor:
    """``[N, N]`` bool: the pattern for every query and key token."""
    match pattern:
        case patterns.Union(parts=parts):
            return functools.reduce(torch.logical_or, (holds(part, grid) for part in parts))
        case patterns.Intersection(parts=parts):
            return functools.reduce(torch.logical_and, (holds(part, grid) for part in parts))
        case patterns.Complement(part=part):
            return ~holds(part, grid)
        case patterns.Transposed(part=part):
            return holds(part, grid).T
        case patterns.Everything():
            return torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        case patterns.Text(side=side):
            text = torch.tensor([place is None for place in places(grid)])
            return text.expand(len(text), -1) if side == "key" else text[:, None].expand(-1, len(text))
    seen = _GEOMETRY[type(pattern)](pattern, grid)
    tokens = places(grid)
    return torch.tensor([[q is not None and k is not None and seen(q, k) for k in tokens] for q in tokens])


def blocks_of(keep: Tensor, layout: Layout) -> Tensor:
    """``[K, K]`` bool: block pairs with any kept pair of tokens."""
    member = torch.zeros(layout.tokens, layout.blocks, dtype=torch.float64)
    member[torch.arange(layout.tokens), layout.token_block[0, 0]] = 1
    return member.T @ keep.double() @ member > 0


def three(value: object) -> tuple[int | None, int | None, int | None]:
    t, h, w = value if isinstance(value, tuple) else (value,) * 3
    return t, h, w


def units(grid: Grid, axis: int, size: int) -> list[int]:
    """The unit of each position: counted from the first one, in time anew after the conditioning frames."""
    length = (grid.t, grid.h, grid.w)[axis]
    lead = grid.condition_frames if axis == 0 else 0
    found, unit = [], -1
    for place in range(length):
        first = place == 0 or place == lead
        unit += first or (place - (lead if place >= lead else 0)) % size == 0
        found.append(unit)
    return found


def _window(pattern: patterns.Window, grid: Grid) -> Callable[[Place, Place], bool]:
    seen = []
    for axis in range(3):
        size, step, share, unit = (
            three(x)[axis] for x in (pattern.size, pattern.dilation, pattern.stride, pattern.unit)
        )
        of = units(grid, axis, unit or 1)
        pairs = set()
        for q, k in itertools.product(range(len(of)), repeat=2):
            alike = [u for u in range(max(of) + 1) if u % (step or 1) == of[q] % (step or 1)]
            leader = min(alike.index(of[q]) // (share or 1) * (share or 1) + (share or 1) // 2, len(alike) - 1)
            first = leader - (size or 0) // 2
            if pattern.border == "shift":
                first = max(0, min(first, len(alike) - (size or 0)))
            window = alike[max(first, 0) : max(first + (size or 0), 0)]
            if size is None or of[k] in window:
                pairs.add((q, k))
        seen.append(pairs)
    return lambda q, k: all((q[axis], k[axis]) in seen[axis] for axis in range(3))


def _cells(pattern: patterns.Cells, grid: Grid) -> Callable[[Place, Place], bool]:
    def along(axis: int, q: int, k: int) -> bool:
        size, shift, halo = (three(x)[axis] for x in (pattern.size, pattern.shift, pattern.halo))
        if size is None:
            return True
        own = [x for x in range(-size, 200) if (x + (shift or 0)) // size == (q + (shift or 0)) // size]
        return min(own) - (halo or 0) <= k <= max(own) + (halo or 0)

    return lambda q, k: all(along(axis, q[axis], k[axis]) for axis in range(3))


def _rolled_cells(pattern: patterns.RolledCells, grid: Grid) -> Callable[[Place, Place], bool]:
    def along(axis: int, q: int, k: int) -> bool:
        size, roll = three(pattern.size)[axis], three(pattern.roll)[axis]
        length = (grid.t, grid.h, grid.w)[axis]
        row = list(range(length))
        for _ in range(roll or 0):
            row = [row[-1], *row[:-1]]
        return size is None or row.index(k) // size == q // size

    return lambda q, k: all(along(axis, q[axis], k[axis]) for axis in range(3))


def _offset(pattern: patterns.Offset, grid: Grid) -> Callable[[Place, Place], bool]:
    of = [units(grid, axis, three(pattern.unit)[axis] or 1) for axis in range(3)]

    def along(axis: int, q: int, k: int) -> bool:
        low, high = three(pattern.low)[axis], three(pattern.high)[axis]
        lag = of[axis][k] - of[axis][q]
        return (low is None or lag >= low) and (high is None or lag <= high)

    return lambda q, k: all(along(axis, q[axis], k[axis]) for axis in range(3))


def _stride(pattern: patterns.Stride, grid: Grid) -> Callable[[Place, Place], bool]:
    return lambda q, k: all((k[a] - q[a]) % (three(pattern.step)[a] or 1) == 0 for a in range(3))


def _key_stride(pattern: patterns.KeyStride, grid: Grid) -> Callable[[Place, Place], bool]:
    step, offset = three(pattern.step), three(pattern.offset)
    return lambda q, k: all(step[a] == 1 or k[a] in range(offset[a] or 0, 99, step[a] or 1) for a in range(3))


def _key_frames(pattern: patterns.KeyFrames, grid: Grid) -> Callable[[Place, Place], bool]:
    return lambda q, k: k[0] in pattern.frames or k[0] - grid.t in pattern.frames


def _axis(pattern: patterns.Axis, grid: Grid) -> Callable[[Place, Place], bool]:
    axis = "thw".index(pattern.axis)
    return lambda q, k: bool(pattern.rule(torch.tensor(q[axis]), torch.tensor(k[axis])))


def _band(pattern: patterns.Band, grid: Grid) -> Callable[[Place, Place], bool]:
    by_frame = list(itertools.product(range(grid.t), range(grid.h), range(grid.w)))
    row = by_frame if pattern.order == "frame" else sorted(by_frame, key=lambda place: (place[1], place[2], place[0]))
    where = {place: i for i, place in enumerate(row)}
    width = pattern.width(grid) if callable(pattern.width) else pattern.width
    return lambda q, k: abs(where[q] - where[k]) <= width


def _frame_band(pattern: patterns.FrameBand, grid: Grid) -> Callable[[Place, Place], bool]:
    def width(distance: int) -> int:
        if isinstance(pattern.width, int):
            return pattern.width
        if isinstance(pattern.width, tuple):
            return pattern.width[distance] if distance < len(pattern.width) else -1
        return pattern.width(distance, grid)

    def seen(q: Place, k: Place) -> bool:
        return abs((q[1] - k[1]) * grid.w + q[2] - k[2]) <= width(abs(q[0] - k[0]))

    return seen


_GEOMETRY: dict[type, Callable[..., Callable[[Place, Place], bool]]] = {
    patterns.Nothing: lambda pattern, grid: lambda q, k: False,
    patterns.Window: _window,
    patterns.Cells: _cells,
    patterns.RolledCells: _rolled_cells,
    patterns.Offset: _offset,
    patterns.Stride: _stride,
    patterns.KeyStride: _key_stride,
    patterns.KeyFrames: _key_frames,
    patterns.Axis: _axis,
    patterns.Band: _band,
    patterns.FrameBand: _frame_band,
}


# ---- strategies --------------------------------------------------------------------------------------------------


def earlier(q: Tensor, k: Tensor) -> Tensor:
    """A rule of one's own for `Axis`."""
    return (k <= q) | ((k - q) % 3 == 0)


def halving(distance: int, grid: Grid) -> int:
    """A width that follows the distance of frames and the grid."""
    return grid.frame // 2 ** (distance + 1) - 1


def a_third(grid: Grid) -> int:
    """A width that follows the grid."""
    return grid.video // 3


def _triples(least: int, most: int, *, whole: bool = False) -> st.SearchStrategy[object]:
    one = st.integers(least, most)
    part = st.one_of(st.none(), one) if whole else one
    return st.one_of(part, st.tuples(part, part, part))


KINDS: dict[str, st.SearchStrategy[Pattern]] = {
    "constant": st.sampled_from([patterns.everything, patterns.nothing, patterns.text_keys, patterns.text_queries]),
    "divided": st.sampled_from([patterns.same_frame, patterns.same_position]),
    "own": st.sampled_from(
        [patterns.Axis(axis="h", rule=earlier), patterns.FrameBand(width=halving), patterns.Band(width=a_third)]
    ),
    "window": st.builds(
        patterns.Window,
        size=_triples(1, 5, whole=True),
        border=st.sampled_from(["shift", "cut"]),
        dilation=_triples(1, 2),
        stride=_triples(1, 3),
        unit=_triples(1, 3),
    ),
    "cut window": st.builds(patterns.Window, size=_triples(1, 4), border=st.just("cut"), dilation=_triples(1, 2)),
    "cells": st.builds(patterns.Cells, size=_triples(1, 4, whole=True), shift=_triples(0, 3), halo=_triples(0, 2)),
    "rolled cells": st.builds(patterns.RolledCells, size=_triples(1, 4, whole=True), roll=_triples(0, 5)),
    "unit offset": st.builds(
        patterns.Offset, low=_triples(-3, 1, whole=True), high=_triples(-1, 3, whole=True), unit=_triples(1, 3)
    ),
    "offset": st.builds(patterns.Offset, low=_triples(-3, 1, whole=True), high=_triples(-1, 3, whole=True)),
    "stride": st.builds(patterns.Stride, step=_triples(1, 4)),
    "key stride": st.integers(2, 4).flatmap(
        lambda n: st.builds(patterns.KeyStride, step=st.just(n), offset=_triples(0, n - 1))
    ),
    "key frames": st.builds(patterns.KeyFrames, frames=st.lists(st.integers(-6, 6), max_size=3).map(tuple)),
    "band": st.builds(patterns.Band, width=st.integers(0, 40), order=st.sampled_from(["frame", "position"])),
    "frame band": st.builds(patterns.FrameBand, width=st.integers(-1, 12)),
    "decaying band": st.builds(
        patterns.FrameBand, width=st.lists(st.integers(-1, 12), min_size=1, max_size=5).map(tuple)
    ),
}
rules = st.one_of(*KINDS.values())

# Sparse in themselves and judged apart: pairs of boxes stay open down to single tokens.
_thin = [KINDS["band"], KINDS["frame band"], st.builds(patterns.Band, width=st.integers(0, 5))]
_absolute = [KINDS["key stride"], KINDS["cells"], KINDS["window"], st.builds(patterns.KeyFrames, frames=st.just((0,)))]
mixed: st.SearchStrategy[Pattern] = st.builds(
    lambda band, place, negate, other: (band & (~place if negate else place)) | other,
    st.one_of(*_thin),
    st.one_of(*_absolute),
    st.booleans(),
    st.one_of(st.just(patterns.nothing), st.builds(lambda a, b: ~(a | b), KINDS["band"], KINDS["cells"])),
)

combined: st.SearchStrategy[Pattern] = st.recursive(
    rules,
    lambda part: st.one_of(
        st.tuples(part, part).map(lambda pair: pair[0] | pair[1]),
        st.tuples(part, part).map(lambda pair: pair[0] & pair[1]),
        st.tuples(part, part).map(lambda pair: pair[0] & ~pair[1]),
        part.map(lambda pattern: ~pattern),
        part.map(lambda pattern: pattern.T),
    ),
    max_leaves=4,
)
