"""Exact attention mass of block pairs, and the search that reports it beside the attention itself."""

from __future__ import annotations

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking
from vsparse.reference import statistics_dtype

from .attention import block_sparse_attention
from .rows import Chunk, Plan, Tokens, flat, upto

__all__ = ["block_mass", "search_attention"]

# Elements of the weights that are held at once, unless 32 queries need more.
TILE = 1 << 20


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_blocking: Blocking,
    k_blocking: Blocking,
    *,
    scale: float,
    candidates: BlockMap | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Implements `vsparse.reference.block_mass` without a matrix of more than a few thousand rows."""
    wide = statistics_dtype(q.dtype)
    blocks = BlockMap.full(q_blocking, k_blocking) if candidates is None else candidates
    offsets = None if rows is None else rows[rows >= 0].unique()
    plan = Plan(blocks, q, k, wide, label=True, offsets=offsets)
    mass = q.new_zeros(q.shape[0], q.shape[2], q_blocking.blocks, k_blocking.blocks, dtype=wide)
    sources = (flat(q), flat(k), flat(lse))
    for lanes in plan.groups():
        for chunk in plan.full_rows(lanes):
            _full_mass(chunk, sources, scale, mass)
        for chunk in plan.listed_rows(lanes):
            for part, to, bias in chunk.pieces():
                keys = to.take(sources[1], wide)
                by_key = _weights(chunk.q.part(part), bias, keys, sources, scale).sum(-1)
                pair = chunk.target[part, None] * mass.shape[-1] + _label(to)
                mass.view(-1).index_add_(0, pair.flatten(), by_key.flatten())
    return mass


def search_attention(
    q: Tensor, k: Tensor, v: Tensor, blocking: Blocking, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements `vsparse.reference.search_attention`."""
    out, lse = block_sparse_attention(q, k, v, BlockMap.full(blocking), scale=scale)
    return out, lse, block_mass(q, k, lse, blocking, blocking, scale=scale)


def _full_mass(chunk: Chunk, sources: tuple[Tensor, Tensor, Tensor], scale: float, mass: Tensor) -> None:
    """Add the mass of lanes whose queries attend to all keys, some queries at a time."""
    lanes, query_blocks, key_blocks = len(chunk.target), *mass.shape[2:]
    keys = chunk.k.take(sources[1], mass.dtype)
    column = (_label(chunk.k) + upto(lanes)[:, None] * key_blocks).flatten()
    target = chunk.target[:, None] * query_blocks + _label(chunk.q)
    step = max(32, TILE // chunk.k.row.numel())
    for begin in range(0, target.shape[1], step):
        part = slice(begin, begin + step)
        valid = None if chunk.q.valid is None else chunk.q.valid[:, part]
        weights = _weights(Tokens(chunk.q.row[:, part], valid, None), chunk.bias, keys, sources, scale)
        by_column = mass.new_zeros(lanes * key_blocks, weights.shape[2]).index_add_(0, column, weights.flatten(0, 1))
        by_query = by_column.unflatten(0, (lanes, key_blocks)).transpose(1, 2).flatten(0, 1)
        mass.view(-1, key_blocks).index_add_(0, target[:, part].flatten(), by_query)


def _weights(
    q: Tokens, bias: Tensor | None, keys: Tensor, sources: tuple[Tensor, Tensor, Tensor], scale: float
) -> Tensor:
    """``exp(S - LSE)`` as ``[n, L, A]``, zero for padding on either side and for queries without keys."""
    queries, lse = q.take(sources[0], keys.dtype), q.take(sources[2], keys.dtype)
    idle = lse == -torch.inf
    if q.valid is not None:
        idle = idle | ~q.valid
    queries, lse = queries.masked_fill(idle[..., None], 0), lse.masked_fill(idle, torch.inf)
    weights = keys.new_empty(*keys.shape[:2], queries.shape[1])
    torch.baddbmm(weights, keys, queries.transpose(1, 2), beta=0, alpha=scale, out=weights)
    weights.sub_(lse[:, None])
    if bias is not None:
        weights.add_(bias[..., None])
    return weights.exp_()


def _label(tokens: Tokens) -> Tensor:
    assert tokens.label is not None
    return tokens.label
