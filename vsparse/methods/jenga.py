"""Jenga: blocks along a space-filling curve, the best of them by count or by mass, and the blocks that touch."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import ClassVar

import torch
from torch import Tensor

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import CurveLayout, Layout
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention, greatest_density
from vsparse.methods.budgets import Density, check_densities, check_density, mean_of
from vsparse.patterns import Offset, Pattern
from vsparse.schedule import Phase, Schedule

__all__ = ["Jenga", "JengaAttention"]


@dc.dataclass(frozen=True, kw_only=True)
class Jenga(Method):
    """Jenga's attention carving (arXiv 2505.16864, section 3): training-free.

    Tokens are ordered along a Hilbert curve through the video. Of the softmax of the products of mean queries and mean
    keys a query block keeps the best ``density`` of the blocks, or more until they hold ``mass`` of it, the one that
    crosses it included. The blocks with a position next to one of its own (diagonals included) are kept as well.

    Args:
        density: Least share of the video blocks that a row chooses, 1 less the published drop rate. Default 0.25, the
            first stage of the base setting for HunyuanVideo; its second stage has 0.15, the fast setting 0.3 and 0.2. A
            tuple has one number per head.
        mass: Least share of the softmax, 0.3 for HunyuanVideo; 0.9 for Wan 2.1 1.3B, 0.8 for 14B.
        text_bias: Added to the logits (natural log) of text keys. Default 0. Stages of lower resolution have
            ``scale * ln(full area / area) / 2``.
        block: Slots of a block.

    Schedule: the first tenth of the steps is dense; there the published drop rate rises from 0 to its value.

    Differs from the released code: attention only, neither stages of lower resolution nor skipped steps, which make a
    large part of the published speed; ``density`` rounds up; any grid and batch, text on either side; ``text_bias``
    holds for the rows of text, too; Wan has the same curve as HunyuanVideo, through all frames, and its first frame
    no rule of its own.
    """

    key: ClassVar[str] = "jenga"
    paper: ClassVar[Paper] = Paper(title="Jenga: attention carving", arxiv="2505.16864", trained=False)
    search_cost: ClassVar[str] = "B H D (2 N + 2 K^2)"
    advice: ClassVar[str] = (
        "No training, and motion across frames: blocks are compact in space and time, and their neighbours always stay."
    )
    default_schedule: ClassVar[Schedule] = Schedule(dense_steps=0.1)

    density: Density = 0.25
    mass: float = 0.3
    text_bias: float = 0.0
    block: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_densities("jenga: density", self.density))
        check_density("jenga: mass", self.mass)
        bias = self.text_bias
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
            raise ValueError(f"jenga: text_bias must be a finite number, got {bias!r}")
        CurveLayout(Grid(t=1, h=1, w=1), block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Blocks of consecutive tokens of the curve."""
        return CurveLayout(grid, block=self.block)

    def static_pattern(self, site: Site) -> Pattern:
        """Positions at most one apart along every axis."""
        return Offset(low=(-1, -1, -1), high=(1, 1, 1))

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """An upper bound, as the map depends on the data: the larger share of the blocks, and what touches."""
        static = self.static_map(layout, site)
        return mean_of(self.density, lambda share: greatest_density(layout, self.most_chosen(share, layout), static))

    def most_chosen(self, density: float, layout: Layout) -> int:
        """Blocks that a row chooses at most, touching ones aside."""
        video = layout.video_tiles
        return max(kept_blocks(density, video), select.top_p_capacity(self.mass, video))

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """Pooling and the pooled scores."""
        return batch * site.heads * site.head_dim * (2.0 * layout.tokens + 2.0 * layout.video_tiles**2)

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        return JengaAttention(self, site)


class JengaAttention(SparseAttention):
    """Jenga at one site."""

    method: Jenga

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pooled softmax, the larger of two budgets, what touches, exact attention in what is kept."""
        packed = [call.rows.pack(x.detach()) for x in (q, k, v)]
        blocks = self._choose(packed[0], packed[1], call)
        self.tally(blocks, q.shape[0])
        return call.attend(q, k, v, blocks, packed=packed), ()

    def _choose(self, q: Tensor, k: Tensor, call: Call) -> BlockMap:
        method, static, rows, blocking = self.method, call.own_static, call.rows, call.blocking
        assert static is not None
        q_mean, k_mean = (ops.block_pool(x, rows) for x in (q, k))
        k_mean = call.all_blocks(k_mean)
        pooled = torch.einsum("bqhd,bkhd->bhqk", q_mean, k_mean) * q.shape[-1] ** -0.5
        text = blocking.text
        pooled = pooled if text is None else torch.where(text, -torch.inf, pooled)
        video = call.layout.video_tiles
        # Blocks are ranked once, by the logits: a softmax rounds small differences away, so that its best are others,
        # and takes far blocks to the 0 of text. It says only how many of the best hold the mass.
        needed = select.top_p(
            pooled.softmax(-1),
            rows,
            blocking,
            mass=method.mass,
            include_crossing=True,
            capacity=select.top_p_capacity(method.mass, video),
        ).count
        chosen = select.top_k(
            pooled,
            rows,
            blocking,
            count=call.budget(video).maximum(needed),
            forced=static.to_mask(),
            forced_budget="join",
            capacity=method.most_chosen(self.peak_density, call.layout) + static.capacity,
        )
        if method.text_bias == 0.0:
            return chosen
        if text is None:
            raise ValueError(f"jenga: text_bias={method.text_bias} for {self.site.name}, whose sequence holds no text")
        bias = torch.where(text, method.text_bias, 0.0).float()
        return dc.replace(chosen, key_bias=bias[None, None])
