"""Queries and keys with the structure that attention of video models shows, made from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vsparse.geometry import Grid
from vsparse.methods.samples import Sample

__all__ = ["HEADS", "structured_sample"]

HEADS = ("local", "periodic in time", "global", "mixed")
"""What the heads of `structured_sample` attend to, in turn."""


def structured_sample(
    grid: Grid,
    *,
    heads: int = 4,
    width: int = 64,
    seed: int = 0,
    noise: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Sample:
    """q, k and v ``[1, N, heads, width]`` of one attention call.

    Local heads look at what is near in space and time, by random Fourier features of the positions; periodic ones at
    the same place, strongest every fourth frame; global ones at the first tokens and at a few small landmarks; mixed
    ones at a bit of each. Text tokens have no position: their queries and keys are noise.

    Args:
        grid: The lattice. noise: standard deviation of what is added to every channel. seed: of a private generator.
    """
    draw = torch.Generator().manual_seed(seed)
    place = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (grid.t, grid.h, grid.w)))
    place = place.view(-1, 3)
    q, k = (noise * torch.randn(grid.tokens, heads, width, generator=draw, dtype=torch.float64) for _ in range(2))
    video = slice(grid.text_before, grid.text_before + grid.video)
    for head in range(heads):
        kind = HEADS[head % len(HEADS)]
        near = _fourier(place, (2.0, 1.6, 1.6), width, draw)
        same = _fourier(place, (math.inf, 1.6, 1.6), width, draw, period=4)
        marked, toward = _landmarks(grid, width, draw)
        weight = {"local": (1, 0, 0), "periodic in time": (0, 1, 0), "global": (0.3, 0, 1), "mixed": (0.7, 0.6, 0.7)}
        local, periodic, distant = weight[kind]
        for x in (q, k):
            x[video, head] += math.sqrt(9.0 * local) * near + math.sqrt(9.0 * periodic) * same
        q[video, head] += math.sqrt(8.0 * distant) * toward
        k[video, head] += math.sqrt(8.0 * distant) * marked[:, None] * toward
    v = torch.randn(grid.tokens, heads, width, generator=draw, dtype=torch.float64)
    return Sample(grid=grid, q=q[None].to(dtype), k=k[None].to(dtype), v=v[None].to(dtype))


def _fourier(
    place: Tensor, reach: tuple[float, float, float], width: int, draw: torch.Generator, period: int | None = None
) -> Tensor:
    """``[V, width]``: features whose product over ``sqrt(width)`` is near 1 at equal places and falls with distance."""
    rate = torch.randn(3, width // 2, generator=draw, dtype=torch.float64) / torch.tensor(reach)[:, None]
    if period is not None:
        rate[0] = torch.randint(0, 2, rate[0].shape, generator=draw) * (2 * math.pi / period)
    angle = place @ rate
    found: Tensor = torch.cat((angle.cos(), angle.sin()), -1) * ((2.0 / width) ** 0.5 * width**0.25)
    return found


def _landmarks(grid: Grid, width: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """``[V]``: 1 at the first tokens and at four patches of 2 x 2 tokens, else 0; ``[width]``: their direction."""
    marked = torch.zeros(grid.t, grid.h, grid.w, dtype=torch.float64)
    marked[0, 0, :4] = 1
    for _ in range(4):
        t, h, w = (int(torch.randint(0, max(1, n - 1), (), generator=draw)) for n in (grid.t, grid.h, grid.w))
        marked[t, h : h + 2, w : w + 2] = 1
    toward = torch.randn(width, generator=draw, dtype=torch.float64)
    return marked.flatten(), toward / toward.norm() * width**0.25
