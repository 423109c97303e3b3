"""DraftAttention: attention at low resolution says which cells of the frames attend to each other."""

from __future__ import annotations

import dataclasses as dc
from typing import ClassVar

import torch
from torch import Tensor

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import Layout, TileLayout
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention, with_text
from vsparse.methods.budgets import Density, check_densities, mean_of
from vsparse.schedule import Phase

__all__ = ["DraftAttention", "LowResolutionAttention"]


@dc.dataclass(frozen=True, kw_only=True)
class DraftAttention(Method):
    """DraftAttention (arXiv 2505.14708, section 3): training-free.

    Queries and keys are averaged over cells of a frame. Of the softmax of their products a head keeps its best entries,
    wherever they stand: rows keep unequal numbers of cells.

    Args:
        density: Share of all pairs of cells that a head keeps, ``max(1, ceil(density * cells ** 2))``; a tuple has one
            number per head. Default 0.1, as in the published examples for HunyuanVideo; those for Wan 2.1 use 0.25.
        tile: Frames, rows and columns of a cell. Default (1, 8, 16); (1, 16, 8) suits portrait grids.
        block: Slots of a block of the kernel; a cell spans ``ceil(prod(tile) / block)`` of them.

    Schedule: sparse from the first step; the published code for Wan keeps the first layer and the timesteps above 925
    of 1000 dense.

    Differs from the released code: exactly the budget is kept, not one entry more; on top of it every row keeps its
    best cell, so that none is empty; grids need not divide by the cell; any batch; joint text of any length, on either
    side, is always attended, its rows are full, and it takes no part in the pooled softmax.
    """

    key: ClassVar[str] = "draft"
    paper: ClassVar[Paper] = Paper(title="DraftAttention: low-resolution guidance", arxiv="2505.14708", trained=False)
    search_cost: ClassVar[str] = "B H D (2 N + 2 K^2)"
    advice: ClassVar[str] = (
        "No training, and heads or rows of very unequal need: the budget is shared over the whole head."
    )

    density: Density = 0.1
    tile: tuple[int, int, int] = (1, 8, 16)
    block: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_densities("draft: density", self.density))
        TileLayout(Grid(t=1, h=1, w=1), tile=self.tile, block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Cells inside each frame."""
        return TileLayout(grid, tile=self.tile, block=self.block)

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """Share of the pairs of cells, forced text included; up to one cell per row may come on top of it."""
        pairs = layout.video_tiles**2
        return with_text(layout.grid, mean_of(self.density, lambda share: kept_blocks(share, pairs)) / pairs)

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """Pooling and the pooled scores."""
        return batch * site.heads * site.head_dim * (2.0 * layout.tokens + 2.0 * layout.video_tiles**2)

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        return LowResolutionAttention(self, site)


class LowResolutionAttention(SparseAttention):
    """DraftAttention at one site."""

    method: DraftAttention

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pooled softmax, the best entries of each head, exact attention in what is kept."""
        packed = [call.rows.pack(x.detach()) for x in (q, k, v)]
        blocks = self._choose(packed[0], packed[1], call)
        self.tally(blocks, q.shape[0])
        return call.attend(q, k, v, blocks, packed=packed), ()

    def _choose(self, q: Tensor, k: Tensor, call: Call) -> BlockMap:
        """Best pairs of cells of each head, as a map over blocks; all rows compete, those of other processes, too."""
        own, cells = call.rows.tiles(), call.blocking.tiles()
        q_mean, k_mean = (ops.block_pool(x, own) for x in (q, k))
        q_mean, k_mean = call.all_blocks(torch.cat((q_mean, k_mean), -1)).chunk(2, -1)
        pooled = torch.einsum("bqhd,bkhd->bhqk", q_mean, k_mean) * q.shape[-1] ** -0.5
        text = cells.text
        share = (pooled if text is None else torch.where(text, -torch.inf, pooled)).softmax(-1)
        # Text is on top of the budget, which is a share of the pairs of video cells.
        budget = call.density * (call.layout.video_tiles / cells.blocks) ** 2
        chosen = select.head_global(share, cells, density=budget, least=1, forced=select.forced_text(cells))
        return select.expand_tiles(call.own_rows(chosen, own), call.rows, call.blocking)
