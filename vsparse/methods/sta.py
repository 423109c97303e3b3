"""STA: every query tile attends to a fixed box of tiles around it that keeps its size at the borders."""

from __future__ import annotations

import dataclasses as dc
from typing import ClassVar

from vsparse.geometry import Grid
from vsparse.layouts import Layout, TileLayout
from vsparse.methods.base import Paper, Site
from vsparse.methods.pattern import StaticMethod
from vsparse.patterns import Pattern, Window
from vsparse.schedule import Schedule

__all__ = ["STA", "TileWindow"]

TileWindow = tuple[int | None, int | None, int | None]


@dc.dataclass(frozen=True, kw_only=True)
class STA(StaticMethod):
    """Sliding Tile Attention (arXiv 2502.04507, section 3).

    A query tile attends to the tiles of a window around it; at a border the window moves inward, so every row keeps the
    same number of tiles. Joint text is always attended and its rows are full.

    Args:
        window: Frames, rows and columns of the window in tiles: odd, or None for the whole axis, as is any width that
            covers it. One window for all heads, or a tuple with one per head. Default: (30, 40, 40) positions of
            30 x 48 x 80, the paper's training-free setting for HunyuanVideo, 58 % sparse. Its fine-tuned one,
            (18, 24, 24) or 91 % sparse, is ``(3, 3, 3)``.
        tile: Frames, rows and columns of a tile.
        block: Slots of a block of the kernel; a tile spans ``ceil(prod(tile) / block)`` of them.

    Schedule: the first 15 of 50 steps are dense (``skip_time_steps`` of FastVideo for HunyuanVideo; 12 for Wan).
    Differs from the released code: no window per step and layer, which its mask search finds offline; any grid, with
    ragged tiles at its far edges instead of padding with repeated tokens; text of any length, on either side.
    """

    key: ClassVar[str] = "sta"
    paper: ClassVar[Paper] = Paper(title="STA: sliding tile attention", arxiv="2502.04507", trained=False)
    advice: ClassVar[str] = (
        "Attention that is local in space and time, a fixed cost known beforehand, and equal rows; best "
        "after fine-tuning."
    )
    default_schedule: ClassVar[Schedule] = Schedule(dense_steps=0.3)

    window: TileWindow | tuple[TileWindow, ...] = (5, 5, 5)
    tile: tuple[int, int, int] = (6, 8, 8)
    block: int = 64

    def __post_init__(self) -> None:
        windows = _each(self.window)
        object.__setattr__(self, "window", windows if isinstance(self.window[0], tuple | list) else windows[0])
        TileLayout(Grid(t=1, h=1, w=1), tile=self.tile, block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """3-D tiles."""
        return TileLayout(grid, tile=self.tile, block=self.block)

    def static_pattern(self, site: Site) -> Pattern | tuple[Pattern, ...]:
        """Windows in units of tiles."""
        heads = tuple(Window(size=window, unit=self.tile) for window in _each(self.window))
        return heads if isinstance(self.window[0], tuple) else heads[0]


def _each(given: object) -> tuple[TileWindow, ...]:
    """The windows, one or as many as heads, as tuples.

    Raises:
        ValueError: not three odd numbers (or None), or not a sequence of such.
    """
    nested = isinstance(given, tuple | list) and len(given) > 0 and all(isinstance(x, tuple | list) for x in given)
    found = []
    for window in given if nested else (given,):  # type: ignore[attr-defined]
        sizes = tuple(window) if isinstance(window, tuple | list) else ()
        if len(sizes) != 3 or not all(x is None or (type(x) is int and x > 0 and x % 2 == 1) for x in sizes):
            raise ValueError(
                "sta: window must be three odd numbers of tiles (frames, rows, columns), None for a whole axis, or a "
                f"tuple with such a window per head, got {given!r}"
            )
        found.append((sizes[0], sizes[1], sizes[2]))
    return tuple(found)
