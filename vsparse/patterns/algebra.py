"""Patterns and how they combine: ``|``, ``&``, ``~``, and their block form over a layout."""

from __future__ import annotations

import abc
import contextlib
import dataclasses as dc
import functools
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, Segment
from vsparse.layouts import Layout
from vsparse.patterns.boxes import Bounds, Box, kept_pairs, shifted_pairs
from vsparse.patterns.counting import (
    AxisTables,
    Relations,
    all_differences,
    axis_tables,
    both,
    count_axes,
    count_differences,
    difference_table,
    negated,
)

__all__ = [
    "Complement",
    "Intersection",
    "Pattern",
    "Separable",
    "TextRule",
    "Transposed",
    "Union",
    "block_map",
]

TextRule = Literal["always", "pattern"]

_FEW = 128  # differences of positions that are tried one by one: at 720p about the time that the boxes of tiles take


class Pattern(abc.ABC):
    """A static rule over pairs of tokens: which key positions a query position attends to.

    Patterns combine token by token: ``a | b``, ``a & b``, ``~a``; ``a.T`` exchanges queries and keys. They are frozen
    values: equal ones are equal and hash alike, so caches are keyed on them. Geometric rules hold only between two
    video tokens; `Text` speaks of text.

    A new rule defines `bounds`, and `on_text` if it holds for text; it must be a frozen dataclass.
    """

    @abc.abstractmethod
    def bounds(self, q: Box, k: Box, grid: Grid) -> Bounds:
        """What is known over the pairs of video tokens of query boxes and key boxes; exact on single tokens."""

    def on_text(self, q_text: bool, k_text: bool) -> bool:
        """Whether the rule holds for a pair of which at least one token is text."""
        return False

    def axes(self, grid: Grid) -> Relations | None:
        """The rule as one relation per axis that must all hold, or None when it has no such form."""
        return None

    def restricts(self, grid: Grid) -> frozenset[int]:
        """The axes that the rule depends on, of 0, 1, 2."""
        return frozenset((0, 1, 2))

    @property
    def invariant(self) -> bool:
        """Whether the rule depends on the difference of two positions only."""
        return False

    def block_map(self, layout: Layout, *, text: TextRule = "always") -> BlockMap:
        """The block form; see `vsparse.patterns.block_map`."""
        return block_map(self, layout, text=text)

    def token_mask(self, grid: Grid, *, text: TextRule = "always") -> Tensor:
        """``[N, N]`` bool on the CPU, the rule for every pair of tokens in host order. To look at, and for tests."""
        with _plain():
            one = Box.lattice(grid)
            keep = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
            video = torch.zeros(grid.tokens, dtype=torch.bool)
            video[grid.text_before : grid.text_before + grid.video] = True
            inside = self.bounds(one.at(slice(None), None), one.at(None), grid).some
            keep[video[:, None] & video] = inside.expand(grid.video, grid.video).flatten()
            return _with_text(self, keep, ~video, text)

    def __or__(self, other: Pattern) -> Pattern:
        return _combined(Union, self, other)

    def __and__(self, other: Pattern) -> Pattern:
        return _combined(Intersection, self, other)

    def __invert__(self) -> Pattern:
        return Complement(part=self)

    @property
    def T(self) -> Pattern:  # noqa: N802 - the transpose of tensors is spelled so
        """The same rule with queries and keys exchanged."""
        return Transposed(part=self)

    def __repr__(self) -> str:
        fields = [f for f in dc.fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"


class Separable(Pattern):
    """A rule that is one relation per axis: a query and a key position fulfil it when all three hold."""

    @abc.abstractmethod
    def relation(self, grid: Grid, axis: int) -> Tensor | None:
        """``[n, n]`` bool over the query and key positions of axis 0 (frames), 1 (rows) or 2 (columns); None: any."""

    def axes(self, grid: Grid) -> Relations:
        """The relations of all axes."""
        return self.relation(grid, 0), self.relation(grid, 1), self.relation(grid, 2)

    def restricts(self, grid: Grid) -> frozenset[int]:
        """Those with a relation."""
        return frozenset(axis for axis, relation in enumerate(self.axes(grid)) if relation is not None)

    def bounds(self, q: Box, k: Box, grid: Grid) -> Bounds:
        """Exact, by counting in the relation of each axis."""
        return count_axes(axis_tables(self.axes(grid)), q, k)


@functools.lru_cache(maxsize=256)
def _tables(pattern: Pattern, grid: Grid) -> AxisTables | None:
    """Counting tables of a pattern's relations, or None when it is not one relation per axis."""
    axes = pattern.axes(grid)
    return None if axes is None else axis_tables(axes)


def _kept_differences(pattern: Pattern, grid: Grid) -> Tensor:
    """``[2T - 1, 2H - 1, 2W - 1]`` bool: the differences of positions that an invariant pattern keeps."""
    q, k, shape = all_differences(grid)
    return pattern.bounds(q, k, grid).some.expand(math.prod(shape)).view(shape)


@functools.lru_cache(maxsize=64)
def _differences(pattern: Pattern, grid: Grid) -> Tensor:
    """Counting table over all differences of an invariant pattern."""
    return difference_table(_kept_differences(pattern, grid))


def judged(pattern: Pattern, q: Box, k: Box, grid: Grid) -> Bounds:
    """The bounds of a pattern, exact where its form allows it."""
    tables = _tables(pattern, grid)
    if tables is not None:
        return count_axes(tables, q, k)
    if pattern.invariant and isinstance(pattern, Union | Intersection):
        return count_differences(_differences(pattern, grid), q, k)
    return pattern.bounds(q, k, grid)


class _Composite(Pattern):
    """A pattern made of others."""

    @abc.abstractmethod
    def members(self) -> tuple[Pattern, ...]:
        """What it is made of."""

    def restricts(self, grid: Grid) -> frozenset[int]:
        """Those of any member."""
        return frozenset().union(*(member.restricts(grid) for member in self.members()))

    @property
    def invariant(self) -> bool:
        """If all members are."""
        return all(member.invariant for member in self.members())


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Complement(_Composite):
    """Every pair that a pattern does not keep."""

    part: Pattern

    def members(self) -> tuple[Pattern, ...]:
        """The part."""
        return (self.part,)

    def bounds(self, q: Box, k: Box, grid: Grid) -> Bounds:
        """Those of the part, inverted."""
        return ~judged(self.part, q, k, grid)

    def on_text(self, q_text: bool, k_text: bool) -> bool:
        """Where the part does not hold."""
        return not self.part.on_text(q_text, k_text)

    def axes(self, grid: Grid) -> Relations | None:
        """Of the part, if it restricts one axis only."""
        return negated(self.part.axes(grid), grid)

    def __invert__(self) -> Pattern:
        return self.part

    def __repr__(self) -> str:
        return f"~{self.part!r}"


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Intersection(_Composite):
    """Pairs that all of several patterns keep."""

    parts: tuple[Pattern, ...]

    def members(self) -> tuple[Pattern, ...]:
        """The parts."""
        return self.parts

    def bounds(self, q: Box, k: Box, grid: Grid) -> Bounds:
        """What the parts allow to conclude; parts that can be judged exactly together are."""
        separable = tuple(part for part in self.parts if _tables(part, grid) is not None)
        invariant = tuple(part for part in self.parts if part.invariant)
        groups = [alike for alike in (separable, invariant) if 1 < len(alike) < len(self.parts)]
        single = [part for part in self.parts if not any(part in alike for alike in groups)]
        joint = [Intersection(parts=alike) for alike in groups]
        return functools.reduce(Bounds.meet, (judged(part, q, k, grid) for part in (*joint, *single)))

    def on_text(self, q_text: bool, k_text: bool) -> bool:
        """Where all parts hold."""
        return all(part.on_text(q_text, k_text) for part in self.parts)

    def axes(self, grid: Grid) -> Relations | None:
        """All relations together."""
        joint: Relations = (None, None, None)
        for part in self.parts:
            axes = part.axes(grid)
            if axes is None:
                return None
            joint = both(joint, axes)
        return joint

    def __repr__(self) -> str:
        return f"({' & '.join(map(repr, self.parts))})"


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Union(_Composite):
    """Pairs that any of several patterns keeps."""

    parts: tuple[Pattern, ...]

    def members(self) -> tuple[Pattern, ...]:
        """The parts."""
        return self.parts

    def bounds(self, q: Box, k: Box, grid: Grid) -> Bounds:
        """By De Morgan: not (not a and not b)."""
        return ~Intersection(parts=tuple(~part for part in self.parts)).bounds(q, k, grid)

    def on_text(self, q_text: bool, k_text: bool) -> bool:
        """Where any part holds."""
        return any(part.on_text(q_text, k_text) for part in self.parts)

    def axes(self, grid: Grid) -> Relations | None:
        """By De Morgan; exists when all parts restrict one and the same axis."""
        return negated(Intersection(parts=tuple(~part for part in self.parts)).axes(grid), grid)

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.parts))})"


@dc.dataclass(frozen=True, repr=False, kw_only=True)
class Transposed(_Composite):
    """A pattern with queries and keys exchanged."""

    part: Pattern

    def members(self) -> tuple[Pattern, ...]:
        """The part."""
        return (self.part,)

    def bounds(self, q: Box, k: Box, grid: Grid) -> Bounds:
        """Those of the part with its arguments exchanged."""
        return judged(self.part, k, q, grid)

    def on_text(self, q_text: bool, k_text: bool) -> bool:
        """As of the part, exchanged."""
        return self.part.on_text(k_text, q_text)

    def axes(self, grid: Grid) -> Relations | None:
        """Relations of the part, transposed."""
        axes = self.part.axes(grid)
        if axes is None:
            return None
        t, h, w = (None if x is None else x.T for x in axes)
        return t, h, w

    @property
    def T(self) -> Pattern:  # noqa: N802
        """The part itself."""
        return self.part

    def __repr__(self) -> str:
        return f"({self.part!r}).T" if isinstance(self.part, Complement) else f"{self.part!r}.T"


def _combined(kind: type[Union] | type[Intersection], a: Pattern, b: Pattern) -> Pattern:
    """One flat combination without repeats."""
    if not isinstance(b, Pattern):
        return NotImplemented
    parts: list[Pattern] = []
    for side in (a, b):
        parts += side.parts if isinstance(side, kind) else (side,)
    unique = tuple(dict.fromkeys(parts))
    return unique[0] if len(unique) == 1 else kind(parts=unique)


# ---- block form --------------------------------------------------------------------------------------------------


def block_map(pattern: Pattern | tuple[Pattern, ...], layout: Layout, *, text: TextRule = "always") -> BlockMap:
    """The block form of a pattern: a block pair is kept iff the pattern keeps any pair of tokens in it.

    Args:
        pattern: One for all heads, or a tuple with one per head.
        layout: Any layout whose order is the same for all samples and heads. The map lies on its device.
        text: "always": text rows are full and text keys are always kept; "pattern": the pattern decides, in which
            geometric rules do not hold for text.

    Returns:
        A map ``[1, 1 | H, Q, M]`` for texts of full length; M is the longest row that is not full, and a row that
        keeps every block with a token in it is full. To use the map with other text lengths, exchange its blockings
        for those that the layout binds.

    Raises:
        ValueError: ``pattern`` or ``text`` is of another kind. NotImplementedError: an order per sample or head.
    """
    heads = pattern if isinstance(pattern, tuple) else (pattern,)
    if not heads or not all(isinstance(p, Pattern) for p in heads):
        raise ValueError(f"pattern must be a Pattern or a tuple with one Pattern per head, got {pattern!r}")
    if text not in ("always", "pattern"):
        raise ValueError(f'text must be "always" or "pattern", got {text!r}')
    if layout.slot_token.shape[:2] != (1, 1):
        raise NotImplementedError(
            "a pattern needs an order that all samples and heads share, "
            f"got slot_token {tuple(layout.slot_token.shape)}"
        )
    with _plain():
        blocking, on_cpu = layout.bind(), layout.to("cpu")
        requests = {p: _Request(p, text, layout.key, on_cpu) for p in dict.fromkeys(heads)}
        capacity = max(_longest(_block_mask(request)) for request in requests.values())
        rows = {p: _lists(request, capacity) for p, request in requests.items()}
        index, count = (torch.stack([rows[p][i] for p in heads])[None] for i in range(2))
        device = layout.length.device
        return BlockMap(index.to(device), count.to(device), blocking, blocking)


@dc.dataclass(frozen=True)
class _Request:
    """The key of a cached block form; the layout, on the CPU, follows from its key and is not compared."""

    pattern: Pattern
    text: TextRule
    key: tuple[object, ...]
    layout: Layout = dc.field(compare=False)


@functools.lru_cache(maxsize=64)
def _block_mask(request: _Request) -> Tensor:
    layout, pattern = request.layout, request.pattern
    keep = _video_pairs(pattern, layout)
    keep = _with_text(pattern, keep, layout.segment == int(Segment.TEXT), request.text)
    used = layout.length[0, 0] > 0
    keep = keep & used & used[:, None]
    return keep | ((keep | ~used).all(-1) & used)[:, None]


def _video_pairs(pattern: Pattern, layout: Layout) -> Tensor:
    """``[K, K]`` bool: block pairs with a pair of video tokens that the pattern keeps."""
    grid = layout.grid
    if pattern.invariant:
        steps = _kept_differences(pattern, grid).nonzero() - torch.tensor((grid.t - 1, grid.h - 1, grid.w - 1))
        if len(steps) <= _FEW:
            return shifted_pairs(steps.tolist(), layout)
    return kept_pairs(functools.partial(_bounds, pattern, grid), layout, sorted(pattern.restricts(grid)))


def _bounds(pattern: Pattern, grid: Grid, q: Box, k: Box) -> Bounds:
    """All four with the full shape of the pairs."""
    shape = torch.broadcast_shapes(q.low.shape[1:], k.low.shape[1:])
    return Bounds(*(x.expand(shape) for x in judged(pattern, q, k, grid)))


def _with_text(pattern: Pattern, keep: Tensor, is_text: Tensor, text: TextRule) -> Tensor:
    """Fill in the pairs of tokens or blocks of which at least one is text."""
    for q_text, k_text in ((True, True), (True, False), (False, True)):
        value = text == "always" or pattern.on_text(q_text, k_text)
        keep = torch.where((is_text == q_text)[:, None] & (is_text == k_text), value, keep)
    return keep


def _longest(keep: Tensor) -> int:
    count = keep.sum(-1)
    return int(torch.where(count < keep.shape[-1], count, 0).max())


@functools.lru_cache(maxsize=64)
def _lists(request: _Request, capacity: int) -> tuple[Tensor, Tensor]:
    """Index ``[Q, M]`` and count ``[Q]`` of a block form; full rows are not listed."""
    keep = _block_mask(request)
    count = keep.sum(-1, dtype=torch.int32)
    row, column = (keep & (count < keep.shape[-1])[:, None]).nonzero().unbind(1)
    listed = torch.where(count < keep.shape[-1], count, 0).long()
    place = torch.arange(len(row)) - (listed.cumsum(0) - listed)[row]
    index = torch.zeros(len(keep), capacity, dtype=torch.int32)
    index[row, place] = column.to(torch.int32)
    return index, count


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Real CPU tensors, whatever mode the caller is in: they are cached and outlive it."""
    with torch.inference_mode(False), _disable_current_modes(), torch.device("cpu"):
        yield
