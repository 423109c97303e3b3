"""Rules that are one relation per axis: windows, cells, offsets, strides, key frames, text."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vsparse.geometry import Grid
from vsparse.patterns.algebra import Pattern, Separable

__all__ = [
    "Axis",
    "Cells",
    "Everything",
    "KeyFrames",
    "KeyStride",
    "Nothing",
    "Offset",
    "RolledCells",
    "Stride",
    "Text",
    "Window",
    "everything",
    "nothing",
    "same_frame",
    "same_position",
    "text_keys",
    "text_queries",
]

Sizes = int | tuple[int, int, int]
OpenSizes = int | None | tuple[int | None, int | None, int | None]
Triple = tuple[int, int, int]
OpenTriple = tuple[int | None, int | None, int | None]


def _open(name: str, value: OpenSizes, least: int | None) -> OpenTriple:
    """Three integers of at least ``least`` (None: any), or None where an axis is not restricted."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * 3
    fits = len(values) == 3 and all(
        x is None or (isinstance(x, int) and not isinstance(x, bool) and (least is None or x >= least)) for x in values
    )
    if not fits:
        kind = "integers" if least is None else f"integers >= {least}"
        raise ValueError(f"{name} must be {kind} or None, one or three (frames, rows, columns), got {value!r}")
    return values[0], values[1], values[2]


def _closed(name: str, value: Sizes, least: int) -> Triple:
    t, h, w = _open(name, value, least)
    if t is None or h is None or w is None:
        raise ValueError(f"{name} must be integers >= {least}, one or three (frames, rows, columns), got {value!r}")
    return t, h, w


def _set(rule: Pattern, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(rule, name, value)


def _sizes(grid: Grid) -> Triple:
    return grid.t, grid.h, grid.w


def _units(grid: Grid, axis: int, unit: int) -> Tensor:
    """``[n]``: the unit of each position of an axis. Units of frames start anew after conditioning frames."""
    place = torch.arange(_sizes(grid)[axis])
    lead = grid.condition_frames
    if axis or not lead:
        return place // unit
    return torch.where(place < lead, place // unit, -(-lead // unit) + (place - lead) // unit)


def _part(value: Sizes, axis: int) -> int:
    return value[axis] if isinstance(value, tuple) else value


def _open_part(value: OpenSizes, axis: int) -> int | None:
    return value[axis] if isinstance(value, tuple) else value


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Everything(Separable):
    """Every pair of tokens, text included."""

    def on_text(self, q_text: bool, k_text: bool) -> bool:
        """Always."""
        return True

    @property
    def invariant(self) -> bool:
        """Yes."""
        return True

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """No axis is restricted."""
        return None


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Nothing(Separable):
    """No pair of tokens."""

    @property
    def invariant(self) -> bool:
        """Yes."""
        return True

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """No frame sees a frame."""
        return None if axis else torch.zeros(grid.t, grid.t, dtype=torch.bool)


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Text(Separable):
    """Pairs whose query, or whose key, is a text token; no pair of video tokens.

    Args:
        side: "query" or "key".
    """

    side: Literal["query", "key"]

    def __post_init__(self) -> None:
        if self.side not in ("query", "key"):
            raise ValueError(f'Text: side must be "query" or "key", got {self.side!r}')

    def on_text(self, q_text: bool, k_text: bool) -> bool:
        """Whether the token of that side is text."""
        return q_text if self.side == "query" else k_text

    @property
    def invariant(self) -> bool:
        """Yes."""
        return True

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """Nothing between video tokens."""
        return Nothing().relation(grid, axis)


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Window(Separable):
    """Keys in a box around the query, per axis: neighbourhood attention, and sliding tiles in units of tiles.

    Args:
        size: Width of the window, one number or (frames, rows, columns). None: the whole axis, as is any width that
            covers it. An even window reaches one further to the front.
        border: "shift": at a border the window moves inward and keeps its width; "cut": what lies outside is lost.
        dilation: Step between the positions of a window; the query sees only positions congruent to its own.
        stride: Queries that share a window, as many as this along the axis; it stands around their middle one.
        unit: Positions that count as one: with the sizes of a tile, the window is counted in tiles.

    Source: NATTEN (arXiv 2204.07143) for the border, 2209.15001 for dilation, 2504.16922 for stride; STA (2502.04507)
    for units.
    """

    size: OpenSizes
    border: Literal["shift", "cut"] = "shift"
    dilation: Sizes = (1, 1, 1)
    stride: Sizes = (1, 1, 1)
    unit: Sizes = (1, 1, 1)

    def __post_init__(self) -> None:
        if self.border not in ("shift", "cut"):
            raise ValueError(f'Window: border must be "shift" or "cut", got {self.border!r}')
        _set(self, size=_open("Window: size", self.size, 1))
        for name in ("dilation", "stride", "unit"):
            _set(self, **{name: _closed(f"Window: {name}", getattr(self, name), 1)})

    @property
    def invariant(self) -> bool:
        """If it is cut at borders and counted in positions."""
        return self.border == "cut" and self.stride == self.unit == (1, 1, 1)

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """One window per axis."""
        size = _open_part(self.size, axis)
        unit, step, share = (_part(x, axis) for x in (self.unit, self.dilation, self.stride))
        if size is None:
            return None
        place = _units(grid, axis, unit)
        group, inside = place % step, place // step
        last = (int(place[-1]) - group) // step
        start = ((inside // share) * share + share // 2).minimum(last) - size // 2
        if self.border == "shift":
            start = start.minimum(last + 1 - size).clamp_min(0)
        near = (inside >= start[:, None]) & (inside < start[:, None] + size)
        return near & (group[:, None] == group)


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Cells(Separable):
    """Keys in the query's own cell: windows that do not overlap, stripes, the same frame, the same position.

    Args:
        size: Frames, rows and columns of a cell, or one number; None: the whole axis.
        shift: How far the cells lie before the first position; the first cell is cut by as much.
        halo: How far a query sees beyond its cell, in every direction.

    Source: Swin (arXiv 2103.14030, without its cyclic wrap), HaloNet (2103.12731), CSWin stripes (2107.00652), divided
    space-time (2102.05095).
    """

    size: OpenSizes
    shift: Sizes = (0, 0, 0)
    halo: Sizes = (0, 0, 0)

    def __post_init__(self) -> None:
        _set(self, size=_open("Cells: size", self.size, 1))
        for name in ("shift", "halo"):
            _set(self, **{name: _closed(f"Cells: {name}", getattr(self, name), 0)})

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """One interval per axis."""
        size = _open_part(self.size, axis)
        shift, halo = _part(self.shift, axis), _part(self.halo, axis)
        if size is None:
            return None
        place = torch.arange(_sizes(grid)[axis])
        first = ((place + shift) // size * size - shift)[:, None]
        return (place >= first - halo) & (place < first + size + halo)


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class RolledCells(Separable):
    """Keys that stand in the query's own cell once all keys have moved on by ``roll``, the last ones to the front.

    Args:
        size: Frames, rows and columns of a cell, or one number; None: the whole axis.
        roll: Positions that the keys move, one number or (frames, rows, columns).
    """

    size: OpenSizes
    roll: Sizes

    def __post_init__(self) -> None:
        _set(self, size=_open("RolledCells: size", self.size, 1), roll=_closed("RolledCells: roll", self.roll, 0))

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """One interval per axis, which may go round its end."""
        size = _open_part(self.size, axis)
        if size is None:
            return None
        place = torch.arange(_sizes(grid)[axis])
        moved = (place + _part(self.roll, axis)) % len(place)
        return (place // size)[:, None] == moved // size


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Offset(Separable):
    """Keys at a distance from the query within limits, per axis: ``low <= key - query <= high``.

    Args:
        low, high: Limits, one number or (frames, rows, columns); None: no limit. ``high=(0, None, None)`` looks back in
            time; ``low=high`` shifts; ``low=-n, high=n`` is a window that is cut at the borders.
        unit: Positions that count as one: with the sizes of a tile, distances are counted in tiles.
    """

    low: OpenSizes = (None, None, None)
    high: OpenSizes = (None, None, None)
    unit: Sizes = (1, 1, 1)

    def __post_init__(self) -> None:
        _set(self, low=_open("Offset: low", self.low, None), high=_open("Offset: high", self.high, None))
        _set(self, unit=_closed("Offset: unit", self.unit, 1))

    @property
    def invariant(self) -> bool:
        """Unless positions are counted in units."""
        return self.unit == (1, 1, 1)

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """One interval of differences per axis."""
        low, high = _open_part(self.low, axis), _open_part(self.high, axis)
        if low is None and high is None:
            return None
        place = _units(grid, axis, _part(self.unit, axis))
        difference = place - place[:, None]
        keep = torch.ones_like(difference, dtype=torch.bool)
        if low is not None:
            keep &= difference >= low
        return keep if high is None else keep & (difference <= high)


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Stride(Separable):
    """Keys a multiple of ``step`` away from the query along each axis: a dilated grid, a shard of all positions.

    Args:
        step: One number or (frames, rows, columns); 1: every position.
    """

    step: Sizes

    def __post_init__(self) -> None:
        _set(self, step=_closed("Stride: step", self.step, 1))

    @property
    def invariant(self) -> bool:
        """Yes."""
        return True

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """The same residue per axis."""
        step = _part(self.step, axis)
        rest = torch.arange(_sizes(grid)[axis]) % step
        return None if step == 1 else rest[:, None] == rest


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class KeyStride(Separable):
    """Keys at every ``step``-th position of each axis, seen by all queries.

    Args:
        step: One number or (frames, rows, columns); 1: every position. offset: the first of them, below ``step``.
    """

    step: Sizes
    offset: Sizes = (0, 0, 0)

    def __post_init__(self) -> None:
        step, offset = _closed("KeyStride: step", self.step, 1), _closed("KeyStride: offset", self.offset, 0)
        if any(o >= s for o, s in zip(offset, step, strict=True) if s > 1):
            raise ValueError(f"KeyStride: offset must be below step={step}, got {offset}")
        _set(self, step=step, offset=offset)

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """The same keys for each query."""
        step, offset = _part(self.step, axis), _part(self.offset, axis)
        size = _sizes(grid)[axis]
        return None if step == 1 else (torch.arange(size) % step == offset).expand(size, -1)


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class KeyFrames(Separable):
    """Keys of given frames, seen by all queries: the first frame as a sink, global frames.

    Args:
        frames: Their indices; negative ones count from the last. Those that a video does not have are passed over.
    """

    frames: tuple[int, ...]

    def __post_init__(self) -> None:
        frames = tuple(self.frames) if isinstance(self.frames, tuple | list | range) else None
        if frames is None or any(isinstance(f, bool) or not isinstance(f, int) for f in frames):
            raise ValueError(f"KeyFrames: frames must be a tuple of integers, got {self.frames!r}")
        _set(self, frames=frames)

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """The same frames for each query."""
        if axis:
            return None
        chosen = torch.zeros(grid.t, dtype=torch.bool)
        chosen[[f % grid.t for f in self.frames if -grid.t <= f < grid.t]] = True
        return chosen.expand(grid.t, -1)


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Axis(Separable):
    """A rule of your own along one axis.

    Args:
        axis: "t", "h" or "w".
        rule: Called once per grid with the query positions ``[n, 1]`` and the key positions ``[1, n]``, int64; returns
            bool ``[n, n]``. It must depend on nothing else: the result is cached.
    """

    axis: Literal["t", "h", "w"]
    rule: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if self.axis not in ("t", "h", "w"):
            raise ValueError(f'Axis: axis must be "t", "h" or "w", got {self.axis!r}')
        if not callable(self.rule):
            raise ValueError(f"Axis: rule must map query and key positions to a mask, got {self.rule!r}")

    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """The rule on its axis."""
        if "thw"[axis] != self.axis:
            return None
        place = torch.arange(_sizes(grid)[axis])
        keep = self.rule(place[:, None], place[None])
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != (len(place), len(place)):
            raise ValueError(f"Axis: rule must return a bool tensor [{len(place)}, {len(place)}], got {keep!r}")
        return keep


everything = Everything()
nothing = Nothing()
same_frame = Cells(size=(1, None, None))
same_position = Cells(size=(None, 1, 1))
text_keys = Text(side="key")
text_queries = Text(side="query")
