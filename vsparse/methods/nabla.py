"""NABLA: the smallest set of tiles that holds a share of the pooled attention, and a window around the query."""

from __future__ import annotations

import dataclasses as dc
from typing import ClassVar

import torch
from torch import Tensor

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Layout, TileLayout
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention, greatest_density
from vsparse.methods.budgets import check_density
from vsparse.patterns import Offset, Pattern, nothing
from vsparse.schedule import Phase

__all__ = ["NABLA", "NablaAttention"]


@dc.dataclass(frozen=True, kw_only=True)
class NABLA(Method):
    """Neighborhood Adaptive Block-Level Attention (arXiv 2507.13546, algorithm 1).

    Queries and keys are averaged over tiles, and of the softmax of their products every query tile keeps the best key
    tiles until they hold ``mass`` of it, the one that crosses it included. The tiles of a window are always kept.

    Args:
        mass: Share of the pooled attention to keep. Default 0.4, the training-free setting of the published code for
            Wan 2.1 14B; its fine-tuned checkpoints use 0.7 alone, 0.6 with (11, 3, 3) and 0.5 with (11, 5, 5).
        window: Frames, rows and columns of the window in tiles, cut at the borders (a tile sees ``window // 2`` in each
            direction), or None. Default (11, 3, 3), as in that code.
        tile: Frames, rows and columns of a tile.
        block: Slots of a block of the kernel.

    The map is a constant for the gradient. Differs from the released code: grids need not divide by the tile; joint
    text is always attended, its rows are full, and it takes no part in the pooled softmax.
    """

    key: ClassVar[str] = "nabla"
    paper: ClassVar[Paper] = Paper(title="NABLA: neighborhood adaptive", arxiv="2507.13546", trained=False)
    search_cost: ClassVar[str] = "B H D (2 N + 2 K^2)"
    advice: ClassVar[str] = (
        "The budget should follow the data, row by row, with a neighbourhood that is never left out."
    )

    mass: float = 0.4
    window: tuple[int, int, int] | None = (11, 3, 3)
    tile: tuple[int, int, int] = (1, 8, 8)
    block: int = 64

    def __post_init__(self) -> None:
        check_density("nabla: mass", self.mass)
        if self.window is not None:
            sizes = self.window if isinstance(self.window, tuple | list) else ()
            if len(sizes) != 3 or any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in sizes):
                raise ValueError(f"nabla: window must be three integers >= 1 or None, got {self.window!r}")
            object.__setattr__(self, "window", tuple(sizes))
        TileLayout(Grid(t=1, h=1, w=1), tile=self.tile, block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Tiles inside each frame."""
        return TileLayout(grid, tile=self.tile, block=self.block)

    def static_pattern(self, site: Site) -> Pattern:
        """The window, in units of tiles."""
        if self.window is None:
            return nothing
        t, h, w = (size // 2 for size in self.window)
        return Offset(low=(-t, -h, -w), high=(t, h, w), unit=self.tile)

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """An upper bound, as the map depends on the data: as many tiles as hold ``mass`` at most, and the window."""
        return greatest_density(
            layout, select.top_p_capacity(self.mass, layout.video_tiles), self.static_map(layout, site)
        )

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """Pooling and the pooled scores."""
        return batch * site.heads * site.head_dim * (2.0 * layout.tokens + 2.0 * layout.video_tiles**2)

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        return NablaAttention(self, site)


class NablaAttention(SparseAttention):
    """NABLA at one site."""

    method: NABLA

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pooled softmax, top-p, window, exact attention in what is kept."""
        packed = [call.rows.pack(x.detach()) for x in (q, k, v)]
        blocks = self._choose(packed[0], packed[1], call)
        self.tally(blocks, q.shape[0])
        return call.attend(q, k, v, blocks, packed=packed), ()

    def _choose(self, q: Tensor, k: Tensor, call: Call) -> BlockMap:
        """Top-p over tiles, joined with the static map, as a map over blocks."""
        static, own, tiles, mass = call.own_static, call.rows.tiles(), call.blocking.tiles(), self.method.mass
        assert static is not None
        per_tile = call.layout.blocks_per_tile
        q_mean, k_mean = (ops.block_pool(x, own) for x in (q, k))
        k_mean = call.all_blocks(k_mean)
        pooled = torch.einsum("bqhd,bkhd->bhqk", q_mean, k_mean) * q.shape[-1] ** -0.5
        text = tiles.text
        share = (pooled if text is None else torch.where(text, -torch.inf, pooled)).softmax(-1)
        chosen = select.top_p(
            share,
            own,
            tiles,
            mass=mass,
            include_crossing=True,
            forced=static.to_mask()[..., ::per_tile, ::per_tile],
            forced_budget="join",
            capacity=select.top_p_capacity(mass, call.layout.video_tiles) + static.capacity,
        )
        return select.expand_tiles(chosen, call.rows, call.blocking)
