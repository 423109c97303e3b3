"""pattern: attention under a static pattern of your own, and the module that every static method runs."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Layout, RasterLayout, TileLayout
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention
from vsparse.patterns import Pattern, everything, parse

__all__ = ["StaticAttention", "StaticMethod", "StaticPattern"]


@dc.dataclass(frozen=True, kw_only=True)
class StaticMethod(Method):
    """A method whose map follows from the layout alone: it gives a layout and a `static_pattern`, nothing else."""

    def static_map(self, layout: Layout, site: Site) -> BlockMap | None:
        """The block form of `static_pattern`.

        Raises:
            ValueError: a query block that holds tokens sees no key on this grid.
        """
        found = super().static_map(layout, site)
        if found is not None:
            _refuse_empty_rows(self.key, found, layout)
        return found

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """Counted in the map; the mean over heads."""
        static = self.static_map(layout, site)
        assert static is not None
        return float(static.density().mean())

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        pattern = self.static_pattern(site)
        if isinstance(pattern, tuple) and len(pattern) != site.heads:
            raise ValueError(f"{self.key}: {len(pattern)} patterns for {site.name}, which has {site.heads} heads")
        return StaticAttention(self, site)


def _refuse_empty_rows(key: str, blocks: BlockMap, layout: Layout) -> None:
    """Attention over no key is 0, which no user of a pattern means. Read once for each layout, outside any trace."""
    with torch.inference_mode(False), _disable_current_modes():
        empty = (blocks.count == 0) & (layout.length > 0)
        if not bool(empty.any()):
            return
        _, head, block = (int(i) for i in empty.nonzero()[0])
        of_heads = f" of head {head}" if empty.shape[1] > 1 else ""
        raise ValueError(
            f"{key}: on {layout.grid} the pattern{of_heads} leaves {int(empty[0, head].sum())} of {layout.blocks} "
            f"query blocks without a key, the first of them block {block}; add keys that every query has, such as "
            "`| same_position` or `| KeyFrames(frames=(0,))`"
        )


class StaticAttention(SparseAttention):
    """Exact attention under the static map of the call."""

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pack, attend, unpack."""
        blocks = call.own_static
        assert blocks is not None
        packed = [call.rows.pack(x.detach()) for x in (q, k, v)]
        self.tally(blocks, q.shape[0])
        return call.attend(q, k, v, blocks, packed=packed), ()


@dc.dataclass(frozen=True, kw_only=True)
class StaticPattern(StaticMethod):
    """A pattern of your own, from `vsparse.patterns`.

    Args:
        pattern: One for all heads and layers, or several; a text is read by `vsparse.patterns.parse`. The default keeps
            everything. Published patterns have names there: `vsparse.patterns.presets`.
        by: Of several patterns, "head": one for each head; "layer": layer l takes pattern ``l % n``.
        tile: Frames, rows, columns of a tile: tokens are ordered by tiles. None: in raster order.
        block: Slots of a block of the kernel. A block is computed if the pattern keeps any pair of tokens in it, so the
            order decides how many blocks a pattern costs.
        break_at: "frame": in raster order, no block straddles two frames.

    Joint text is always attended and its rows are full, whatever the pattern says. A pattern that leaves a query block
    of a video without any key is refused.
    """

    key: ClassVar[str] = "pattern"
    paper: ClassVar[Paper] = Paper(title="a static pattern of your own", arxiv="", trained=False)
    advice: ClassVar[str] = (
        "You know which positions matter, or want to try a static pattern of the literature: "
        "`vsparse.patterns.presets`."
    )

    pattern: Pattern | str | tuple[Pattern | str, ...] = everything
    by: Literal["head", "layer"] = "head"
    tile: tuple[int, int, int] | None = None
    block: int = 64
    break_at: Literal["frame"] | None = None

    def __post_init__(self) -> None:
        given: Any = parse(self.pattern) if isinstance(self.pattern, str) else self.pattern
        several = isinstance(given, tuple | list)
        parts = tuple(parse(x) if isinstance(x, str) else x for x in (given if several else [given]))
        if not parts or not all(isinstance(x, Pattern) for x in parts):
            raise ValueError(f"pattern: pattern must be a Pattern or a tuple of them, got {self.pattern!r}")
        object.__setattr__(self, "pattern", parts if several else parts[0])
        if self.by not in ("head", "layer"):
            raise ValueError(f'pattern: by must be "head" or "layer", got {self.by!r}')
        if self.tile is not None and self.break_at is not None:
            raise ValueError(f"pattern: break_at={self.break_at!r} is for raster order, got tile={self.tile!r}, too")
        self._layout(Grid(t=1, h=1, w=1))

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Tiles, or raster order."""
        return self._layout(grid)

    def _layout(self, grid: Grid) -> Layout:
        if self.tile is not None:
            return TileLayout(grid, tile=self.tile, block=self.block)
        return RasterLayout(grid, block=self.block, break_at=self.break_at)

    def static_pattern(self, site: Site) -> Pattern | tuple[Pattern, ...]:
        """The pattern as given, or the one of the site's layer."""
        given = cast("Pattern | tuple[Pattern, ...]", self.pattern)
        return given[site.layer % len(given)] if self.by == "layer" and isinstance(given, tuple) else given

    def options(self) -> dict[str, Any]:
        """The fields, patterns as text.

        Raises:
            ValueError: a pattern holds a function, which has no text.
        """
        fields = {field.name: getattr(self, field.name) for field in dc.fields(self)}
        if isinstance(self.pattern, tuple):
            return fields | {"pattern": tuple(map(_written, self.pattern))}
        return fields | {"pattern": _written(self.pattern)}


def _written(pattern: Pattern | str) -> str:
    text = repr(pattern)
    parse(text)
    return text
