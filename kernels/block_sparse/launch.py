"""Host side: what the kernels refuse, what they are handed, where they write."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Any

import torch
import triton
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.kernels.tiles import (
    LOG2E,
    Width,
    architecture,
    described,
    lanes,
    map_lanes,
    on_its_device,
    reasons,
    strides,
    undescribed,
)

from .backward import grad_keys, grad_queries, prepare
from .forward import attend
from .transpose import transpose
from .tuning import Config, config

__all__ = ["block_sparse_attention", "block_sparse_attention_backward", "unsupported", "unsupported_backward"]

PREPARE_ROWS = 64


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, scale: float, skip_threshold: float | None = None
) -> list[str]:
    """Why the forward kernel cannot run this; empty when it can."""
    found = reasons(q, k, v, width=q.shape[-1])
    if not (math.isfinite(scale) and scale > 0):
        found.append(f"{scale=}: it must be a positive number")
    if skip_threshold is not None:
        if not skip_threshold >= 0:
            found.append(f"{skip_threshold=}: it must be at least 0")
        chosen = chosen_for(q, k, v, blocks)
        if (chosen.bm, chosen.bn) != _sizes(blocks):
            found.append(f"skip_threshold needs one tile per block pair, and blocks of {_sizes(blocks)} take several")
    return found


def unsupported_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: BlockMap,
    *,
    scale: float,
) -> list[str]:
    """Why the backward kernels cannot run this; empty when they can."""
    return unsupported(q, k, v, blocks, scale=scale)


def undescribed_keys(k: Tensor, v: Tensor, blocks: BlockMap, rows: int) -> list[str]:
    """Why K and V cannot be read through tensor descriptors in tiles of this many rows; empty when they can."""
    found = undescribed({"k": k, "v": v})
    if k.element_size() == 4:
        found.append(f"{k.dtype} would spill registers")
    if blocks.k.start is not None:
        found.append("key blocks that have starts may overlap, and end anywhere")
    if blocks.k.block % rows:
        found.append(f"key blocks of {blocks.k.block} slots are no whole number of tiles of {rows} rows")
    return found


def chosen_for(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap) -> Config:
    """The configuration of the forward: with tensor descriptors only where these tensors have them."""
    sizes = architecture(q.device), Width.of(q.shape[-1]), *_sizes(blocks), q.element_size()
    chosen = config("attend", *sizes)
    if chosen.tma and undescribed_keys(k, v, blocks, chosen.bn):
        return dc.replace(config("attend", *sizes, False), tma=False)
    return chosen


def notes(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, scale: float, skip_threshold: float | None = None
) -> list[str]:
    """Why the forward reads K and V through pointers; empty when it reads them through tensor descriptors."""
    if unsupported(q, k, v, blocks, scale=scale, skip_threshold=skip_threshold) or chosen_for(q, k, v, blocks).tma:
        return []
    sizes = architecture(q.device), Width.of(q.shape[-1]), *_sizes(blocks), q.element_size()
    asked = config("attend", *sizes, True)
    found = undescribed_keys(k, v, blocks, asked.bn)
    if asked.tma and not config("attend", *sizes).tma:
        found.append("they were not measured to be faster")
    if not asked.tma and not found:
        found.append(f"no configuration with them for compute capability {sizes[0] // 10}.{sizes[0] % 10}")
    return [f"no tensor descriptors: {words}" for words in found]


def _descriptors(k: Tensor, v: Tensor, width: Width, chosen: Config) -> dict[str, Any]:
    """Keyword arguments of `attend`: so the others are the same with and without descriptors."""
    made = {"d_k1": None, "d_k2": None, "d_v1": None, "d_v2": None}
    if chosen.tma:
        parts = (width.D1, width.D2) if width.D2 else (width.D1,)
        made |= {
            f"d_{n}{i}": described(x, chosen.bn, c) for n, x in (("k", k), ("v", v)) for i, c in enumerate(parts, 1)
        }
    return made


def _sizes(blocks: BlockMap) -> tuple[int, int]:
    return blocks.q.block, blocks.k.block


def natural(dtype: torch.dtype) -> bool:
    """Whether logits stay in base e and products in full float32: where the inputs have the bits to show it."""
    return dtype == torch.float32


def in_base(x: float, dtype: torch.dtype) -> float:
    """A factor of natural logits for logits in the base that `natural` chooses."""
    return x if natural(dtype) else x * LOG2E.value


@on_its_device
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, scale: float, skip_threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Implements `vsparse.reference.block_sparse_attention`."""
    batch, slots, heads, d = q.shape
    width, (bq, bk) = Width.of(d), _sizes(blocks)
    chosen = chosen_for(q, k, v, blocks)
    # With starts there may be slots of no block, which no program writes.
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if blocks.q.start is None else q.new_zeros(q.shape)
    fill = torch.empty if blocks.q.start is None else _nothing
    lse = fill(q.shape[:3], dtype=torch.float32, device=q.device)
    index, count = lanes(blocks.index, batch, heads), lanes(blocks.count, batch, heads)
    q_side, k_side = map_lanes(blocks.q, batch, heads), map_lanes(blocks.k, batch, heads)
    bias = k_side[:3] if blocks.key_bias is None else lanes(blocks.key_bias, batch, heads)
    attend[(blocks.q.blocks * triton.cdiv(bq, chosen.bm), heads, batch)](
        q, k, v, out, lse,
        index[0], count[0], q_side[0], q_side[3], k_side[0], k_side[3], bias[0],
        in_base(scale, q.dtype), math.inf if skip_threshold is None else in_base(skip_threshold, q.dtype),
        *strides(q), *strides(k), *strides(v), *strides(out)[:3],
        *index[1:], *count[1:], *q_side[1:3], *q_side[4:], *k_side[1:3], *k_side[4:], *bias[1:],
        slots, blocks.k.blocks, blocks.capacity,
        BQ=bq, BK=bk, BM=chosen.bm, BN=chosen.bn, D=d, D1=width.D1, D2=width.D2,
        STARTS_Q=blocks.q.start is not None, STARTS_K=blocks.k.start is not None,
        BIAS=blocks.key_bias is not None, SKIP=skip_threshold is not None, NATURAL=natural(q.dtype),
        TMA=chosen.tma, **_descriptors(k, v, width, chosen), **chosen.options,
    )  # fmt: skip
    return out, lse


def prepared(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What every backward here starts from: ``delta`` and ``shift`` of `prepare`, both ``[B, H, S]``."""
    batch, slots, heads, d = out.shape
    width = Width.of(d)
    delta, shift = (torch.empty(batch, heads, slots, dtype=torch.float32, device=out.device) for _ in range(2))
    out, lse = out.contiguous(), lse.contiguous()  # as the forward wrote them
    by_lse = (0, 0, 0) if grad_lse is None else (grad_lse.stride(0), grad_lse.stride(2), grad_lse.stride(1))
    prepare[(triton.cdiv(slots, PREPARE_ROWS), heads, batch)](
        out, grad_out, lse, lse if grad_lse is None else grad_lse, delta, shift,
        *strides(out)[:3], *strides(grad_out), *by_lse, slots,
        ROWS=PREPARE_ROWS, D=d, D1=width.D1, D2=width.D2, GRAD_LSE=grad_lse is not None, NATURAL=natural(out.dtype),
        num_warps=4,
    )  # fmt: skip
    return delta, shift


def _nothing(shape: torch.Size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, -torch.inf, dtype=dtype, device=device)


@on_its_device
def block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: BlockMap,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements `vsparse.reference.block_sparse_attention_backward`."""
    batch, slots, heads, d = q.shape
    width, (bq, bk), arch = Width.of(d), _sizes(blocks), architecture(q.device)
    delta, shift = prepared(grad_out, grad_lse, out, lse)
    index, count = lanes(blocks.index, batch, heads), lanes(blocks.count, batch, heads)
    q_side, k_side = map_lanes(blocks.q, batch, heads), map_lanes(blocks.k, batch, heads)
    bias = k_side[:3] if blocks.key_bias is None else lanes(blocks.key_bias, batch, heads)
    sides = (*q_side[1:3], *q_side[4:], *k_side[1:3], *k_side[4:], *bias[1:])
    pointers = (q_side[0], q_side[3], k_side[0], k_side[3], bias[0], in_base(scale, q.dtype), scale)
    inputs = (*strides(q), *strides(k), *strides(v), *strides(grad_out))
    flags = {
        "BQ": bq, "BK": bk, "D": d, "D1": width.D1, "D2": width.D2,
        "STARTS_Q": blocks.q.start is not None, "STARTS_K": blocks.k.start is not None,
        "BIAS": blocks.key_bias is not None, "NATURAL": natural(q.dtype),
    }  # fmt: skip

    def target(x: Tensor, starts: bool) -> Tensor:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if starts else x.new_empty(x.shape)

    dq = target(q, blocks.q.start is not None)
    chosen = config("grad_queries", arch, width, bq, bk, q.element_size())
    grad_queries[(blocks.q.blocks * triton.cdiv(bq, chosen.bm), heads, batch)](
        q, k, v, grad_out, delta, shift, dq, index[0], count[0], *pointers,
        *inputs, *strides(dq)[:3], *index[1:], *count[1:], *sides,
        slots, blocks.k.blocks, blocks.capacity,
        BM=chosen.bm, BN=chosen.bn, **flags, **chosen.options,
    )  # fmt: skip

    turned = transpose(blocks)
    offset, row, full, full_count = (
        lanes(x, batch, heads) for x in (turned.offset, turned.row, turned.full, turned.full_count)
    )
    dk, dv = (target(x, blocks.k.start is not None) for x in (k, v))
    chosen = config("grad_keys", arch, width, bq, bk, q.element_size())
    grad_keys[(blocks.k.blocks * triton.cdiv(bk, chosen.bn), heads, batch)](
        q, k, v, grad_out, delta, shift, dk, dv, offset[0], row[0], full[0], full_count[0], *pointers,
        *inputs, *strides(dk)[:3], *offset[1:], *row[1:], *full[1:], *full_count[1:], *sides,
        slots,
        BM=chosen.bm, BN=chosen.bn, **flags, **chosen.options,
    )  # fmt: skip
    return dq, dk, dv
