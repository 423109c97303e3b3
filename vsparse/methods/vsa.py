"""VSA: pooled tiles choose critical tiles, exact attention inside them, gated coarse branch."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from vsparse import ops, select
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import Layout, TileLayout
from vsparse.methods.base import (
    Call,
    Method,
    Paper,
    Site,
    SparseAttention,
    added,
    check_hidden,
    given_hidden,
    recomputed,
    zero_linear,
)
from vsparse.methods.budgets import Density, check_densities, check_density
from vsparse.schedule import Phase

__all__ = ["VSA", "VideoSparseAttention", "density_ramp"]


@dc.dataclass(frozen=True, kw_only=True)
class VSA(Method):
    """Video Sparse Attention (arXiv 2505.13389, sections 3.1-3.3).

    Queries and keys are averaged over tiles of the video, and every query tile attends exactly to the key tiles whose
    means fit its own best. Attention between the means, a coarse output, is added through a trained gate.

    Args:
        density: Share of the video tiles that every query tile keeps: ``max(1, ceil(density * tiles))``. Default 1/8
            (32 tiles at 16K tokens). FastWan uses 0.2 (1.3B, 5B) and 0.1 (14B). A tuple has one number per head.
        tile: Frames, rows, columns of a tile.
        block: Slots of a block of the kernel; a larger tile spans several blocks.

    The output is ``fine + gate * coarse`` with ``gate = to_gate_compress(hidden)``, zero at first: then it equals the
    top-k model, and with ``density=1`` the host. Differs from the paper: no gate on the fine branch (as FastVideo does
    when it adapts a pretrained model); joint text is always attended, exempt from the budget, and has no coarse branch.
    """

    key: ClassVar[str] = "vsa"
    paper: ClassVar[Paper] = Paper(title="VSA: video sparse attention", arxiv="2505.13389", trained=True)
    search_cost: ClassVar[str] = "B H D (3 N + 4 K^2)"
    advice: ClassVar[str] = (
        "You can fine-tune, or have FastWan's weights; without training it is plain top-k by pooled scores."
    )
    requires: ClassVar[frozenset[str]] = frozenset({"hidden"})

    density: Density = 0.125
    tile: tuple[int, int, int] = (4, 4, 4)
    block: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_densities("vsa: density", self.density))
        TileLayout(Grid(t=1, h=1, w=1), tile=self.tile, block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """3-D tiles."""
        return TileLayout(grid, tile=self.tile, block=self.block)

    def build(self, site: Site) -> SparseAttention:
        """The module with its zero-initialised gate."""
        return VideoSparseAttention(self, site)

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """Pooling, scores and the coarse output."""
        tiles = layout.video_tiles
        return batch * site.heads * site.head_dim * (3.0 * layout.tokens + 4.0 * tiles * tiles)


class VideoSparseAttention(SparseAttention):
    """VSA at one site."""

    def __init__(self, method: VSA, site: Site) -> None:
        super().__init__(method, site)
        self.to_gate_compress = zero_linear(site.dim, site.heads * site.head_dim)

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Coarse scores, top-k tiles, exact attention inside them. aux: the coarse output ``[B, tiles, H, D]``."""
        rows, keys, layout = call.rows, call.blocking, call.layout
        packed = [rows.pack(x) for x in (q, k, v)]
        own, tiles = rows.tiles(), keys.tiles()
        q_mean, k_mean, v_mean = (ops.block_pool(x, own) for x in packed)
        k_mean, v_mean = call.all_blocks(torch.cat((k_mean, v_mean), -1)).chunk(2, -1)
        coarse, scores = recomputed(_coarse, q_mean, k_mean, v_mean, tiles.text, v.dtype)
        count = layout.video_tiles
        chosen = select.top_k(
            scores,
            own,
            tiles,
            count=call.budget(count),
            forced=select.forced_text(own, tiles),
            capacity=kept_blocks(self.peak_density, count) + tiles.blocks - count,
        )
        blocks = select.expand_tiles(chosen, rows, keys)
        self.tally(blocks, q.shape[0])
        return call.attend(q, k, v, blocks, packed=packed), (coarse,)

    def combine(self, fine: Tensor, aux: tuple[Tensor, ...], hidden: Tensor | None, call: Call) -> Tensor:
        """Add the gated coarse branch to the video tokens."""
        hidden = given_hidden(self.method.key, hidden)
        check_hidden(self.method.key, hidden, call)
        return added(fine, recomputed(self._branch, hidden, aux[0], call).to(fine.dtype), call)

    def _branch(self, hidden: Tensor, coarse: Tensor, call: Call) -> Tensor:
        """The gated coarse output of every video token, ``[B, video, H, D]``."""
        gate: Tensor = self.to_gate_compress(hidden).unflatten(-1, coarse.shape[2:])
        return gate * call.own_video(call.rows.tiles().expand(coarse))


def _coarse(q: Tensor, k: Tensor, v: Tensor, text: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention between means ``[B, K, H, D]``, over those of the video, in ``dtype``; and its scores, as constants."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    video = scores if text is None else torch.where(text, -torch.inf, scores)
    return torch.einsum("bhqk,bkhd->bqhd", video.softmax(-1), v).to(dtype), scores.detach()


def density_ramp(target: float, *, interval: int = 50, rate: float = 0.03) -> Callable[[int], float]:
    """Training schedule of the density: start dense, drop by ``rate`` every ``interval`` training steps.

    Args:
        target: Final density. interval: training steps between drops (50 for 1.3B, 30 for 14B in FastVideo).
        rate: Density taken away per drop.

    Returns:
        A function for ``Schedule(ramp=...)``. Differs from FastVideo: the number of drops is an integer and the last
        one lands on ``target`` exactly (their float floor division stops at 0.22 for a target of 0.2).
    """
    check_density("density_ramp: target", target)
    if interval < 1 or not 0.0 < rate <= 1.0:
        raise ValueError(f"density_ramp: interval must be >= 1 and rate in (0, 1], got {interval!r} and {rate!r}")
    return functools.partial(_ramp, target=target, interval=interval, rate=rate)


def _ramp(step: int, *, target: float, interval: int, rate: float) -> float:
    return max(target, round(1.0 - (step // interval) * rate, 12))
