"""CurveLayout: the video along a space-filling curve, so that a run of tokens is compact in all three directions."""

from __future__ import annotations

import functools

import torch
from torch.utils._python_dispatch import _disable_current_modes

from vsparse.geometry import Grid, Segment
from vsparse.layouts.base import Layout
from vsparse.layouts.kinds import _assemble, _Run, _text_runs, positive

__all__ = ["CurveLayout", "hilbert"]

_Leg = tuple[int, int]  # axis and signed number of cells
_Box = tuple[tuple[int, int, int], tuple[_Leg, _Leg, _Leg]]  # first cell; the curve leads from it along the first leg


def hilbert(t: int, h: int, w: int) -> list[tuple[int, int, int]]:
    """The cells of a box in the order of a generalised Hilbert curve.

    The box is cut into boxes of about half the size until a row of cells is left. The curve enters a box at one corner
    and leaves it at the other end of its first leg, so that the pieces join. Cuts are even where they can be: along a
    box with even sizes every step goes to a neighbour; an odd size costs a diagonal step now and then, none longer.

    Args:
        t, h, w: Frames, rows and columns, of any size.

    Returns:
        Every cell ``(frame, row, column)`` once.

    Source: the cutting rules of J. Cerveny's generalised Hilbert ("gilbert") curve, which Jenga (arXiv 2505.16864)
    orders its tokens by.
    """
    found: list[tuple[int, int, int]] = []
    sizes = (t, h, w)
    first, second, third = sorted(range(3), key=lambda axis: -sizes[axis])
    stack: list[_Box] = [((0, 0, 0), ((first, sizes[first]), (second, sizes[second]), (third, sizes[third])))]
    while stack:
        corner, legs = stack.pop()
        long = [leg for leg in legs if abs(leg[1]) > 1]
        if len(long) > 1:
            stack.extend(reversed(_cut(corner, *legs)))
            continue
        axis, size = long[0] if long else legs[0]
        found += [_at(corner, (axis, step)) for step in range(0, size, 1 if size > 0 else -1)]
    return found


def _cut(corner: tuple[int, int, int], a: _Leg, b: _Leg, c: _Leg) -> list[_Box]:
    """The pieces of a box in the order in which the curve visits them; ``a`` leads from its entry to its exit."""
    (a1, a2), (b1, b2), (c1, c2) = (_halves(leg) for leg in (a, b, c))
    width, height, depth = abs(a[1]), abs(b[1]), abs(c[1])
    if 2 * width > 3 * max(height, depth):
        # Long: two pieces one after the other.
        return [(corner, (a1, b, c)), (_at(corner, a1), (a2, b, c))]
    if 3 * height > 4 * depth:
        # Flat: up one half, along the other, down the rest of the first.
        down = _at(corner, _last(a), _last(b1))
        return [(corner, (b1, c, a1)), (_at(corner, b1), (a, b2, c)), (down, (_back(b1), c, _back(a2)))]
    if 3 * depth > 4 * height:
        down = _at(corner, _last(a), _last(c1))
        return [(corner, (c1, a1, b)), (_at(corner, c1), (a, b, c2)), (down, (_back(c1), _back(a2), b))]
    # About a cube: five pieces, the middle one over the whole length.
    return [
        (corner, (b1, c1, a1)),
        (_at(corner, b1), (c, a1, b2)),
        (_at(corner, _last(b1), _last(c)), (a, _back(b1), _back(c2))),
        (_at(corner, _last(a), b1, _last(c)), (_back(c), _back(a2), b2)),
        (_at(corner, _last(a), _last(b1)), (_back(b1), c1, _back(a2))),
    ]


def _halves(leg: _Leg) -> tuple[_Leg, _Leg]:
    """A leg as two, the first of even length where that leaves something."""
    axis, size = leg
    half = abs(size) // 2
    half += half % 2 if abs(size) > 2 else 0
    half = half if size > 0 else -half
    return (axis, half), (axis, size - half)


def _at(corner: tuple[int, int, int], *moves: _Leg) -> tuple[int, int, int]:
    place = list(corner)
    for axis, size in moves:
        place[axis] += size
    return place[0], place[1], place[2]


def _last(leg: _Leg) -> _Leg:
    """To the last cell of a leg instead of past it."""
    axis, size = leg
    return axis, size - (1 if size > 0 else -1 if size < 0 else 0)


def _back(leg: _Leg) -> _Leg:
    return leg[0], -leg[1]


@functools.lru_cache(maxsize=64)
def _curve_tables(grid: Grid, block: int) -> dict[str, object]:
    with torch.inference_mode(False), _disable_current_modes():
        before, after = _text_runs(grid, block)
        video = []
        frames = grid.condition_frames
        for segment, low, count in (
            (Segment.CONDITION, 0, frames),
            (Segment.VIDEO, frames, grid.t - frames),
        ):
            if count:
                frame, row, column = torch.tensor(hilbert(count, grid.h, grid.w)).unbind(1)
                tokens = grid.text_before + ((frame + low) * grid.h + row) * grid.w + column
                video += [_Run(run, segment) for run in tokens.split(block)]
        return _assemble(grid, before + video + after, block, 1, ("curve", grid, block))


class CurveLayout(Layout):
    """The video in blocks of consecutive tokens of a generalised Hilbert curve (see `hilbert`) through its box.

    The last block of a segment may be short. Conditioning frames have a curve of their own; text keeps its order in
    blocks of its own, before or after the video.

    Args:
        grid: The lattice.
        block: Slots of a block.

    Raises:
        ValueError: ``block`` is not a positive integer.
    """

    def __init__(self, grid: Grid, *, block: int = 128) -> None:
        super().__init__(**_curve_tables(grid, positive("block", block)))  # type: ignore[arg-type]
