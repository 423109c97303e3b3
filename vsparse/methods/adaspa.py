"""AdaSpa: block patterns found online from the exact block mass, with cached LSE and per-head budgets."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import Blocking, Layout, RasterLayout
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention
from vsparse.methods.budgets import Density, check_densities, check_density
from vsparse.schedule import Phase, Schedule

__all__ = ["AdaSpa", "AdaSpaAttention", "head_densities"]


@dc.dataclass(frozen=True, kw_only=True)
class AdaSpa(Method):
    """AdaSpa (arXiv 2502.21079, sections 4.1-4.3): training-free, precise online search.

    At a few steps the exact share of the softmax that falls on each pair of blocks is computed, and every query block
    keeps its best key blocks until the next search. Heads whose blocks catch much give budget to heads that catch
    little.

    Args:
        density: Share of the video key blocks that a query block keeps on average; a tuple has one number per head.
            Published sparsity 0.8.
        block: Slots of a block.
        head_adaptive: Give heads of high recall half the density and as many of low recall the difference.
        recall: Recall above which a head may give density away.
        share_branches: The CFG branches of a sample use one map and half the state: the first call of a step searches
            for both. Measured on the embedded tiny Wan at density 0.25, two seeds, PSNR against dense: 26.2 and 24.1 dB
            with a map for each branch, 26.5 and 24.8 dB with one.

    Schedule: the first 20 % of the steps run dense, the last of them searches (its output is dense); at 60 % the map is
    searched again with the cached LSE. The paper's steps 10 and 30 of 50, as shares. Text rows and text keys are always
    computed, on top of the budget. Differs from the paper: at most half of the heads are lowered and as many raised, so
    that the mean density holds when most heads pass the recall; mass and output are normalised (not in the listing).
    """

    key: ClassVar[str] = "adaspa"
    paper: ClassVar[Paper] = Paper(title="AdaSpa: adaptive sparse attention", arxiv="2502.21079", trained=False)
    search_cost: ClassVar[str] = "2 B H D N^2"
    advice: ClassVar[str] = (
        "No training, many steps (about 50), and maps that move little between them: its two exact "
        "searches pay off then."
    )
    default_schedule: ClassVar[Schedule] = Schedule(dense_steps=0.2, search_at=(0.2, 0.6))
    state_phases: ClassVar[frozenset[str]] = frozenset({"search", "refresh"})
    exact_phases: ClassVar[frozenset[str]] = frozenset({"dense", "search"})

    density: Density = 0.2
    block: int = 64
    head_adaptive: bool = True
    recall: float = 0.8
    share_branches: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_densities("adaspa: density", self.density))
        check_density("adaspa: recall", self.recall)
        if isinstance(self.density, tuple) and self.head_adaptive:
            raise ValueError(
                "adaspa: with a density for each head nothing is left to adapt: give head_adaptive=False, too, or one "
                f"density; got {self.density!r}"
            )
        RasterLayout(Grid(t=1, h=1, w=1), block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Host order in blocks; text starts a block of its own."""
        return RasterLayout(grid, block=self.block)

    def state(
        self, layout: Layout, site: Site, batch: int, dtype: torch.dtype
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """LSE of every query slot and one bit per block pair."""
        return {
            "lse": ((batch, layout.slots, site.heads), torch.float32),
            "bits": ((batch, site.heads, layout.blocks, math.ceil(layout.blocks / 8)), torch.uint8),
        }

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """One more product of all queries and keys in a search."""
        return 2.0 * batch * site.heads * site.head_dim * layout.tokens**2 if phase in self.state_phases else 0.0

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        return AdaSpaAttention(self, site)


class AdaSpaAttention(SparseAttention):
    """AdaSpa at one site."""

    method: AdaSpa

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Search, search with the cached LSE, or reuse, by phase."""
        rows, blocking = call.rows, call.blocking
        packed = [rows.pack(x) for x in (q, k, v)]
        if self.phase == "search":
            fine, lse, mass = self._search(packed[0], packed[1], packed[2], call)
            self.state.stage("lse", lse)
            self.state.stage("bits", self._choose(mass, call).to_bits())
            self.tally(BlockMap.full(rows, blocking), q.shape[0])
            return fine, ()
        if self.phase == "refresh":
            # A search reads every key, so those of other processes come whole.
            mass = ops.block_mass(packed[0], call.all_slots(packed[1]), self.state.read("lse"), rows, blocking)
            blocks = self._choose(mass, call)
            self.state.stage("bits", blocks.to_bits())
        else:
            blocks = BlockMap.from_bits(self.state.read("bits"), rows, blocking, capacity=self._capacity(blocking))
        self.tally(blocks, q.shape[0])
        return call.attend(q, k, v, blocks, packed=packed), ()

    def _search(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Exact attention in the order of the host, its LSE, and the mass of every block."""
        rows, blocking = call.rows, call.blocking
        if rows is blocking:
            out, lse, mass = ops.search_attention(q, k, v, blocking)
        else:
            k, v = call.all_slots(torch.cat((k, v), -1)).chunk(2, -1)
            out, lse = ops.block_sparse_attention(q, k, v, BlockMap.full(rows, blocking))
            mass = ops.block_mass(q, k, lse, rows, blocking)
        return rows.unpack(out), lse, mass

    def _capacity(self, blocking: Blocking) -> int:
        video, most = blocking.layout.video_tiles, self.peak_density  # type: ignore[union-attr]
        spread = min(most / 2, 1.0 - most) if self.method.head_adaptive else 0.0
        return kept_blocks(most + spread, video) + blocking.blocks - video

    def _choose(self, mass: Tensor, call: Call) -> BlockMap:
        """Row-uniform top-k of the mass with a budget per head."""
        method, rows, blocking, share = self.method, call.rows, call.blocking, call.share
        video = blocking.layout.video_tiles  # type: ignore[union-attr]
        forced = select.forced_text(rows, blocking)
        count = call.budget(video)
        if method.head_adaptive:
            base = select.top_k(mass, rows, blocking, count=count, forced=forced)
            kept = call.over_shards(_masses(mass, base)).unbind(-1)
            recall = share.all_heads(kept[0] / kept[1], 1)  # heads are ranked among all of the layer
            density = share.own_heads(head_densities(recall, call.density, method.recall), 1)
            count = select.budget(density, video)[..., None]
        return select.top_k(mass, rows, blocking, count=count, forced=forced, capacity=self._capacity(blocking))


def _masses(mass: Tensor, blocks: BlockMap) -> Tensor:
    """``[B, H, 2]``: the mass of the video rows that the map keeps, and all of it."""
    text = blocks.q.text
    if text is not None:
        mass = torch.where(text[:, None], 0, mass)
    return torch.stack([torch.where(blocks.to_mask(), mass, 0).sum((-1, -2)), mass.sum((-1, -2))], -1)


def head_densities(recall: Tensor, density: Tensor, level: float) -> Tensor:
    """Density of each head: the n best recalled heads give half of theirs, where there is room, to the n worst.

    Args:
        recall: ``[B, H]`` float. density: 0-d float64, the mean. level: a head counts towards n when its recall exceeds
            it.

    Returns:
        ``[B, H]`` float64 with mean ``density``. n is at most ``H // 2``; of equal recalls the lower head is better.
    """
    heads = recall.shape[-1]
    givers = (recall > level).sum(-1, keepdim=True).clamp_max(heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    shift = (rank >= heads - givers).double() - (rank < givers).double()
    return density + (density / 2).minimum(1.0 - density) * shift
