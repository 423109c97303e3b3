"""DSV: a low-rank predictor, trained beside the model, finds the critical keys; sparse once it is good enough."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import Layout, TileLayout
from vsparse.methods import chance
from vsparse.methods.base import (
    Call,
    Method,
    Paper,
    Site,
    SparseAttention,
    applied,
    check_hidden,
    given_hidden,
    recomputed,
)
from vsparse.methods.budgets import check_density
from vsparse.schedule import Phase
from vsparse.state import Version

__all__ = ["DSV", "DSVAttention"]


@dc.dataclass(frozen=True, kw_only=True)
class DSV(Method):
    """Dynamic sparsity for video training (arXiv 2502.07590, sections 3.2 and 4.1).

    A linear layer of low rank on the attention input predicts the logits. The queries of a tile share the keys that
    suit the predicted query of its middle token best. The predictor learns beside the model: in training every call
    leaves a loss for ``patch.auxiliary_losses()``, which reaches the predictor alone. While the loss is high attention
    is full (stage one); each head then keeps the share of keys that its profile found critical (stage two), unless that
    is more than ``density``: such heads stay dense.

    Args:
        density: Greatest share of the key tiles that a sparse head keeps. Published: sparse kernels from 0.8 sparsity.
        adaptive: Heads follow their profile; False: every head keeps ``density``.
        least: Share that a head keeps in any case (published: 0.02).
        mass: Keys are critical that together hold this share of a query's attention (paper: 0.9; its code profiles
            with 0.99).
        stage: "auto": by the loss; "dense" or "sparse": one of the two, whatever the loss.
        ready: Loss below which a layer turns sparse (published: 0.01).
        rank: Width of the predictor for each head (published: 16).
        rows: Sampled queries for loss and profile; published: every 64th, here a number, as their true logits are held
            in memory, ``4 rows`` bytes for each token and head.
        cosine: Share of the direction in the loss, ``cosine (1 - cos) + (1 - cosine) (|p| / |t| - 1)^2`` for predicted
            and true logits p and t of a query (paper: 0.95).
        momentum: Of the averages of loss and profile (published: 0.9).
        granularity: "block": tiles of keys, scored by the mean of their predicted keys. "token": single keys; needs an
            implementation for key blocks of one token, and holds a score for each tile and key.
        tile: Frames, rows and columns of a tile of queries and of keys. block: slots of a block of the kernel.
        seed: Of the sampled queries and the predictor's first weights.

    Differs from the paper: blocks of keys by default; no optimiser inside the forward, the loss is handed out instead;
    the norm term of the loss, which the paper does not spell out, is the one above; the switch to stage two is taken by
    each layer alone, on the device; loss and profile see the video only. Joint text is always attended, its rows are
    full. The averages are kept with the predictor by ``patch.save``.
    """

    key: ClassVar[str] = "dsv"
    paper: ClassVar[Paper] = Paper(title="DSV: dynamic sparsity in video training", arxiv="2502.07590", trained=True)
    search_cost: ClassVar[str] = "2 B H rank (2 V H D + K^2)"
    advice: ClassVar[str] = (
        "You train or fine-tune for long: the predictor learns beside the model and pays off after it."
    )
    chooses: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"hidden"})

    density: float = 0.2
    adaptive: bool = True
    least: float = 0.02
    mass: float = 0.9
    stage: Literal["auto", "dense", "sparse"] = "auto"
    ready: float = 0.01
    rank: int = 16
    rows: int = 32
    cosine: float = 0.95
    momentum: float = 0.9
    granularity: Literal["block", "token"] = "block"
    tile: tuple[int, int, int] = (4, 4, 4)
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("density", "least", "mass"):
            check_density(f"dsv: {name}", getattr(self, name))
        if self.least > self.density:
            raise ValueError(f"dsv: least must not exceed density={self.density!r}, got {self.least!r}")
        words = {"stage": ("auto", "dense", "sparse"), "granularity": ("block", "token")}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"dsv: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("cosine", "momentum", "ready"):
            value = getattr(self, name)
            fits = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0.0
            if not fits or (name != "ready" and value > 1.0):
                accepted = "a number >= 0" if name == "ready" else "a number in [0, 1]"
                raise ValueError(f"dsv: {name} must be {accepted}, got {value!r}")
        for name in ("rank", "rows", "seed"):
            value, low = getattr(self, name), 0 if name == "seed" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"dsv: {name} must be an integer >= {low}, got {value!r}")
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"dsv: adaptive must be True or False, got {self.adaptive!r}")
        TileLayout(Grid(t=1, h=1, w=1), tile=self.tile, block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """3-D tiles."""
        return TileLayout(grid, tile=self.tile, block=self.block)

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """The predictor, and a score for each tile of queries and tile, or token, of keys."""
        video, tiles = layout.grid.video, layout.video_tiles
        keys = video if self.granularity == "token" else tiles
        return 2.0 * batch * site.heads * self.rank * (2.0 * video * site.dim + tiles * keys)

    def build(self, site: Site) -> SparseAttention:
        """The module with its predictor."""
        return DSVAttention(self, site)


class DSVAttention(SparseAttention):
    """DSV at one site.

    ``progress``: float64 numbers as int64, which a cast of the host leaves alone: how many training calls there were,
    the average loss, and the average critical share of every head.
    """

    method: DSV
    salt: Tensor
    progress: Tensor

    def __init__(self, method: DSV, site: Site) -> None:
        super().__init__(method, site)
        draw = torch.Generator().manual_seed(method.seed * 1_000_003 + site.layer)
        weight = torch.randn(2 * site.heads * method.rank, site.dim, generator=draw, device="cpu") * site.dim**-0.5
        self.predictor = nn.Linear(site.dim, len(weight), bias=False, device="meta")
        self.predictor.weight = nn.Parameter(torch.empty(weight.shape).copy_(weight))
        self.register_buffer("salt", chance.salt(method.seed, site.layer), persistent=False)
        self.register_buffer("progress", torch.zeros(2 + site.heads, dtype=torch.float64).view(torch.int64))

    def version(self, branch: str) -> Version:
        """With the averages as they are now: a recomputation reads what its forward read."""
        return {**super().version(branch), "progress": self.progress.clone()}

    def absorb(self, staged: dict[str, Tensor]) -> None:
        """Take over the averages of a training call."""
        if "progress" in staged:
            self.progress.copy_(staged.pop("progress"))

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The predictor, and the averages as the numbers that they are."""
        yield from super().own_tensors()
        yield "progress", self.progress.view(torch.float64)

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Predict, learn, choose, attend."""
        hidden = given_hidden(self.method.key, hidden)
        check_hidden(self.method.key, hidden, call)
        progress = self.state.read("progress").view(torch.float64)
        if self.training and not torch.is_inference_mode_enabled():
            self._learn(q.detach()[:, call.video], k.detach()[:, call.video], hidden.detach(), call, progress)
        with torch.no_grad():
            blocks = self._choose(call.features[0], call, progress)
        self.tally(blocks, q.shape[0])
        packed = [call.rows.pack(x.detach()) for x in (q, k, v)]
        return call.attend(q, k, v, blocks, packed=packed), ()

    def features(self, q: Tensor, hidden: Tensor | None) -> tuple[Tensor, ...]:
        """The predicted queries and keys."""
        with torch.no_grad():
            return (self._low(given_hidden(self.method.key, hidden), q.dtype),)

    def _low(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Predicted queries and keys of each head, ``[B, n, H, 2 * rank]`` float32 (float64 for a float64 host)."""
        low = applied(self.predictor, hidden, dtype)
        low = low if low.dtype == torch.float64 else low.float()
        pairs: Tensor = low.unflatten(-1, (2, self.site.heads, self.method.rank)).transpose(2, 3)
        return pairs.flatten(3)

    # ---- choosing -------------------------------------------------------------------------------------------------

    def _choose(self, low: Tensor, call: Call, progress: Tensor) -> BlockMap:
        """Top-k of the predicted scores with a budget for each head; heads that are not sparse keep everything."""
        method, rows, blocking, grid = self.method, call.rows, call.blocking, call.grid
        own, tiles, video = rows.tiles(), blocking.tiles(), call.layout.video_tiles
        assert own.layout is not None
        q_low, k_low = (F.pad(x, (0, 0, 0, 0, grid.text_before, grid.text_after)) for x in low.chunk(2, -1))
        q_low, k_low = rows.pack(q_low), rows.pack(k_low)
        middle = torch.arange(own.blocks, device=q_low.device) * own.block + own.layout.length[0, 0] // 2
        proxy = q_low.index_select(1, middle)
        if method.granularity == "token":
            keys, side, candidates = call.all_slots(k_low), blocking.rows(), grid.video
        else:
            keys, side, candidates = call.all_blocks(ops.block_pool(k_low, own)), tiles, video
        scores = torch.einsum("bqhd,bkhd->bhqk", proxy, keys)
        shares = torch.cat((progress[:2], call.share.own_heads(progress[2:], 0)))
        share, full = self._budget(call.density, shares)
        forced = full[None, :, None, None]
        text = tiles.text
        if text is not None and own.text is not None:
            columns = text if side is tiles else text.repeat_interleave(tiles.block)
            forced = forced | (own.text[:, None] | columns)
        chosen = select.top_k(
            scores,
            own,
            side,
            count=select.budget(share, candidates)[None, :, None],
            forced=forced.expand(1, len(share), own.blocks, side.blocks),
            capacity=kept_blocks(self.peak_density, candidates) + side.blocks - candidates,
        )
        if side is tiles:
            return select.expand_tiles(chosen, rows, blocking)
        return BlockMap(chosen.index, chosen.count, own, side)

    def _budget(self, density: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """``[H]`` each: the share of the keys that a head keeps, float64, and whether it keeps all of them."""
        method = self.method
        share = progress[2:]
        if method.adaptive:
            full, kept = share > density, share.clamp_min(method.least).minimum(density)
        else:
            full, kept = torch.zeros_like(share, dtype=torch.bool), density.expand_as(share)
        if method.stage == "auto":
            full = full | (progress[0] == 0) | (progress[1] >= method.ready)
        elif method.stage == "dense":
            full = torch.ones_like(full)
        return kept, full

    # ---- learning -------------------------------------------------------------------------------------------------

    def _learn(self, q: Tensor, k: Tensor, hidden: Tensor, call: Call, progress: Tensor) -> None:
        """Loss of the predictor on sampled queries, and the averages after this call."""
        method = self.method
        token = chance.spread(method.rows, call.grid.video, salt=self.salt, step=progress[0].long())
        with torch.enable_grad():
            loss, true = recomputed(self._lesson, q, k, hidden, token, call)
            loss = call.share.loss(loss * (q.shape[2] / self.site.heads))
        with torch.no_grad():
            share = call.share.all_heads(_critical(true * q.shape[-1] ** -0.5, call, method.mass), 0)
            fresh = torch.cat((loss.detach()[None], share)).double()
            keep = (progress[0] > 0).double() * method.momentum
            averages = keep * progress[1:] + (1.0 - keep) * fresh
            self.state.stage("progress", torch.cat((progress[:1] + 1, averages)).view(torch.int64))
        self.state.hand_out("loss", loss)

    def _lesson(self, q: Tensor, k: Tensor, hidden: Tensor, token: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The loss, and the true logits of the sampled queries, ``[B, H, R, video]``."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        true = torch.einsum("brhd,bkhd->bhrk", call.tokens_anywhere(q, token).to(wide), k.to(wide))
        q_low, k_low = call.share.exchange(self._low(hidden, q.dtype))[0].chunk(2, -1)
        guess = torch.einsum("brhd,bkhd->bhrk", call.tokens_anywhere(q_low, token), k_low)
        return _loss(guess, true, self.method.cosine, call), true


def _loss(guess: Tensor, true: Tensor, cosine: float, call: Call) -> Tensor:
    """The predictor's loss, the mean over samples, heads and queries of ``[B, H, R, N]``, keys of all processes."""
    products = torch.stack([(a * b).sum(-1) for a, b in ((guess, guess), (true, true), (guess, true))])
    sums = call.over_shards(products, once=True)
    size, wanted = sums[:2].clamp_min(torch.finfo(true.dtype).tiny).sqrt()
    along = sums[2] / size / wanted
    loss: Tensor = cosine * (1.0 - along) + (1.0 - cosine) * (size / wanted - 1.0).square()
    return loss.mean()


def _critical(logits: Tensor, call: Call, mass: float) -> Tensor:
    """``[H]``: mean share of the tiles that hold ``mass`` of a query's attention, from logits ``[B, H, R, video]``."""
    rows, layout, grid = call.rows, call.layout, call.grid
    tiles = rows.tiles()
    lse = logits.logsumexp(-1)
    if call.share.shard is not None:
        lse = call.share.shard.each(lse).logsumexp(0)
    weight = (logits - lse[..., None]).exp().permute(0, 3, 1, 2)
    weight = F.pad(weight, (0, 0, 0, 0, grid.text_before, grid.text_after))
    by_tile = call.all_blocks(rows.pack(weight).unflatten(1, (tiles.blocks, tiles.block)).sum(2))
    ranked = by_tile.sort(dim=1, descending=True).values
    count: Tensor = (ranked.cumsum(1) - ranked < mass).sum(1)
    return count.to(logits.dtype).mean((0, 2)) / layout.video_tiles
