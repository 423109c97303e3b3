"""Bands: rules over positions that run through several axes."""

from __future__ import annotations

import dataclasses as dc
import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from vsparse.geometry import Grid
from vsparse.patterns.algebra import Pattern
from vsparse.patterns.boxes import Bounds, Box

__all__ = ["Band", "FrameBand"]


def _differences(q: Box, k: Box, axis: int) -> tuple[Tensor, Tensor]:
    """The lowest and the highest difference ``key - query`` along an axis; all between them occur."""
    return k.low[axis] - q.high[axis], k.high[axis] - q.low[axis]


def _near(middle: Tensor | int, low: Tensor, high: Tensor) -> Iterator[Tensor]:
    """The integers from ``middle - 1`` to ``middle + 1``, moved between two limits."""
    for guess in (middle - 1, middle, middle + 1):
        yield low.maximum(torch.as_tensor(guess)).minimum(high)


def _least(q: Box, k: Box, grid: Grid, axes: tuple[int, ...], base: Tensor | int = 0) -> Tensor:
    """The least ``|base + n|``, where n runs over the differences of the positions that the axes number, last fastest.

    ``base`` is a multiple of how many positions there are. What the faster axes add stays below one step of a slower
    one, so that the least value stands next to where the slower ones cancel ``base``, or at their nearest limit.
    """
    low, high = _differences(q, k, axes[0])
    if len(axes) == 1:
        return (base + low).maximum(-(base + high)).clamp_min(0)
    step = math.prod((grid.t, grid.h, grid.w)[axis] for axis in axes[1:])
    found = [_least(q, k, grid, axes[1:], base + place * step) for place in _near(-(base // step), low, high)]
    return functools.reduce(torch.minimum, found)


def _ends(q: Box, k: Box, grid: Grid, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The lowest and the highest difference of the positions that the axes number, last fastest."""
    low, high = _differences(q, k, axes[0])
    for axis in axes[1:]:
        size = (grid.t, grid.h, grid.w)[axis]
        first, last = _differences(q, k, axis)
        low, high = low * size + first, high * size + last
    return low, high


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Band(Pattern):
    """Keys at most ``width`` tokens before or after the query when all video tokens stand in one row.

    Args:
        width: Tokens, or a function of the grid; it must be hashable and depend on nothing else.
        order: "frame": frame by frame, each in raster order, as the host has them: what is near in space. "position":
            position by position, each with all its frames: what is near in time.
    """

    width: int | Callable[[Grid], int]
    order: Literal["frame", "position"] = "frame"

    def __post_init__(self) -> None:
        if not callable(self.width) and (
            isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 0
        ):
            raise ValueError(f"Band: width must be an integer >= 0 or a function of the grid, got {self.width!r}")
        if self.order not in ("frame", "position"):
            raise ValueError(f'Band: order must be "frame" or "position", got {self.order!r}')

    @property
    def invariant(self) -> bool:
        """Yes."""
        return True

    def bounds(self, q: Box, k: Box, grid: Grid) -> Bounds:
        """Exact: from the least and the greatest absolute difference."""
        width = self.width(grid) if callable(self.width) else self.width
        axes = (0, 1, 2) if self.order == "frame" else (1, 2, 0)
        low, high = _ends(q, k, grid, axes)
        return Bounds.exact(_least(q, k, grid, axes) <= width, high.maximum(-low) <= width)


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class FrameBand(Pattern):
    """Keys whose in-frame position ``h * W + w`` is at most a width away from the query's.

    Args:
        width: One number: the same for all pairs of frames (with 0: the same position over time). A tuple: by the
            distance of the frames, nothing beyond its end. A function of that distance and the grid, called once per
            distance; it must be hashable and depend on nothing else. A negative width keeps nothing.
    """

    width: int | tuple[int, ...] | Callable[[int, Grid], int]

    def __post_init__(self) -> None:
        width: object = self.width
        if isinstance(width, list):
            object.__setattr__(self, "width", tuple(width))
        listed = self.width if isinstance(self.width, tuple) else () if callable(self.width) else (self.width,)
        if any(isinstance(x, bool) or not isinstance(x, int) for x in listed):
            raise ValueError(f"FrameBand: width must be an integer, a tuple of them or a function, got {self.width!r}")

    def widths(self, grid: Grid) -> tuple[int, ...]:
        """The width for each distance of frames, 0 to T - 1; negative where nothing is kept."""
        given = self.width
        if isinstance(given, int):
            return (given,) * grid.t
        if isinstance(given, tuple):
            return (given + (-1,) * grid.t)[: grid.t]
        return tuple(int(given(distance, grid)) for distance in range(grid.t))

    def restricts(self, grid: Grid) -> frozenset[int]:
        """Rows and columns; frames if the width follows their distance."""
        return frozenset((1, 2)) if len(set(self.widths(grid))) == 1 else frozenset((0, 1, 2))

    @property
    def invariant(self) -> bool:
        """Yes."""
        return True

    def bounds(self, q: Box, k: Box, grid: Grid) -> Bounds:
        """Exact: in-frame differences and frame differences of two boxes are independent of each other."""
        widest, narrowest = _extremes(self.widths(grid))
        lag0, lag1 = (lag + grid.t - 1 for lag in _differences(q, k, 0))
        low, high = _ends(q, k, grid, (1, 2))
        least, greatest = _least(q, k, grid, (1, 2)), high.maximum(-low)
        return Bounds.exact(least <= widest[lag0, lag1], greatest <= narrowest[lag0, lag1])


@functools.lru_cache(maxsize=64)
def _extremes(widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Widest and narrowest band over frame differences from i to j, ``[2T - 1, 2T - 1]``, difference d at d + T - 1."""
    both = torch.tensor([*widths[:0:-1], *widths])
    span = both.expand(len(both), -1)
    later = torch.ones_like(span, dtype=torch.bool).triu()
    limits = torch.iinfo(span.dtype)
    widest = torch.where(later, span, limits.min).cummax(1).values
    return widest, torch.where(later, span, limits.max).cummin(1).values
