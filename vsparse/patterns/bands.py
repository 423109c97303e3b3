"""Bands: rules over positions that run through several axes."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Iterator

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


def _least(low: Tensor, high: Tensor) -> Tensor:
    """The least absolute value among the integers from ``low`` to ``high``."""
    return low.maximum(-high).clamp_min(0)


def _least_in_frame(q: Box, k: Box, grid: Grid, frames: Tensor | int = 0) -> Tensor:
    """The least absolute difference ``frames * H * W + dh * W + dw``, for a given difference of frames.

    ``|dw| < W``, so it is found with dh next to ``-frames * H``, or at the limit of dh that is nearest to that.
    """
    (h0, h1), (w0, w1) = _differences(q, k, 1), _differences(q, k, 2)
    base = frames * grid.frame
    found = [_least(base + row * grid.w + w0, base + row * grid.w + w1) for row in _near(-frames * grid.h, h0, h1)]
    return functools.reduce(torch.minimum, found)


def _ends(q: Box, k: Box, grid: Grid) -> tuple[Tensor, Tensor]:
    """The lowest and the highest difference of in-frame positions ``h * W + w``."""
    (h0, h1), (w0, w1) = _differences(q, k, 1), _differences(q, k, 2)
    return h0 * grid.w + w0, h1 * grid.w + w1


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Band(Pattern):
    """Keys at most ``width`` tokens before or after the query in raster order, frame borders ignored.

    Args:
        width: Tokens.
    """

    width: int

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 0:
            raise ValueError(f"Band: width must be an integer >= 0, got {self.width!r}")

    @property
    def invariant(self) -> bool:
        """Yes."""
        return True

    def bounds(self, q: Box, k: Box, grid: Grid) -> Bounds:
        """Exact: from the least and the greatest absolute difference; in-frame ones stay below one frame."""
        t0, t1 = _differences(q, k, 0)
        low, high = _ends(q, k, grid)
        greatest = (t1 * grid.frame + high).maximum(-(t0 * grid.frame + low))
        least = functools.reduce(torch.minimum, (_least_in_frame(q, k, grid, t) for t in _near(0, t0, t1)))
        return Bounds.exact(least <= self.width, greatest <= self.width)


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
        low, high = _ends(q, k, grid)
        least, greatest = _least_in_frame(q, k, grid), high.maximum(-low)
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
