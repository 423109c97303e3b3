"""SVG: every head takes a spatial or a temporal band, whichever gives the sampled queries what full attention gives."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import ClassVar

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Blocking, Layout, RasterLayout
from vsparse.methods import chance
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention
from vsparse.methods.budgets import check_density
from vsparse.patterns import Band, KeyFrames, Pattern
from vsparse.schedule import Phase, Schedule

__all__ = ["SVG", "BandWidth", "SVGAttention"]


@dc.dataclass(frozen=True, kw_only=True)
class BandWidth:
    """Half-width of the band that, with all text, takes a share ``density`` of the token pairs.

    A band of half-width w over V video tokens holds ``2 w V - w^2`` pairs, so with text of L tokens and N = V + L
    ``w = V (1 - sqrt(1 - s))``, ``s = (density N^2 - 2 N L + L^2) / V^2``. It is rounded to whole blocks, at least one.

    Args:
        density: Share of the pairs. block: tokens of a block.
    """

    density: float
    block: int

    def __call__(self, grid: Grid) -> int:
        """Tokens on either side of a query."""
        video, text = grid.video, grid.text
        share = (self.density * (video + text) ** 2 - 2 * (video + text) * text + text**2) / video**2
        width = video * (1.0 - math.sqrt(1.0 - min(1.0, max(0.0, share))))
        return max(1, round(width / self.block)) * self.block


@dc.dataclass(frozen=True, kw_only=True)
class SVG(Method):
    """Sparse VideoGen (arXiv 2502.01776, section 4): the spatial or the temporal band, chosen online by each head.

    Spatial: keys near the query frame by frame. Temporal: keys near it position by position, each with all its frames.
    A few sampled queries attend to everything and in both bands; a head takes the band whose outputs have the smaller
    squared error, in every layer and step anew, for every sample.

    Args:
        density: Share of the token pairs that a band and the text take. Published: 0.3 for Wan 2.1 14B at 720p, 0.25
            for HunyuanVideo.
        rows: Sampled queries (published: 32 to 64), at most all of the video.
        sink_frames: Leading frames that every query sees on top of its band: 1 for Wan, 0 for HunyuanVideo. A video of
            fewer frames is seen whole.
        block: Slots of a block.
        seed: Of the sampled queries.

    Schedule: the first 20 % of the steps and the first layer dense (Wan; 3 % of the layers as published; HunyuanVideo:
    10 % of the steps). Joint text is always attended and its rows are full.

    Differs from the released code: the queries are drawn from the whole video, one from each of ``rows`` equal parts,
    instead of from its first 10 000 tokens; they are tried under exactly the blocks that are computed afterwards,
    instead of bands of a fixed other width; both bands stand in raster order, where the temporal one is a band in every
    pair of frames, so that no head is transposed; any batch, grid and text. On a single frame the bands are one.
    """

    key: ClassVar[str] = "svg"
    paper: ClassVar[Paper] = Paper(title="SVG: Sparse VideoGen", arxiv="2502.01776", trained=False)
    static_by_head: ClassVar[bool] = False
    search_cost: ClassVar[str] = "4 B H D min(rows, V) N (1 + 2 P)"
    advice: ClassVar[str] = "No training, and heads that are clearly spatial or temporal: each takes one of two bands."
    default_schedule: ClassVar[Schedule] = Schedule(dense_steps=0.2, dense_layers=1)

    density: float = 0.3
    rows: int = 64
    sink_frames: int = 1
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_density("svg: density", self.density)
        for name, low in (("rows", 1), ("sink_frames", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"svg: {name} must be an integer >= {low}, got {value!r}")
        RasterLayout(Grid(t=1, h=1, w=1), block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Host order in blocks; text starts a block of its own."""
        return RasterLayout(grid, block=self.block)

    def static_pattern(self, site: Site) -> tuple[Pattern, Pattern]:
        """The two candidates, spatial and temporal; not one for each head."""
        width = BandWidth(density=self.density, block=self.block)
        spatial, temporal = Band(width=width), Band(width=width, order="position")
        if not self.sink_frames:
            return spatial, temporal
        sink = KeyFrames(frames=tuple(range(self.sink_frames)))
        return spatial | sink, temporal | sink

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """Counted in the two maps; the mean, as the choice depends on the data."""
        static = self.static_map(layout, site)
        assert static is not None
        return float(static.density().mean())

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """The sampled queries against everything and under both bands."""
        share = 1.0 + 2.0 * self.predicted_density(layout, site)
        return 4.0 * batch * site.heads * site.head_dim * min(self.rows, layout.grid.video) * layout.tokens * share

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        return SVGAttention(self, site)


class SVGAttention(SparseAttention):
    """SVG at one site."""

    method: SVG
    salt: Tensor

    def __init__(self, method: SVG, site: Site) -> None:
        super().__init__(method, site)
        # A buffer: a compiled block guards on every int it reads, and the layer differs in each.
        self.register_buffer("salt", chance.salt(method.seed, site.layer), persistent=False)

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Try both bands on sampled queries, attend in the better one."""
        candidates = call.static
        assert candidates is not None
        packed = [call.rows.pack(x.detach()) for x in (q, k, v)]
        spatial, temporal = _apart(candidates)
        near, far = self._errors(packed[0], packed[1], packed[2], call, (spatial, temporal))
        moves = (far < near)[..., None]
        index = torch.where(moves[..., None], temporal.index, spatial.index)
        blocks = BlockMap(index, torch.where(moves, temporal.count, spatial.count), call.blocking, call.blocking)
        blocks = call.own_rows(blocks, call.rows)
        self.tally(blocks, q.shape[0])
        return call.attend(q, k, v, blocks, packed=packed), ()

    def _errors(self, q: Tensor, k: Tensor, v: Tensor, call: Call, candidates: tuple[BlockMap, ...]) -> list[Tensor]:
        """``[B, H]`` float32 for each candidate: squared error of the sampled queries against full attention."""
        layout, grid = call.layout, call.grid
        token = grid.text_before + chance.spread(self.method.rows, grid.video, salt=self.salt, step=call.step)
        queries = call.slots_anywhere(q, layout.token_slot[0, 0, token])
        rows = Blocking(length=torch.ones_like(token, dtype=torch.int32)[None, None], block=1)
        block = layout.token_block[0, 0, token]
        wanted = call.attend_anywhere(queries, k, v, BlockMap.full(rows, call.blocking))
        errors = []
        for candidate in candidates:
            index, count = candidate.index[:, :, block], candidate.count[:, :, block]
            found = call.attend_anywhere(queries, k, v, BlockMap(index, count, rows, call.blocking))
            errors.append((found.float() - wanted.float()).square().sum((1, 3)))
        return errors


def _apart(candidates: BlockMap) -> tuple[BlockMap, BlockMap]:
    """The two maps of a static map that holds them where others have heads."""
    parts = (slice(0, 1), slice(1, 2))
    first, second = (dc.replace(candidates, index=candidates.index[:, i], count=candidates.count[:, i]) for i in parts)
    return first, second
