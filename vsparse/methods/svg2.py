"""SVG2: tokens are sorted by cluster, and clusters of queries keep the clusters of keys that hold most of the mass."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import Blocking, ClusterLayout, Layout, arrange
from vsparse.methods import chance
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention, greatest_density
from vsparse.methods.budgets import check_density
from vsparse.reference import statistics_dtype
from vsparse.schedule import Phase, Schedule

__all__ = ["SVG2", "SVG2Attention"]


@dc.dataclass(frozen=True, kw_only=True)
class SVG2(Method):
    """Sparse VideoGen2 (arXiv 2505.18875, section 4): semantic-aware permutation.

    The video's queries and keys of every head are clustered by k-means. With sizes ``|K_j|`` and centroids c, a query
    cluster keeps the key clusters with the largest ``|K_j| exp(c_i . c_j / sqrt(D))`` until they hold ``mass`` of the
    row, the one that crosses it included, and at least ``least`` of all clusters. Attention inside what is kept is
    exact, over blocks as large as the clusters are.

    Args:
        mass: Share of the estimated attention to keep. Published: 0.9.
        query_clusters, key_clusters: How many (a video of fewer tokens has one for each). Published: 100 and 500
            (paper); 300 and 1000 (scripts, Wan at 720p), 200 queries at 480p, 400 for HunyuanVideo.
        least: Share of the key clusters that a row keeps in any case (scripts: 0.1).
        first_iterations, iterations: Of k-means: from random tokens at first, then from the last step's centroids.
        seed: Of the tokens that are the first centroids.

    Schedule: the first 20 % of the steps and the first layer dense (scripts, Wan; HunyuanVideo 10 %, the paper 30 %).
    Joint text is always attended and its rows are full; only valid text counts.

    Differs from the released code: any batch; centroids are kept by sample, head and CFG branch, and dropped with their
    generation; a cluster that runs empty keeps its centroid and takes part again when a token comes near it; the first
    centroids are tokens from all parts of the video, drawn privately.
    """

    key: ClassVar[str] = "svg2"
    paper: ClassVar[Paper] = Paper(title="SVG2: Sparse VideoGen2", arxiv="2505.18875", trained=False)
    search_cost: ClassVar[str] = "2 B H D (2 V (Q + K) iterations + Q K)"
    advice: ClassVar[str] = (
        "No training, and what belongs together is scattered over the video; wants a kernel that gathers ragged blocks."
    )
    default_schedule: ClassVar[Schedule] = Schedule(dense_steps=0.2, dense_layers=1)
    state_phases: ClassVar[frozenset[str]] = frozenset({"search", "refresh"})

    mass: float = 0.9
    query_clusters: int = 300
    key_clusters: int = 1000
    least: float = 0.1
    first_iterations: int = 50
    iterations: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_density("svg2: mass", self.mass)
        check_density("svg2: least", self.least)
        for name in ("query_clusters", "key_clusters", "first_iterations", "iterations", "seed"):
            value = getattr(self, name)
            low = 0 if name == "seed" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"svg2: {name} must be an integer >= {low}, got {value!r}")

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Clusters, of queries and of keys."""
        return ClusterLayout(grid, clusters=self.key_clusters, query_clusters=self.query_clusters)

    def phase(
        self,
        schedule: Schedule,
        *,
        step: int | None,
        steps: int | None,
        layer: int,
        filled: bool,
        stamp: int | None = None,
    ) -> Phase:
        """A search that finds centroids of the same generation goes on from them: a refresh."""
        found = super().phase(schedule, step=step, steps=steps, layer=layer, filled=filled, stamp=stamp)
        return "refresh" if found == "search" and filled and step is not None else found

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """As if clusters were equal, and as many of them kept as hold ``mass`` at most: unequal ones may hold more."""
        clusters = layout.video_tiles
        count = max(kept_blocks(self.least, clusters), select.top_p_capacity(self.mass, clusters))
        return greatest_density(layout, count)

    def state(
        self, layout: Layout, site: Site, batch: int, dtype: torch.dtype
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """The centroids of both sides."""
        sizes = {"q_centroids": self.query_clusters, "k_centroids": self.key_clusters}
        video = layout.grid.video
        return {name: ((batch, site.heads, min(n, video), site.head_dim), torch.float32) for name, n in sizes.items()}

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """k-means (a distance and a sum for each token and centroid) and the centroid scores."""
        turns = {"search": self.first_iterations, "refresh": self.iterations}.get(phase, 1)
        q, k = (min(n, layout.grid.video) for n in (self.query_clusters, self.key_clusters))
        return 2.0 * batch * site.heads * site.head_dim * (2.0 * layout.grid.video * (q + k) * turns + q * k)

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        return SVG2Attention(self, site)


class SVG2Attention(SparseAttention):
    """SVG2 at one site."""

    method: SVG2
    salt: Tensor

    def __init__(self, method: SVG2, site: Site) -> None:
        super().__init__(method, site)
        self.register_buffer("salt", chance.salt(method.seed, site.layer), persistent=False)

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Cluster queries and keys, sort by cluster, choose pairs of clusters, attend."""
        assert call.layout.queries is not None
        q_side, q_means = self._clusters("q_centroids", q, call.layout.queries, call)
        k_side, k_means = self._clusters("k_centroids", k, call.layout, call)
        blocks = self._choose(q_side, q_means, k_side, k_means, call.grid)
        self.tally(blocks, q.shape[0])
        out, _ = ops.block_sparse_attention(q_side.pack(q), k_side.pack(k), k_side.pack(v), blocks)
        return q_side.unpack(out), ()

    def _clusters(self, name: str, x: Tensor, layout: Layout, call: Call) -> tuple[Blocking, Tensor]:
        """The blocking of one side by cluster, and the centroids ``[B, H, clusters, D]``."""
        grid, method = call.grid, self.method
        video = x.detach()[:, grid.text_before : grid.text_before + grid.video]
        if self.phase == "search":
            token = chance.spread(layout.video_tiles, grid.video, salt=self.salt, step=call.step)
            first = video.index_select(1, token)
            start, turns = first.transpose(1, 2).to(statistics_dtype(x.dtype)), method.first_iterations
        else:
            start, turns = self.state.read(name), method.iterations if self.phase == "refresh" else 0
        labels, means = ops.cluster_tokens(video, start, iterations=turns)
        if turns:
            self.state.stage(name, means)
        return arrange(layout, labels, call.text_length), means

    def _choose(self, q: Blocking, q_means: Tensor, k: Blocking, k_means: Tensor, grid: Grid) -> BlockMap:
        """Top-p of the size-weighted scores of the centroids, all text besides."""
        before, after = int(grid.text_before > 0), int(grid.text_after > 0)
        size = k.length[..., before : k.blocks - after]
        scores = q_means @ k_means.transpose(-1, -2) * q_means.shape[-1] ** -0.5
        share = (scores + size[..., None, :].to(scores.dtype).log()).softmax(-1)
        return select.top_p(
            F.pad(share, (before, after, before, after)),
            q,
            k,
            mass=self.method.mass,
            include_crossing=True,
            least=kept_blocks(self.method.least, k_means.shape[2]),
            forced=select.forced_text(q, k),
        )
