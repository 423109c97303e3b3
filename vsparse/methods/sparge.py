"""SpargeAttn: mean-pooled prediction, trusted only where a block's tokens resemble each other."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import CurveLayout, Layout, RasterLayout
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention, greatest_density
from vsparse.methods.budgets import Density, check_densities, check_density, each
from vsparse.parallel.share import Share
from vsparse.schedule import Phase

__all__ = ["SpargeAttention", "SpargeAttn"]

PerHead = float | tuple[float, ...]
_ORDERS: dict[str, type[RasterLayout] | type[CurveLayout]] = {"raster": RasterLayout, "hilbert": CurveLayout}


@dc.dataclass(frozen=True, kw_only=True)
class SpargeAttn(Method):
    """SpargeAttn (arXiv 2502.18137, section 3): training-free, any model.

    Queries and keys are averaged over blocks. A block whose tokens do not resemble each other (mean pairwise cosine
    below ``similarity``) has no mean to speak of: such a key block is kept by every row and leaves the softmax, such a
    query block keeps everything. Of the softmax over the other key blocks a row keeps the best.

    Args:
        select: "mass": the best until they hold ``mass`` of the softmax, the one that would cross it left out, at least
            one. "density": the best ``density`` of the video blocks.
        mass: Share of the softmax in (0, 1], a number or a tuple with one per head, as `tune` finds them.
        density: Share of the video blocks that a row chooses, for ``select="density"``; a tuple has one number per
            head.
        similarity: Least mean cosine of a block that is trusted, a number or a tuple with one per head; 0 and below
            trust all. None: as published, 0.6 for "mass" and -0.1 for "density".
        smooth_keys: Predict with ``k`` less the mean of all valid keys. It changes no softmax, but the similarities,
            which a common offset of all keys would lift.
        sink: Every row keeps the first video block.
        skip_threshold: Leave ``P V`` of a kept block out when all its logits lie this far (natural log, positive) below
            the running maximum; the released default, 50, is off in effect. None: off. Has no gradient.
        order: "raster", the order of the host, as in the released code, or "hilbert", along a curve through the video,
            by which neighbours in space and time share a block: sparsity 0.392 instead of 0.363 in the paper.
        block: Slots of a block, of queries and of keys.

    Differs from the released code: blocks of 64 x 64 instead of 128 x 64; no INT8 or FP8; zero vectors count as
    dissimilar instead of 0/0; "density" rounds up; ``skip_threshold`` is one number for all heads and applies to a
    whole block instead of the rows of a warp; joint text is always attended, its rows are full, and it takes no part in
    the pooled softmax, but in the mean that is taken off the keys.
    """

    key: ClassVar[str] = "sparge"
    paper: ClassVar[Paper] = Paper(title="SpargeAttn", arxiv="2502.18137", trained=False)
    search_cost: ClassVar[str] = "B H D (8 N + 2 K^2)"
    advice: ClassVar[str] = (
        "No training, any model, and caution before speed: what the means cannot judge is computed in full."
    )

    select: Literal["mass", "density"] = "mass"
    mass: PerHead = 0.98
    density: Density = 0.5
    similarity: PerHead | None = None
    smooth_keys: bool = True
    sink: bool = False
    skip_threshold: float | None = None
    order: Literal["raster", "hilbert"] = "raster"
    block: int = 64

    def __post_init__(self) -> None:
        if self.select not in ("mass", "density"):
            raise ValueError(f'sparge: select must be "mass" or "density", got {self.select!r}')
        object.__setattr__(self, "density", check_densities("sparge: density", self.density))
        for name in ("mass", "similarity"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for value in _each("mass", self.mass):
            check_density("sparge: mass", value)
        for value in _each("similarity", self.least_similarity):
            if not _number(value) or not -1.0 <= value <= 1.0:
                raise ValueError(f"sparge: similarity must be a number in [-1, 1] or None, got {value!r}")
        for name in ("smooth_keys", "sink"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"sparge: {name} must be True or False, got {getattr(self, name)!r}")
        if self.skip_threshold is not None and not (_number(self.skip_threshold) and self.skip_threshold >= 0.0):
            raise ValueError(
                f"sparge: skip_threshold must be one number >= 0 for all heads or None (off), "
                f"got {self.skip_threshold!r}"
            )
        if self.order not in _ORDERS:
            raise ValueError(f'sparge: order must be "raster" or "hilbert", got {self.order!r}')
        _ORDERS[self.order](Grid(t=1, h=1, w=1), block=self.block)

    @property
    def least_similarity(self) -> PerHead:
        """``similarity``, the published default of the form filled in."""
        published = 0.6 if self.select == "mass" else -0.1
        return published if self.similarity is None else self.similarity

    @property
    def guarded(self) -> bool:
        """Whether any block can be found dissimilar: a mean pairwise cosine is never below 0."""
        return max(_each("similarity", self.least_similarity)) > 0.0

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Blocks of consecutive tokens in the chosen order; text starts a block of its own."""
        return _ORDERS[self.order](grid, block=self.block)

    def call_density(self) -> Density:
        """The density of the form that has one."""
        return self.density if self.select == "density" else 1.0

    def kernel_options(self) -> Mapping[str, Any]:
        """``skip_threshold``, which not every implementation takes."""
        return {"skip_threshold": self.skip_threshold}

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """An upper bound where every block is trusted: ``mass`` or ``density`` of the blocks, and the sink."""
        shares = _each("mass", self.mass) if self.select == "mass" else each(self.density)
        counts = (kept_blocks(share, layout.video_tiles) + self.sink for share in shares)
        return sum(greatest_density(layout, count) for count in counts) / len(shares)

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """Pooling with similarities, smoothing, and the pooled scores."""
        pooling = (8.0 if self.smooth_keys else 6.0) * layout.tokens
        return batch * site.heads * site.head_dim * (pooling + 2.0 * layout.video_tiles**2)

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        for name in ("mass", "similarity"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != site.heads:
                raise ValueError(f"sparge: {len(value)} values of {name} for {site.name}, which has {site.heads} heads")
        return SpargeAttention(self, site)


class SpargeAttention(SparseAttention):
    """SpargeAttn at one site."""

    method: SpargeAttn

    def __init__(self, method: SpargeAttn, site: Site) -> None:
        super().__init__(method, site)
        # One number per head stays on the device, as the bits of a float64: a cast of the host must not round it.
        for name in ("mass", "similarity"):
            value = getattr(method, name)
            bits = torch.tensor(value, dtype=torch.float64).view(torch.int64) if isinstance(value, tuple) else None
            self.register_buffer(f"{name}_bits", bits, persistent=False)

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pooled prediction, guard, selection, exact attention in what is kept."""
        packed = [call.rows.pack(x.detach()) for x in (q, k, v)]
        blocks = self.choose(packed[0], packed[1], call)
        self.tally(blocks, q.shape[0])
        return call.attend(q, k, v, blocks, packed=packed, skip_threshold=self.method.skip_threshold), ()

    def choose(self, q: Tensor, k: Tensor, call: Call) -> BlockMap:
        """The map of packed queries and keys ``[B, S, H, D]``."""
        method, rows, blocking, share = self.method, call.rows, call.blocking, call.share
        q_mean, q_alike = ops.block_pool(q, rows, self_similarity=True)
        k_mean, k_alike = ops.block_pool(_smooth(k, call) if method.smooth_keys else k, rows, self_similarity=True)
        k_mean, k_alike = call.all_blocks(k_mean), call.all_blocks(k_alike)
        forced = torch.zeros(1, 1, 1, blocking.blocks, dtype=torch.bool, device=q.device)
        if method.guarded:
            least = self._per_head("similarity", method.least_similarity, share)
            forced = (q_alike < least).transpose(1, 2)[..., None] | (k_alike < least).transpose(1, 2)[:, :, None]
            free = ~(k_alike < least).transpose(1, 2)[:, :, None]
        else:
            free = ~forced
        text = blocking.text
        if text is not None:
            free = free & ~text
            assert rows.text is not None
            forced = forced | rows.text[:, None] | text
        if method.sink:
            video = torch.ones_like(forced[0, 0, 0]) if text is None else ~text
            forced = forced | (video & (video.cumsum(0) == 1))
        scores = torch.einsum("bqhd,bkhd->bhqk", q_mean, k_mean) * q.shape[-1] ** -0.5
        scores = torch.where(free, scores, -torch.inf)
        forced = forced.expand(*forced.shape[:2], rows.blocks, -1)
        if method.select == "mass":
            # A row without a free block is NaN after the softmax; all its blocks are forced.
            weights = torch.where(free, scores.softmax(-1), 0)
            mass = self._per_head("mass", method.mass, share)
            limit = mass[None, :, None] if isinstance(mass, Tensor) else mass
            return select.top_p(
                weights, rows, blocking, mass=limit, include_crossing=False, forced=forced, forced_budget="join"
            )
        video_blocks = blocking.layout.video_tiles  # type: ignore[union-attr]
        most = kept_blocks(self.peak_density, video_blocks) + method.sink + blocking.blocks - video_blocks
        return select.top_k(
            scores,
            rows,
            blocking,
            count=call.budget(video_blocks),
            forced=forced,
            forced_budget="join",
            capacity=blocking.blocks if method.guarded else most,
        )

    def _per_head(self, name: str, value: PerHead, share: Share) -> Tensor | float:
        """The number, or the numbers of the heads ``[H]`` in float64."""
        bits = getattr(self, f"{name}_bits")
        if bits is None:
            assert not isinstance(value, tuple)
            return value
        return share.own_heads(bits.view(torch.float64), 0)


def _smooth(k: Tensor, call: Call) -> Tensor:
    """``k`` less the mean over its valid slots; packed slots that are not valid hold zeros before and are not read."""
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    valid = call.blocking.length.sum(-1)[:, None, :, None]
    return k - (call.all_sum(k, wide) / valid).to(k.dtype)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _each(name: str, value: PerHead) -> tuple[float, ...]:
    """The numbers, one or as many as heads."""
    if isinstance(value, tuple) and not value:
        raise ValueError(f"sparge: {name} must be a number or a tuple with one per head, got {value!r}")
    return value if isinstance(value, tuple) else (value,)
