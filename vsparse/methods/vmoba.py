"""VMoBA: every token chooses chunks of the video; the partition into chunks cycles with the layer."""

from __future__ import annotations

import dataclasses as dc
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vsparse import ops
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Blocking, Layout, PartitionLayout
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention, predict_density
from vsparse.methods.budgets import check_density
from vsparse.parallel.share import ALL, Share
from vsparse.schedule import Phase, Schedule

__all__ = ["VMoBA", "VMoBAAttention", "gate_threshold", "gate_top_k"]

Scope = Literal["query_head", "block", "head_global", "overall"]
_WHOLE = 1 << 30


@dc.dataclass(frozen=True, kw_only=True)
class VMoBA(Method):
    """Video Mixture of Block Attention (arXiv 2506.23858, section 3).

    Layer ``l`` partitions the video by ``l % 3``: frames (1-D), patches over all frames (2-D), cubes (3-D). A token
    attends to its own chunk and to the chunks whose mean key fits its query best (unscaled ``q . mean(k)``).

    Args:
        frames: Latent frames of a 1-D chunk. patch: rows and columns of a 2-D chunk. cube: of a 3-D chunk. What is
            larger than the grid is clipped to it.
        select: "top_k" or "threshold".
        scope: Over what tokens compete. "query_head": the chunks of one token and head; "head_global": all tokens and
            chunks of a head; "overall": all heads, too; "block": all tokens and heads of a chunk (threshold only).
        top_k: Chunks per token, own chunk included, for the 1-D, 2-D and 3-D partition; at most all. In a wider scope
            ``k`` times the number of tokens pairs are shared out.
        threshold: Share of the min-max normalised similarity to keep, own chunk included.

    Defaults are the published training-free ones for 21 x 30 x 52 (81 frames at 480 x 832): local top-k, first quarter
    of the steps dense. Training: ``select="threshold", scope="head_global"`` (paper) or ``scope="query_head"``
    (released), ``threshold=0.25``, chunks 3; 6 x 8; 8 x 12 x 8 at 24 x 36 x 64, and ``Schedule()``.

    Differs from the released code: chunks may be ragged; own chunk alone is enough when it reaches the threshold;
    equal scores weigh the same instead of 0/0; a token without further chunks keeps its own chunk instead of falling
    back to full attention; joint text is always attended, its rows in full.
    """

    key: ClassVar[str] = "vmoba"
    paper: ClassVar[Paper] = Paper(title="VMoBA: video mixture of block attention", arxiv="2506.23858", trained=True)
    search_cost: ClassVar[str] = "B H D V (1 + 2 K)"
    advice: ClassVar[str] = (
        "Long videos, trained or not: every token chooses for itself; its authors report break-even near 33 000 tokens."
    )
    default_schedule: ClassVar[Schedule] = Schedule(dense_steps=0.25)

    frames: int = 3
    patch: tuple[int, int] = (5, 13)
    cube: tuple[int, int, int] = (7, 5, 13)
    select: Literal["top_k", "threshold"] = "top_k"
    scope: Scope = "query_head"
    top_k: tuple[int, int, int] = (2, 6, 18)
    threshold: float = 0.25

    def __post_init__(self) -> None:
        if self.select not in ("top_k", "threshold"):
            raise ValueError(f'vmoba: select must be "top_k" or "threshold", got {self.select!r}')
        if self.scope not in get_args(Scope) or (self.select == "top_k" and self.scope == "block"):
            raise ValueError(
                f"vmoba: scope must be one of {', '.join(get_args(Scope))} (block with select='threshold' only), "
                f"got {self.scope!r}"
            )
        if len(self.top_k) != 3 or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in self.top_k):
            raise ValueError(f"vmoba: top_k must be three integers >= 1, got {self.top_k!r}")
        if len(self.patch) != 2:
            raise ValueError(f"vmoba: patch must be two positive integers (rows, columns), got {self.patch!r}")
        check_density("vmoba: threshold", self.threshold)
        for layer in range(3):
            PartitionLayout(Grid(t=1, h=1, w=1), chunk=self.chunk(layer))

    def chunk(self, layer: int) -> tuple[int, int, int]:
        """Chunk sizes of a layer, before they are clipped to the grid."""
        return ((self.frames, _WHOLE, _WHOLE), (_WHOLE, *self.patch), self.cube)[layer % 3]

    def layout(self, grid: Grid, site: Site) -> Layout:
        """The partition of the site's layer."""
        return PartitionLayout(grid, chunk=self.chunk(site.layer))

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """Top-k: chunks kept of those there are. Threshold: at most the threshold (published: 0.76-0.87 of it)."""
        if self.select == "threshold":
            return predict_density(layout, self.threshold)
        kinds = [PartitionLayout(layout.grid, chunk=self.chunk(layer)).key for layer in range(3)]
        return predict_density(layout, min(1.0, self.top_k[kinds.index(layout.key)] / layout.video_tiles))

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """Mean keys, and the gate of every token against every chunk."""
        return batch * site.heads * site.head_dim * layout.grid.video * (1.0 + 2.0 * layout.video_tiles)

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        return VMoBAAttention(self, site)


class VMoBAAttention(SparseAttention):
    """VMoBA at one site: own chunk and chosen chunks, merged by their LSE."""

    method: VMoBA

    def __init__(self, method: VMoBA, site: Site) -> None:
        super().__init__(method, site)
        # Read here, not in `core`: a compiled block guards on every int it reads, and the layer differs in each.
        self.top_k = method.top_k[site.layer % 3]

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The chosen pairs leave out a token's own chunk, so the two parts are disjoint."""
        blocking = call.blocking
        packed = [blocking.pack(x.detach()) for x in (q, k, v)]
        own, chosen = self._maps(packed[0], packed[1], blocking, call.share)
        self.tally(own, q.shape[0], chosen)
        return ops.host_order_attention(q, k, v, own, chosen, packed=packed), ()

    def _maps(self, q: Tensor, k: Tensor, blocking: Blocking, share: Share = ALL) -> tuple[BlockMap, BlockMap]:
        """Own chunk by chunk, the others by token. Text rows are full in the second map and empty in the first."""
        layout = blocking.layout
        assert layout is not None
        text = blocking.text
        slot_block = layout.token_block.gather(-1, layout.slot_source)[0, 0]
        chunks = torch.arange(layout.blocks, device=q.device)
        mine = slot_block[:, None] == chunks
        gate = torch.einsum("bshd,bkhd->bhsk", q.float(), ops.block_pool(k, blocking).float())
        video = torch.ones_like(chunks, dtype=torch.bool) if text is None else ~text
        counted = video[slot_block][:, None] & video
        across = self.method.scope in ("overall", "block")  # all heads compete for one budget
        gate = share.all_heads(gate, 1) if across else gate
        keep = self._choose(gate, mine, counted, layout)
        keep = share.own_heads(keep, 1) if across else keep
        keep = torch.where(counted, keep & ~mine, True)
        row_count = torch.where(video, 1, 0).to(torch.int32)[None, None]
        own = BlockMap(chunks.to(torch.int32)[None, None, :, None], row_count, blocking, blocking)
        return own, BlockMap.from_mask(keep, blocking.rows(), blocking, capacity=self._capacity(layout))

    def _capacity(self, layout: Layout) -> int:
        method = self.method
        if method.select == "top_k" and method.scope == "query_head":
            text = layout.blocks - layout.video_tiles
            return min(self.top_k, layout.video_tiles) - 1 + text
        return layout.blocks

    def _choose(self, gate: Tensor, mine: Tensor, counted: Tensor, layout: Layout) -> Tensor:
        method = self.method
        if method.select == "threshold":
            return gate_threshold(gate, mine, counted, share=method.threshold, scope=method.scope)
        top = min(self.top_k, layout.video_tiles)
        return gate_top_k(gate, mine, counted, top=top, tokens=layout.grid.video, scope=method.scope)


def _flatten(x: Tensor, scope: Scope) -> Tensor:
    """``[B, H, S, K]`` with everything that competes in the last axis."""
    if scope == "query_head":
        return x
    if scope == "head_global":
        return x.flatten(2)
    return x.flatten(1) if scope == "overall" else x.permute(0, 3, 1, 2).flatten(2)


def _restore(x: Tensor, like: Tensor, scope: Scope) -> Tensor:
    if scope == "block":
        heads, slots, blocks = like.shape[1:]
        return x.view(-1, blocks, heads, slots).permute(0, 2, 3, 1)
    return x.view(like.shape)


def gate_top_k(gate: Tensor, mine: Tensor, counted: Tensor, *, top: int, tokens: int, scope: Scope) -> Tensor:
    """``[B, H, S, K]`` bool: the best chunks of every token, own chunk always among them.

    Args:
        gate: ``[B, H, S, K]`` similarity. mine: ``[S, K]`` bool, a slot's own chunk. counted: ``[S, K]`` bool, pairs
            that compete (video slot, video chunk).
        top: Chunks per token. tokens: video tokens. scope: see `VMoBA`; beyond "query_head" the pairs are shared out.
    """
    heads = gate.shape[1]
    amount = {"query_head": top, "head_global": top * tokens, "overall": top * tokens * heads}[scope]
    ranked = torch.where(counted, torch.where(mine, torch.inf, gate), -torch.inf)
    flat = _flatten(ranked, scope)
    place = flat.argsort(dim=-1, descending=True, stable=True)
    first = (torch.arange(flat.shape[-1], device=gate.device) < amount).expand_as(place)
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, place, first)
    return _restore(keep, gate, scope) & counted


def gate_threshold(gate: Tensor, mine: Tensor, counted: Tensor, *, share: float, scope: Scope) -> Tensor:
    """``[B, H, S, K]`` bool: own chunks, and the smallest set of others with which the similarity reaches a share.

    Within the scope the gate is min-max normalised to [0, 1]; own chunks count first, the others follow in descending
    order until ``(own + others) / total >= share``. Equal scores all weigh 1.

    Args:
        gate, mine, counted, scope: As of `gate_top_k`. share: in (0, 1]; 1 keeps everything.
    """
    if share >= 1.0:
        return counted.expand_as(gate)
    flat = _flatten(gate.double(), scope)
    own, valid = (_flatten(x.expand_as(gate), scope) for x in (mine, counted))
    low = torch.where(valid, flat, torch.inf).amin(-1, keepdim=True)
    span = torch.where(valid, flat, -torch.inf).amax(-1, keepdim=True) - low
    weight = torch.where(span > 0, (flat - low) / torch.where(span > 0, span, 1), 1)
    weight = torch.where(valid, weight, 0)
    goal = share * weight.sum(-1, keepdim=True) - torch.where(own, weight, 0).sum(-1, keepdim=True)
    value, place = torch.where(own | ~valid, -1, weight).sort(dim=-1, descending=True, stable=True)
    before = value.clamp_min(0).cumsum(-1) - value.clamp_min(0)
    keep = torch.zeros_like(own).scatter(-1, place, (before < goal) & (value >= 0))
    return _restore(keep | own, gate, scope) & counted
