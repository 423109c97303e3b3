"""SLA: exact attention in the critical blocks, linear attention beside it through a trained projection."""

from __future__ import annotations

import dataclasses as dc
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import Layout, RasterLayout
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention, added, applied, recomputed, zero_linear
from vsparse.methods.budgets import Density, check_densities
from vsparse.schedule import Phase

__all__ = ["SLA", "SLAAttention"]

Feature = Literal["softmax", "elu", "relu"]


@dc.dataclass(frozen=True, kw_only=True)
class SLA(Method):
    """Sparse-Linear Attention (arXiv 2509.24006, section 4).

    Every query block attends exactly to its best key blocks by pooled score; linear attention covers the rest of the
    video, and its output is added through one projection per layer that all heads share, zero at first: then the
    output equals the top-k model, and with ``density=1`` the host.

    Args:
        density: Share of the video key blocks that are critical. Released code: 0.1 to 0.2, recommended 0.15; paper:
            0.05. A tuple has one number per head.
        linear: What the linear branch covers. "all": every video key, the critical ones included (released code).
            "marginal": what is neither critical nor negligible (paper).
        negligible: Share of the video key blocks, the worst ones, that both branches leave out; "marginal" only.
        feature: Feature map of the linear branch, "softmax" over the head dimension (best in the paper), "elu" (plus
            one) or "relu".
        block: Slots of a block.

    Scores are plain products of the means: a softmax of them, or keys without their mean, rank alike.

    Differs from the released code: at least one block is critical, however short the video (there ``int(density K)``
    may be 0); the denominator is not padded by 1e-5 but guarded where it is 0; rows are never filled up to the longest
    one. Joint text is always attended, exempt from the budget, and takes no part in the linear branch.
    """

    key: ClassVar[str] = "sla"
    paper: ClassVar[Paper] = Paper(title="SLA: sparse-linear attention", arxiv="2509.24006", trained=True)
    search_cost: ClassVar[str] = "B H D (2 N + 2 K^2 + 4 V D)"
    advice: ClassVar[str] = (
        "You can fine-tune and want very few blocks: the linear branch carries what the few exact blocks leave out."
    )

    density: Density = 0.15
    linear: Literal["all", "marginal"] = "all"
    negligible: float = 0.1
    feature: Feature = "softmax"
    block: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_densities("sla: density", self.density))
        if self.linear not in ("all", "marginal"):
            raise ValueError(f'sla: linear must be "all" or "marginal", got {self.linear!r}')
        if self.feature not in get_args(Feature):
            raise ValueError(f"sla: feature must be one of {', '.join(get_args(Feature))}, got {self.feature!r}")
        value = self.negligible
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
            raise ValueError(f"sla: negligible must be a number in [0, 1), got {value!r}")
        RasterLayout(Grid(t=1, h=1, w=1), block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Host order in blocks; text starts a block of its own."""
        return RasterLayout(grid, block=self.block)

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """Pooling, scores and the linear branch."""
        video, width = layout.video_tiles, site.head_dim
        linear = 4.0 * layout.grid.video * width
        if self.linear == "marginal":
            linear += 2.0 * video * video * width
        return batch * site.heads * width * (2.0 * layout.tokens + 2.0 * video * video + linear)

    def build(self, site: Site) -> SparseAttention:
        """The module with its zero-initialised projection."""
        return SLAAttention(self, site)


class SLAAttention(SparseAttention):
    """SLA at one site."""

    aux = "tokens"
    method: SLA

    def __init__(self, method: SLA, site: Site) -> None:
        super().__init__(method, site)
        self.to_linear = zero_linear(site.head_dim, site.head_dim)

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Critical blocks, exact attention in them. aux: the projected linear branch, ``[B, video, H, D]``."""
        rows, video = call.rows, call.video
        packed = [rows.pack(x.detach()) for x in (q, k, v)]
        q_mean, k_mean = (ops.block_pool(x, rows) for x in packed[:2])
        scores = torch.einsum("bqhd,bkhd->bhqk", q_mean, call.all_blocks(k_mean))
        blocks = self._critical(scores, call)
        self.tally(blocks, q.shape[0])
        out = call.attend(q, k, v, blocks, packed=packed)
        if self.method.linear == "all":
            linear = recomputed(self._linear, q[:, video], k[:, video], v[:, video], call)
        else:
            linear = recomputed(self._linear_beside, q, k, v, self._marginal(scores, blocks), call)[:, video]
        return out, (linear,)

    def combine(self, fine: Tensor, aux: tuple[Tensor, ...], hidden: Tensor | None, call: Call) -> Tensor:
        """Add the projected linear branch to the video tokens."""
        return added(fine, aux[0], call)

    def _critical(self, scores: Tensor, call: Call) -> BlockMap:
        rows, blocking, video = call.rows, call.blocking, call.layout.video_tiles
        return select.top_k(
            scores,
            rows,
            blocking,
            count=call.budget(video),
            forced=select.forced_text(rows, blocking),
            capacity=kept_blocks(self.peak_density, video) + blocking.blocks - video,
        )

    def _marginal(self, scores: Tensor, critical: BlockMap) -> BlockMap:
        """Video blocks that are neither critical nor among the worst."""
        rows, blocking = critical.q, critical.k
        video = blocking.layout.video_tiles  # type: ignore[union-attr]
        worst = int(self.method.negligible * video)
        out = critical.to_mask() | (blocking.length == 0)[:, :, None]
        if blocking.text is not None and rows.text is not None:
            out = out | blocking.text | rows.text[:, None]
        if worst:
            last = torch.where(out, torch.inf, scores).topk(worst, -1, largest=False).indices
            out = out.scatter(-1, last, True)
        return BlockMap.from_mask(~out, rows, blocking)

    def _linear(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Projected linear attention of all tokens ``[B, N, H, D]`` in the dtype of v; 0 where the denominator is."""
        q, k = self._feature(q), self._feature(k)
        state = call.over_shards(torch.einsum("bnhd,bnhe->bhde", k, F.pad(v.to(k.dtype), (0, 1), value=1.0)))
        parts = torch.einsum("bnhd,bhde->bnhe", q, state)
        total = parts[..., -1:]
        found = torch.where(total > 0, parts[..., :-1] / torch.where(total > 0, total, 1), 0)
        return applied(self.to_linear, found, v.dtype).to(v.dtype)

    def _linear_beside(self, q: Tensor, k: Tensor, v: Tensor, rest: BlockMap, call: Call) -> Tensor:
        """Projected linear attention over the blocks of a map, in the order of q and in the dtype of v."""
        rows, dtype = call.rows, v.dtype
        q, k = rows.pack(self._feature(q)), rows.pack(self._feature(k))
        k, values = call.all_slots(k), call.all_slots(rows.pack(v).to(q.dtype))
        found = rows.unpack(ops.block_linear_attention(q, k, values, rest))
        return applied(self.to_linear, found, dtype).to(dtype)

    def _feature(self, x: Tensor) -> Tensor:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        if self.method.feature == "softmax":
            return wide.softmax(-1)
        return F.elu(wide) + 1.0 if self.method.feature == "elu" else wide.relu()
