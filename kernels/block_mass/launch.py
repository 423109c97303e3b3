"""Host side: what the mass kernel refuses, what it is handed, where it writes."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.kernels.block_sparse import IMPLEMENTATIONS, block_sparse_attention
from vsparse.kernels.tiles import LOG2E, Width, architecture, lanes, map_lanes, on_its_device, reasons, strides
from vsparse.layouts import Blocking

from .forward import pair_mass
from .tuning import config

__all__ = ["block_mass", "search_attention", "unsupported", "unsupported_search"]


def unsupported(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_blocking: Blocking,
    k_blocking: Blocking,
    *,
    scale: float,
    candidates: BlockMap | None = None,
    rows: Tensor | None = None,
) -> list[str]:
    """Why the mass kernel cannot run this; empty when it can."""
    found = reasons(q, k, lse, width=q.shape[-1])
    if q.dtype != k.dtype:
        found.append(f"q is {q.dtype} and k {k.dtype}: they must be of one dtype")
    if not (math.isfinite(scale) and scale > 0):
        found.append(f"{scale=}: it must be a positive number")
    return found


def unsupported_search(q: Tensor, k: Tensor, v: Tensor, blocking: Blocking, *, scale: float) -> list[str]:
    """Why the search cannot run this; empty when it can."""
    attention = IMPLEMENTATIONS["block_sparse_attention"]
    return attention.unsupported(q, k, v, BlockMap.full(blocking), scale=scale)


@on_its_device
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
    """Implements `vsparse.reference.block_mass`.

    Without candidates short blocks, and short samples of blocks, share a tile. A query block that takes several tiles
    gets one row of partial masses per tile, added up in a fixed order.
    """
    batch, _, heads, d = q.shape
    width, natural, queries, bq = Width.of(d), q.dtype == torch.float32, q_blocking.blocks, q_blocking.block
    q_side, k_side = map_lanes(q_blocking, batch, heads), map_lanes(k_blocking, batch, heads)
    index = count = bias = k_side[:3]
    if candidates is not None:
        index, count = lanes(candidates.index, batch, heads), lanes(candidates.count, batch, heads)
        if candidates.key_bias is not None:
            bias = lanes(candidates.key_bias, batch, heads)
    offsets = None if rows is None else _offsets(rows, bq)
    used = bq if offsets is None else len(offsets)
    most = 1 if candidates is not None else queries
    chosen = config(architecture(q.device), width, used, most, k_blocking.block, q.element_size())
    tiles = max(1, triton.cdiv(used * chosen.blocks, chosen.bm))
    mass = q.new_zeros(batch, heads, queries, tiles, k_blocking.blocks, dtype=torch.float32)
    pair_mass[(triton.cdiv(queries, chosen.blocks) * tiles, heads, batch)](
        q, k, lse, mass, q_side[0] if offsets is None else offsets, index[0], count[0],
        q_side[0], q_side[3], k_side[0], k_side[3], bias[0], scale if natural else scale * LOG2E.value,
        *strides(q), *strides(k), lse.stride(0), lse.stride(2), lse.stride(1),
        *index[1:], *count[1:], *q_side[1:3], *q_side[4:], *k_side[1:3], *k_side[4:], *bias[1:],
        used, queries, k_blocking.blocks, 0 if candidates is None else candidates.capacity,
        G=chosen.blocks, Q_TILES=tiles, BQ=bq, BK=k_blocking.block, BM=chosen.bm, BN=chosen.bn,
        D=d, D1=width.D1, D2=width.D2, ROWS=offsets is not None, LISTED=candidates is not None,
        STARTS_Q=q_blocking.start is not None, STARTS_K=k_blocking.start is not None,
        BIAS=candidates is not None and candidates.key_bias is not None, NATURAL=natural,
        **chosen.options,
    )  # fmt: skip
    return mass.sum(3) if tiles > 1 else mass.squeeze(3)


def _offsets(rows: Tensor, block: int) -> Tensor:
    """``[min(R, BQ)]`` int32: each row inside a block once, ascending, then BQ. Its shape hangs on no value."""
    rows = torch.where((rows >= 0) & (rows < block), rows, block).sort().values
    again = torch.zeros_like(rows, dtype=torch.bool)
    again[1:] = rows[1:] == rows[:-1]
    return rows.masked_fill(again, block).sort().values[:block].int()


@on_its_device
def search_attention(
    q: Tensor, k: Tensor, v: Tensor, blocking: Blocking, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements `vsparse.reference.search_attention` in two passes: dense attention, then the mass with its LSE.

    The mass of a pair needs the LSE of its rows, which is known when they have been walked. One pass would have to keep
    the sum of every row and key block with the maximum it is relative to, and rescale them at the end: 2 BQ times the
    memory of the mass. The second pass costs less than half as much as the first, for it has no product with V.
    """
    out, lse = block_sparse_attention(q, k, v, BlockMap.full(blocking), scale=scale)
    return out, lse, block_mass(q, k, lse, blocking, blocking, scale=scale)
