"""Blockings, maps and tensors to measure on: random, never zeros, and more of them than the cache holds."""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vsparse import Blocking, BlockMap, Grid
from vsparse.geometry import kept_blocks

from .plan import Group

Triple = tuple[Tensor, Tensor, Tensor]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def blocking(tokens: int, block: int, device: torch.device) -> Blocking:
    """Blocks of ``block`` slots, the last one as long as the tokens last."""
    blocks = math.ceil(tokens / block)
    length = torch.full((1, 1, blocks), block, dtype=torch.int32)
    length[..., -1] = tokens - (blocks - 1) * block
    return Blocking(length=length.to(device), block=block)


def random_map(q: Blocking, k: Blocking, heads: int, density: float, seed: int) -> BlockMap:
    """The same number of random key blocks in every row, other ones in each head and row."""
    count = kept_blocks(density, k.blocks)
    if count == k.blocks:
        return BlockMap.full(q, k)
    device = q.length.device
    scores = torch.rand(1, heads, q.blocks, k.blocks, generator=generator(device, seed), device=device)
    index = scores.topk(count, sorted=False).indices.sort().values.to(torch.int32)
    return BlockMap(index, torch.full(index.shape[:3], count, dtype=torch.int32, device=device), q, k)


def executed_pairs(blocks: BlockMap, batch: int, heads: int) -> float:
    """Query-key pairs that are computed, over batch and heads."""
    return float(blocks.pairs()[0].expand(batch, heads).sum())


def cache_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def sets_needed(bytes_of_one: int, device: torch.device) -> int:
    """Input sets to rotate over so that together they are twice the last-level cache, at least two."""
    return max(2, math.ceil(2 * cache_bytes(device) / max(1, bytes_of_one)))


@dc.dataclass
class Inputs:
    """Rotating q, k, v of a group in block order, and the same values heads-first for dense attention.

    Args:
        sets: ``[1, S, H, D]`` three times. gradients: of the outputs. heads_first: ``[1, h, S, D]`` with h heads.
    """

    q: Blocking
    k: Blocking
    sets: list[Triple]
    gradients: list[Tensor]
    heads_first: list[Triple]


def make(group: Group, device: torch.device, dtype: torch.dtype, heads: int) -> Inputs:
    """Inputs of a group; ``heads``: of the dense attention beside it."""
    q, k = (blocking(group.slots, block, device) for block in group.block)
    rows, columns = q.blocks * q.block, k.blocks * k.block
    one = (rows + 2 * columns) * group.heads * group.width * dtype.itemsize
    sets: list[Triple] = []
    gradients, heads_first = [], []
    for number in range(sets_needed(one, device)):
        source = generator(device, number)
        sizes = (rows, columns, columns, rows)
        made = [
            torch.randn(1, size, group.heads, group.width, generator=source, device=device, dtype=dtype)
            for size in sizes
        ]
        sets.append((made[0], made[1], made[2]))
        gradients.append(made[3])
        first, second, third = (x[:, : group.slots, :heads].transpose(1, 2).contiguous() for x in made[:3])
        heads_first.append((first, second, third))
    return Inputs(q, k, sets, gradients, heads_first)


def smooth(grid: Grid, heads: int, width: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[1, N, H, D]`` that changes slowly over the video, with noise on top, so that maps chosen from it are local."""
    source = generator(device, seed)
    coarse = [max(2, math.ceil(size / 6)) for size in (grid.t, grid.h, grid.w)]
    found = []
    for _ in range(heads):  # head by head: the upsampled field is float32
        field = torch.randn(1, width, *coarse, generator=source, device=device)
        field = F.interpolate(field, size=(grid.t, grid.h, grid.w), mode="trilinear", align_corners=True)
        noise = torch.randn(grid.tokens, width, generator=source, device=device)
        found.append((field.flatten(2)[0].t() + 0.5 * noise).to(dtype))
    return torch.stack(found, 1)[None]
