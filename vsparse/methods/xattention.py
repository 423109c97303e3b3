"""XAttention: block importance from the sums along the antidiagonals of the attention map."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import ClassVar

import torch
from torch import Tensor

from vsparse import select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Blocking, Layout, RasterLayout
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention, greatest_density
from vsparse.methods.budgets import check_density
from vsparse.reference import statistics_dtype
from vsparse.schedule import Phase, Schedule

__all__ = ["AntidiagonalAttention", "XAttention", "antidiagonal_mass"]

# Entries of the coarse attention map that are held at a time.
_ROOM = 2**27


@dc.dataclass(frozen=True, kw_only=True)
class XAttention(Method):
    """XAttention (arXiv 2503.16428, section 2): training-free, antidiagonal scoring.

    The sequence is folded: ``stride`` consecutive tokens become one long vector, those of a query in reverse, so that
    the product of two folds is the sum of an antidiagonal of their tile. Of the softmax of these sums, added up per
    block pair, every query block keeps the best key blocks until they hold ``mass`` of it, the one that crosses it
    included.

    Args:
        mass: Share to keep. Default 0.9; the paper uses 0.9 and 0.95 for HunyuanVideo.
        stride: Tokens of a fold. Default 8, as for HunyuanVideo (16 for language models).
        block: Slots of a block, a multiple of ``stride``.

    Schedule: the first 5 of 50 steps are dense. The search costs ``1 / stride`` of the logits of dense attention in
    FLOPs. It goes through the coarse map by query blocks, at most 2**27 entries (but a whole query block) at a time:
    0.5 GiB in float32 for each of the two or three forms that are alive at once. Folding copies q and k.

    Differs from the released code: a fold of padding takes no share of the softmax (the short fold at the end of a
    segment does, and sums the terms that it has); block 0 is kept only when it is chosen; any
    batch; joint text is always attended, its rows are full, and it takes no part in the softmax.
    """

    key: ClassVar[str] = "xattention"
    paper: ClassVar[Paper] = Paper(title="XAttention: antidiagonal scoring", arxiv="2503.16428", trained=False)
    search_cost: ClassVar[str] = "2 B H D S^2 / stride"
    advice: ClassVar[str] = (
        "Means hide what matters (thin stripes, single tokens): it samples logits instead, for 1 / "
        "stride of their cost."
    )
    default_schedule: ClassVar[Schedule] = Schedule(dense_steps=0.1)

    mass: float = 0.9
    stride: int = 8
    block: int = 128

    def __post_init__(self) -> None:
        check_density("xattention: mass", self.mass)
        RasterLayout(Grid(t=1, h=1, w=1), block=self.block)
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"xattention: stride must be a positive integer, got {self.stride!r}")
        if self.block % self.stride:
            raise ValueError(
                f"xattention: block must be a multiple of stride, got block={self.block} and stride={self.stride}"
            )

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Host order in blocks; text starts a block of its own."""
        return RasterLayout(grid, block=self.block)

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """An upper bound, as the map depends on the data: as many blocks as hold ``mass`` at most."""
        return greatest_density(layout, select.top_p_capacity(self.mass, layout.video_tiles))

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """The products of all folds."""
        return 2.0 * batch * site.heads * site.head_dim * layout.slots**2 / self.stride

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        return AntidiagonalAttention(self, site)


class AntidiagonalAttention(SparseAttention):
    """XAttention at one site."""

    method: XAttention

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Antidiagonal mass, top-p, exact attention in what is kept."""
        packed = [call.rows.pack(x.detach()) for x in (q, k, v)]
        blocks = self._choose(packed[0], packed[1], call)
        self.tally(blocks, q.shape[0])
        return call.attend(q, k, v, blocks, packed=packed), ()

    def _choose(self, q: Tensor, k: Tensor, call: Call) -> BlockMap:
        rows, blocking, mass = call.rows, call.blocking, self.method.mass
        video = call.layout.video_tiles
        return select.top_p(
            # It reads every key, so those of other processes come whole.
            antidiagonal_mass(q, call.all_slots(k), blocking, self.method.stride, rows),
            rows,
            blocking,
            mass=mass,
            include_crossing=True,
            forced=select.forced_text(rows, blocking),
            capacity=select.top_p_capacity(mass, video) + blocking.blocks - video,
        )


def antidiagonal_mass(q: Tensor, k: Tensor, blocking: Blocking, stride: int, rows: Blocking | None = None) -> Tensor:
    """How much of the softmax over the folded video keys lands in each block pair.

    Args:
        q, k: ``[B, S, H, D]`` in block order, zero where there is no token.
        blocking: Of the keys; its blocks are a multiple of ``stride``. A fold without a token and the folds of text
            take no part.
        stride: Tokens of a fold. The logit of two folds is the sum of their antidiagonal, ``sum_s q[stride - 1 - s] .
            k[s]``, over ``stride * sqrt(D)``.
        rows: Of the queries; None: the same.

    Returns:
        ``[B, H, Q, K]`` float32 (float64 for float64 input).
    """
    batch, _, heads, width = q.shape
    folds = blocking.block // stride
    columns = blocking.blocks * folds
    first = torch.arange(0, blocking.block, stride, device=q.device)
    # Folds that hold a token, by block: [B|1, H|1, K, folds].
    rows = blocking if rows is None else rows
    valid, asked = (_video(side, first) for side in (blocking, rows))
    # The power of two in the scale is taken off before the product, exactly: sums of many terms overflow float16.
    scale = width**-0.5 / stride
    early = 2.0 ** math.floor(math.log2(scale))
    q_fold = (q * early).unflatten(1, (-1, stride)).flip(2).permute(0, 3, 1, 2, 4).flatten(3)
    k_fold = k.unflatten(1, (-1, stride)).permute(0, 3, 1, 2, 4).flatten(3).transpose(-1, -2)
    chunk = max(1, _ROOM // (batch * heads * folds * columns))
    found = []
    for low in range(0, rows.blocks, chunk):
        high = min(low + chunk, rows.blocks)
        logits = (q_fold[:, :, low * folds : high * folds] @ k_fold).to(statistics_dtype(q.dtype))
        logits = torch.where(valid.flatten(2)[:, :, None], logits * (scale / early), -torch.inf)
        by_key = logits.softmax(-1).unflatten(-1, (blocking.blocks, folds)).sum(-1)
        by_key = by_key.unflatten(2, (high - low, folds))
        found.append(torch.where(asked[:, :, low:high, :, None], by_key, 0).sum(3))
    return torch.cat(found, 2)


def _video(side: Blocking, first: Tensor) -> Tensor:
    """``[B|1, H|1, K, folds]`` bool: folds that begin before the last token of a block of the video."""
    valid = first < side.length[..., None]
    return valid if side.text is None else valid & ~side.text[:, None]
