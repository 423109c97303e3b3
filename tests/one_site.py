"""One attention site without a host: a method's module, driven the way a root drives it."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from typing import Any

import torch
from oracle import check
from torch import Tensor
from torch.nn import functional as F

import vsparse
from vsparse.blocks import BlockMap
from vsparse.methods import Call, Method, Site, SparseAttention, budgets

HEADS, DIM = 2, 8


def tensors(grid: vsparse.Grid, *, batch: int = 1, seed: int = 0, scale: float = 2.0) -> list[Tensor]:
    """q, k, v of a grid in float32; logits spread widely enough that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, grid.tokens, HEADS, DIM)
    return [s * torch.randn(shape, generator=generator) for s in (scale, scale, 1.0)]


class Driven:
    """A site of a method with the call and the state that a root would give it."""

    def __init__(self, method: Method, grid: vsparse.Grid, text_length: Tensor | None = None, **site: Any) -> None:
        defaults: dict[str, Any] = {"layer": 0, "layers": 1, "dim": HEADS * DIM, "heads": HEADS, "head_dim": DIM}
        self.site = Site(root="root", name="site", host="none", **{**defaults, **site})
        self.method, self.grid = method, grid
        self.layout = method.layout(grid, self.site)
        self.module: SparseAttention = method.build(self.site)
        self.module.peak_density = budgets.highest(method.call_density())
        self.maps: list[BlockMap] = []
        self.loss: Tensor | None = None
        self.call = self.at(method.call_density(), text_length)
        stock = self.module.tally

        def tally(blocks: BlockMap, batch: int, *more: BlockMap) -> None:
            self.maps = [blocks, *more]
            stock(blocks, batch, *more)

        self.module.tally = tally  # type: ignore[method-assign]

    def at(self, density: budgets.Density, text_length: Tensor | None) -> Call:
        """The call of a density."""
        blocking, static = self.layout.bind(text_length), self.method.static_map(self.layout, self.site)
        return Call(
            layout=self.layout,
            blocking=blocking,
            static=None if static is None else dc.replace(static, q=blocking, k=blocking),
            text_length=text_length,
            step=torch.tensor(0),
            density=budgets.as_tensor(density),
        )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, *, phase: str = "search"
    ) -> Tensor:
        """One call in a phase, committed afterwards as a root does."""
        module = self.module
        module.phase, module.call, module.hidden = phase, self.call, hidden  # type: ignore[assignment]
        module.state.bind(module.version("default"))
        out = module(q, k, v)
        module.state.staged.pop("pairs", None)
        self.loss = module.state.staged.pop("loss", None)
        module.absorb(module.state.staged)
        if phase in self.method.state_phases:
            module.state.commit("default", None)
        return out

    def token_blocks(self) -> Tensor:
        """``[N]``: the block of each token."""
        return self.layout.token_block[0, 0]

    def keep(self) -> Tensor:
        """``[B, H, N, N]`` bool: which token attended to which key in the last call; invalid text is out."""
        (blocks,) = self.maps
        lead = (max(blocks.index.shape[0], blocks.k.length.shape[0]), HEADS)
        where = self.token_blocks()
        mask = blocks.validate().to_mask().expand(*lead, -1, -1)[:, :, where][..., where]
        return mask & self.valid()[:, None, None] & self.valid()[:, None, :, None]

    def valid(self) -> Tensor:
        """``[B, N]`` bool: tokens that are no padded text."""
        grid, length = self.grid, self.call.text_length
        token = torch.arange(grid.tokens)
        if length is None:
            return torch.ones(1, grid.tokens, dtype=torch.bool)
        place = torch.where(token < grid.text_before, token, token - grid.video - grid.text_before)
        is_text = (token < grid.text_before) | (token >= grid.text_before + grid.video)
        return ~is_text | (place < length[:, None])


def phases(method: Method, steps: int, *, layer: int = 0, schedule: vsparse.Schedule | None = None) -> list[str]:
    """The phases of a layer in a whole generation."""
    chosen = vsparse.Schedule() if schedule is None else schedule
    found: list[str] = []
    filled, stamp = False, None
    for step in range(steps):
        phase = method.phase(chosen, step=step, steps=steps, layer=layer, filled=filled, stamp=stamp)
        if phase in method.state_phases:
            filled, stamp = True, step
        found.append(phase)
    return found


def orthogonal(rank: int, seed: int = 0) -> Tensor:
    """``[H, D, R]`` float64: orthonormal columns for each head."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator, dtype=torch.float64))[0][..., :rank]


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Softmax attention of ``[B, N, H, D]`` under a mask; rows without a key give 0."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1), nan=0.0)
    return (weights @ v).transpose(1, 2)


def law(found: Tensor, hand: Callable[[torch.dtype], Tensor]) -> None:
    """The numerics law for a float32 result: truth and reference are one formula by hand, in float64 and float32."""
    check("by hand", found.detach(), hand(torch.float32), hand(torch.float64))


def tiles(grid: vsparse.Grid, tile: tuple[int, int, int]) -> list[list[int]]:
    """Video tokens of each tile by their coordinates, tiles ordered by their corner."""
    corners = [
        (t, h, w)
        for t in range(0, grid.t, tile[0])
        for h in range(0, grid.h, tile[1])
        for w in range(0, grid.w, tile[2])
    ]
    return [
        [
            grid.text_before + (t * grid.h + h) * grid.w + w
            for t in range(t0, min(t0 + tile[0], grid.t))
            for h in range(h0, min(h0 + tile[1], grid.h))
            for w in range(w0, min(w0 + tile[2], grid.w))
        ]
        for t0, h0, w0 in corners
    ]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A projection into heads."""
    return F.linear(x, weight, bias).unflatten(-1, (HEADS, DIM))
