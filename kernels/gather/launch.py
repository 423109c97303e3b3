"""Host side: lists by key block, parts of a few heads at a time, and their merge."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.kernels.block_sparse.launch import in_base, natural, prepared
from vsparse.kernels.block_sparse.transpose import transpose
from vsparse.kernels.tiles import Width, lanes, map_lanes, on_its_device, reasons, strides

from .backward import grad_blocks, grad_rows
from .forward import attend_rows, combine
from .tuning import config

__all__ = ["block_sparse_attention", "block_sparse_attention_backward", "unsupported", "unsupported_backward"]

ROWS = 64
# Bytes of the parts that are held at once; one head at least.
PARTS = 1 << 28


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, scale: float, skip_threshold: float | None = None
) -> list[str]:
    """Why the forward kernels cannot run this; empty when they can."""
    found = reasons(q, k, v, width=q.shape[-1])
    if blocks.q.block != 1:
        found.append(f"query blocks of {blocks.q.block} slots: gathering is for maps that choose per token")
    if blocks.q.start is not None:
        found.append("the query blocking has starts")
    if not (math.isfinite(scale) and scale > 0):
        found.append(f"{scale=}: it must be a positive number")
    if skip_threshold is not None:
        found.append(f"{skip_threshold=}: parts of a row are computed apart, none of them is late; pass None")
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


def from_head(lane: tuple[Tensor, int, int], first: int) -> Tensor:
    """A map tensor of `lanes` whose first head is ``first``."""
    return lane[0] if lane[2] == 0 else lane[0][:, first:]


class _Lists:
    """What every kernel here is handed about a map: lists by key block, lengths, starts, bias, and their strides."""

    def __init__(self, q: Tensor, blocks: BlockMap) -> None:
        batch, self.slots, heads, d = q.shape
        turned = transpose(blocks)
        self.blocks, self.width, self.bk = blocks, Width.of(d), blocks.k.block
        self.index, self.count = lanes(blocks.index, batch, heads), lanes(blocks.count, batch, heads)
        self.begin, self.row = lanes(turned.offset, batch, heads), lanes(turned.row, batch, heads)
        self.full, self.full_count = lanes(turned.full, batch, heads), lanes(turned.full_count, batch, heads)
        self.q_length = lanes(blocks.q.length, batch, heads)
        self.k = map_lanes(blocks.k, batch, heads)
        self.bias = self.k[:3] if blocks.key_bias is None else lanes(blocks.key_bias, batch, heads)
        self.capacity = max(1, blocks.capacity)

    def sides(self, first: int) -> tuple[Tensor, ...]:
        k = self.k
        return tuple(from_head(x, first) for x in (self.q_length, k[:3], (k[3], *k[4:]), self.bias))

    @property
    def side_strides(self) -> tuple[int, ...]:
        return (*self.q_length[1:], *self.k[1:3], *self.k[4:], *self.bias[1:])

    def groups(self, x: Tensor) -> Iterator[slice]:
        """Heads whose parts fit."""
        batch, slots, heads, d = x.shape
        room = max(1, PARTS // (batch * slots * self.capacity * (d + 1) * 4))
        yield from (slice(first, min(first + room, heads)) for first in range(0, heads, room))


def _flags(q: Tensor, found: _Lists) -> dict[str, int | bool]:
    chosen = config(found.width, found.bk, q.element_size())
    return {
        "BK": found.bk, "BM": chosen.bm, "BN": chosen.bn,
        "D": q.shape[-1], "D1": found.width.D1, "D2": found.width.D2,
        "STARTS_K": found.blocks.k.start is not None, "BIAS": found.blocks.key_bias is not None,
        "NATURAL": natural(q.dtype), "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip


def _by_entry(x: Tensor) -> tuple[int, int, int, int]:
    """``[B, H, S, M, ...]`` -> strides over batch, head, slot and list entry."""
    return x.stride(0), x.stride(1), x.stride(2), x.stride(3)


@on_its_device
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, scale: float, skip_threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Implements `vsparse.reference.block_sparse_attention` for maps whose query blocks are single tokens."""
    assert skip_threshold is None
    batch, slots, _, d = q.shape
    found = _Lists(q, blocks)
    flags, keys = _flags(q, found), blocks.k.blocks
    out, lse = (torch.empty(x, dtype=y, device=q.device) for x, y in ((q.shape, q.dtype), (q.shape[:3], torch.float32)))
    tiles = triton.cdiv(slots, int(flags["BM"]))
    by_head = (found.index, found.begin, found.row)
    direct = (*strides(out)[:3], 0, lse.stride(0), lse.stride(2), lse.stride(1), 0)
    for group in found.groups(q):
        first, number = group.start, group.stop - group.start
        part = torch.empty(batch, number, slots, found.capacity, d, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(part.shape[:4], dtype=torch.float32, device=q.device)
        inputs = tuple(x[:, :, group] for x in (q, k, v))
        shared = (in_base(scale, q.dtype), *strides(q), *strides(k), *strides(v))
        rest = (*found.side_strides, keys, blocks.capacity, tiles)
        index, begin, row = (from_head(x, first) for x in by_head)
        attend_rows[(keys * tiles, number, batch)](
            *inputs, part, part_lse, index, begin, row, *found.sides(first), *shared,
            *_by_entry(part), *_by_entry(part_lse), *found.index[1:], *found.begin[1:], *found.row[1:], *rest,
            LISTED=True, **flags,
        )  # fmt: skip
        attend_rows[(tiles, number, batch)](
            *inputs, out[:, :, group], lse[:, :, group], index,
            from_head(found.full_count, first), from_head(found.full, first), *found.sides(first), *shared,
            *direct, *found.index[1:], *found.full_count[1:], *found.full[1:], *rest,
            LISTED=False, **flags,
        )  # fmt: skip
        _combine(part, part_lse, out[:, :, group], lse[:, :, group], found, first)
    return out, lse


def _combine(part: Tensor, part_lse: Tensor | None, out: Tensor, lse: Tensor | None, found: _Lists, first: int) -> None:
    """Merge (with LSE) or sum (without) the parts of every row that is not full into ``out``."""
    batch, slots, number, d = out.shape
    by_part = (0, 0, 0, 0) if part_lse is None else _by_entry(part_lse)
    by_lse = (0, 0, 0) if lse is None else (lse.stride(0), lse.stride(2), lse.stride(1))
    combine[(triton.cdiv(slots, ROWS), number, batch)](
        part, part if part_lse is None else part_lse, out, part if lse is None else lse,
        from_head(found.count, first), from_head(found.q_length, first),
        *_by_entry(part), *by_part, *strides(out)[:3], *by_lse, *found.count[1:], *found.q_length[1:],
        slots, found.blocks.k.blocks, found.blocks.capacity,
        ROWS=ROWS, D=d, COLUMNS=triton.next_power_of_2(d), WEIGHTED=lse is not None, num_warps=4,
    )  # fmt: skip


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
    """Implements `vsparse.reference.block_sparse_attention_backward` for such maps."""
    batch, slots, heads, d = q.shape
    found = _Lists(q, blocks)
    flags, keys = _flags(q, found), blocks.k.blocks
    delta, shift = prepared(grad_out, grad_lse, out, lse)
    scales = (in_base(scale, q.dtype), scale)
    by_input = (*strides(q), *strides(k), *strides(v), *strides(grad_out))
    by_statistics = (delta.stride(0), delta.stride(1))
    dq, dk, dv = torch.empty(q.shape, dtype=q.dtype, device=q.device), *(_zeros(x, flags) for x in (k, v))
    tiles = triton.cdiv(slots, int(flags["BM"]))
    rest = (*found.side_strides, keys, blocks.capacity, tiles)
    for group in found.groups(q):
        first, number = group.start, group.stop - group.start
        part = torch.empty(batch, number, slots, found.capacity, d, dtype=torch.float32, device=q.device)
        inputs = (*(x[:, :, group] for x in (q, k, v, grad_out)), delta[:, group], shift[:, group])
        index, begin, row = (from_head(x, first) for x in (found.index, found.begin, found.row))
        grad_rows[(keys * tiles, number, batch)](
            *inputs, part, index, begin, row, *found.sides(first), *scales, *by_input, *_by_entry(part), *by_statistics,
            *found.index[1:], *found.begin[1:], *found.row[1:], *rest, LISTED=True, **flags,
        )  # fmt: skip
        grad_rows[(tiles, number, batch)](
            *inputs, dq[:, :, group], index, from_head(found.full_count, first), from_head(found.full, first),
            *found.sides(first), *scales, *by_input, *strides(dq)[:3], 0, *by_statistics,
            *found.index[1:], *found.full_count[1:], *found.full[1:], *rest, LISTED=False, **flags,
        )  # fmt: skip
        _combine(part, None, dq[:, :, group], None, found, first)
    grad_blocks[(keys * triton.cdiv(found.bk, int(flags["BN"])), heads, batch)](
        q, k, v, grad_out, delta, shift, dk, dv, found.begin[0], found.row[0], found.full[0], found.full_count[0],
        *found.sides(0), *scales, *by_input, *strides(dk)[:3], *by_statistics,
        *found.begin[1:], *found.row[1:], *found.full[1:], *found.full_count[1:], *found.side_strides, **flags,
    )  # fmt: skip
    return dq, dk, dv


def _zeros(x: Tensor, flags: dict[str, int | bool]) -> Tensor:
    """Where a key gradient is written; with starts there may be slots of no block, which no program writes."""
    make = torch.zeros if flags["STARTS_K"] else torch.empty
    return make(x.shape, dtype=x.dtype, device=x.device)
