"""Selectors: from scores of block pairs to the `BlockMap` that is computed."""

from __future__ import annotations

import dataclasses as dc
from typing import Literal, get_args

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.geometry import kept_blocks
from vsparse.layouts import Blocking
from vsparse.ops.selection import select_blocks

__all__ = [
    "Budget",
    "budget",
    "expand_tiles",
    "forced_text",
    "head_global",
    "threshold",
    "top_k",
    "top_p",
    "top_p_capacity",
]

Budget = Literal["exempt", "compete", "join"]


def budget(density: Tensor | float, blocks: int) -> Tensor:
    """Kept blocks for a density, ``max(1, ceil(density * blocks - 1e-9))`` as int32, in the shape of ``density``.

    Args:
        density: A float, or a float64 tensor (a float32 one would round 0.1 up and keep one block too many).
    """
    wide = torch.as_tensor(density, dtype=torch.float64)
    return (wide * blocks - 1e-9).ceil().clamp(1, blocks).to(torch.int32)


def forced_text(q: Blocking, k: Blocking | None = None) -> Tensor | None:
    """``[1, 1, Q, K]`` bool: text rows attend to everything, text keys are kept by every row. None without text."""
    text_k, text_q = (q if k is None else k).text, q.text
    if text_q is None or text_k is None:
        return None
    return (text_q[:, None] | text_k[None, :])[None, None]


def top_k(
    scores: Tensor,
    q: Blocking,
    k: Blocking | None = None,
    *,
    count: Tensor | int,
    forced: Tensor | None = None,
    forced_budget: Budget = "exempt",
    capacity: int | None = None,
) -> BlockMap:
    """Keep the ``count`` best key blocks of every row. Of equal scores the lower block index wins.

    Args:
        scores: ``[B|1, H|1, Q, K]`` float; higher is better.
        q, k: Blockings; key blocks of length 0 are never chosen.
        count: Blocks to keep, an int or an int tensor that broadcasts against ``[B, H, Q]``.
        forced: ``[B|1, H|1, Q, K]`` bool, always kept.
        forced_budget: "exempt": on top of ``count``, which the others share; "compete": they use up ``count`` first;
            "join": the choice is made as if nothing were forced, then they are added.
        capacity: M of the map; the caller vouches for it. None: K.

    Returns:
        The map. With fewer than ``count`` candidates a row keeps what there is.
    """
    limit = count if isinstance(count, Tensor) else _number(count, torch.int32, scores)
    return _rows(scores, q, k, "count", limit, 0, forced, forced_budget, capacity)


def top_p(
    scores: Tensor,
    q: Blocking,
    k: Blocking | None = None,
    *,
    mass: Tensor | float,
    include_crossing: bool,
    least: int = 1,
    forced: Tensor | None = None,
    forced_budget: Budget = "exempt",
    capacity: int | None = None,
) -> BlockMap:
    """Keep the best key blocks of every row until they hold ``mass`` of the row's total score.

    Args:
        scores: ``[B|1, H|1, Q, K]``, non-negative (a softmax, or an exact mass).
        mass: Share of the row total in (0, 1], a float or a tensor that broadcasts against ``[B, H, Q]``. 1 keeps every
            key block that is not empty, however small its score.
        include_crossing: True: keep the block with which the sum reaches ``mass`` (NABLA, SVG2, XAttention); False:
            stop before it (SpargeAttn).
        least: Blocks kept in any case.
        forced, capacity: As in `top_k`.
        forced_budget: "exempt": the total is that of the other blocks; "compete": forced blocks are the first to fill
            ``mass``; "join": as in `top_k`.
    """
    _fraction("mass", mass)
    limit = mass.double() if isinstance(mass, Tensor) else _number(mass, torch.float64, scores)
    rule = "reach" if include_crossing else "stay"
    return _rows(scores, q, k, rule, limit, least, forced, forced_budget, capacity)


def top_p_capacity(mass: float, blocks: int) -> int:
    """Key blocks of ``blocks`` that a row of `top_p` keeps at most, the crossing one included.

    The best n of K blocks hold at least n / K of the total; one more covers rounding.
    """
    return min(blocks, kept_blocks(mass, blocks) + 1)


def threshold(
    scores: Tensor,
    q: Blocking,
    k: Blocking | None = None,
    *,
    value: Tensor | float,
    least: int = 1,
    forced: Tensor | None = None,
    capacity: int | None = None,
) -> BlockMap:
    """Keep key blocks whose score is at least ``value`` (broadcasts against ``[B, H, Q]``), and the ``least`` best."""
    limit = value.double() if isinstance(value, Tensor) else _number(value, torch.float64, scores)
    return _rows(scores, q, k, "value", limit, least, forced, "exempt", capacity)


def head_global(
    scores: Tensor,
    q: Blocking,
    k: Blocking | None = None,
    *,
    density: Tensor | float,
    least: int = 1,
    forced: Tensor | None = None,
) -> BlockMap:
    """Keep the best share ``density`` of all block pairs of a head; rows keep unequal numbers.

    Args:
        scores: ``[B|1, H|1, Q, K]``; for a fair comparison across rows, a softmax.
        density: Share of the Q * K pairs, a float or a float64 tensor that broadcasts against ``[B, H]``.
        least: Best blocks of a row that are kept in any case, so that no row is empty.
        forced: As in `top_k`, exempt from the budget.
    """
    k = q if k is None else k
    _fraction("density", density)
    ranked = torch.where((k.length > 0)[:, :, None], scores, -torch.inf)
    ranked = ranked if forced is None else torch.where(forced, -torch.inf, ranked)
    flat = ranked.flatten(-2)
    pairs = flat.shape[-1]
    place = flat.argsort(dim=-1, descending=True, stable=True)
    limit = budget(density, pairs)[..., None] if isinstance(density, Tensor) else kept_blocks(density, pairs)
    chosen = (torch.arange(pairs, device=scores.device) < limit).expand_as(place)
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, place, chosen).view_as(ranked)
    best = top_k(scores, q, k, count=least).to_mask()
    keep = (keep | best) & (ranked > -torch.inf)
    return BlockMap.from_mask(keep if forced is None else keep | forced, q, k)


def expand_tiles(tiles: BlockMap, q: Blocking, k: Blocking | None = None) -> BlockMap:
    """A map over tiles as a map over their blocks, those of ``q`` and of ``k``: every block of a kept tile is kept."""
    k = q if k is None else k
    per_tile = k.blocks // tiles.k.blocks
    if per_tile == 1:
        return BlockMap(tiles.index, tiles.count, q, k, tiles.key_bias)
    keep = tiles.to_mask().repeat_interleave(per_tile, -1).repeat_interleave(per_tile, -2)
    blocks = BlockMap.from_mask(keep, q, k, capacity=tiles.capacity * per_tile)
    if tiles.key_bias is None:
        return blocks
    return dc.replace(blocks, key_bias=tiles.key_bias.repeat_interleave(per_tile, -1))


def _fraction(name: str, value: Tensor | float) -> None:
    if not isinstance(value, Tensor) and not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")


def _number(value: float, dtype: torch.dtype, scores: Tensor) -> Tensor:
    return torch.full((1, 1, 1), value, dtype=dtype, device=scores.device)


def _rows(
    scores: Tensor,
    q: Blocking,
    k: Blocking | None,
    rule: str,
    limit: Tensor,
    least: int,
    forced: Tensor | None,
    forced_budget: Budget,
    capacity: int | None,
) -> BlockMap:
    if forced_budget not in get_args(Budget):
        raise ValueError(f'forced_budget must be "exempt", "compete" or "join", got {forced_budget!r}')
    k = q if k is None else k
    if scores.ndim != 4 or scores.shape[2:] != (q.blocks, k.blocks) or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floating [B|1, H|1, Q={q.blocks}, K={k.blocks}], got {scores.dtype} {tuple(scores.shape)}"
        )
    limit = limit if limit.ndim == 3 else limit.expand(*scores.shape[:3])
    capacity = k.blocks if capacity is None else min(capacity, k.blocks)
    index, count = select_blocks(scores.detach(), k.length, forced, limit, rule, forced_budget, least, capacity)
    return BlockMap(index, count, q, k)
