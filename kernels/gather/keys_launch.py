"""Host side of the kernels that gather keys: tiles of listed keys, and parts of dK and dV a few rows at a time."""

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

from .keys_backward import grad_entries, grad_list, sum_entries
from .keys_forward import attend_list
from .launch import from_head
from .tuning import Config, keys_config

__all__ = ["block_sparse_attention", "block_sparse_attention_backward", "unsupported", "unsupported_backward"]

# A tile of the kernels in `block_sparse` has 16 keys at the least: with blocks of more than half of that, it does.
LARGEST_BLOCK = 8
ROWS = 16  # keys whose parts one program sums
# Bytes of the parts that are held at once; those of one query block of one head at least.
PARTS = 1 << 28


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, scale: float, skip_threshold: float | None = None
) -> list[str]:
    """Why the forward kernel cannot run this; empty when it can."""
    found = reasons(q, k, v, width=q.shape[-1])
    if blocks.k.block > LARGEST_BLOCK:
        found.append(f"key blocks of {blocks.k.block} slots: keys are gathered from blocks of at most {LARGEST_BLOCK}")
    if not (math.isfinite(scale) and scale > 0):
        found.append(f"{scale=}: it must be a positive number")
    if skip_threshold is not None:
        found.append(f"{skip_threshold=}: a tile holds keys of many blocks, none of which is late alone; pass None")
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


class _Map:
    """What every kernel here is handed about a map, and its strides."""

    def __init__(self, q: Tensor, blocks: BlockMap) -> None:
        batch, _, heads, d = q.shape
        self.blocks = blocks
        self.index, self.count = lanes(blocks.index, batch, heads), lanes(blocks.count, batch, heads)
        q_side, k_side = map_lanes(blocks.q, batch, heads), map_lanes(blocks.k, batch, heads)
        bias = k_side[:3] if blocks.key_bias is None else lanes(blocks.key_bias, batch, heads)
        self.k_length, self.k_start = k_side[:3], k_side[3:]
        self.sides = (q_side[:3], q_side[3:], self.k_length, self.k_start, bias)
        self.side_strides = tuple(stride for side in self.sides for stride in side[1:])
        self.width, self.itemsize = Width.of(d), q.element_size()
        self.flags = {
            "BQ": blocks.q.block, "BK": blocks.k.block, "D": d, "D1": self.width.D1, "D2": self.width.D2,
            "STARTS_Q": blocks.q.start is not None, "STARTS_K": blocks.k.start is not None,
            "BIAS": blocks.key_bias is not None, "NATURAL": natural(q.dtype),
        }  # fmt: skip

    def config(self, step: str) -> tuple[Config, dict[str, int]]:
        """The configuration of a kernel, and all constants that it is compiled with."""
        chosen = keys_config(step, self.width, self.blocks.q.block, self.itemsize)
        tiles = {"BM": chosen.bm, "BN": chosen.bn, "num_warps": chosen.warps, "num_stages": chosen.stages}
        return chosen, {**self.flags, **tiles}

    def tiles(self, rows: int) -> int:
        """Programs of a head that take ``rows`` of a query block each."""
        return self.blocks.q.blocks * int(triton.cdiv(self.blocks.q.block, rows))

    def of_sides(self, first: int = 0) -> tuple[Tensor, ...]:
        """Lengths, starts and bias, their first head ``first``."""
        return tuple(from_head(side, first) for side in self.sides)

    @property
    def listed(self) -> int:
        """Keys that a list can hold."""
        return self.blocks.capacity * self.blocks.k.block


@on_its_device
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, scale: float, skip_threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Implements `vsparse.reference.block_sparse_attention` for maps whose key blocks are a few tokens."""
    assert skip_threshold is None
    found, starts = _Map(q, blocks), blocks.q.start is not None
    # With starts there may be slots of no block, which no program writes.
    out = q.new_zeros(q.shape) if starts else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if starts:
        lse.fill_(-torch.inf)
    chosen, flags = found.config("attend_list")
    attend_list[(found.tiles(chosen.bm), q.shape[2], q.shape[0])](
        q, k, v, out, lse, found.index[0], found.count[0], *found.of_sides(), in_base(scale, q.dtype),
        *strides(q), *strides(k), *strides(v), *strides(out)[:3],
        *found.index[1:], *found.count[1:], *found.side_strides,
        q.shape[1], blocks.k.blocks, blocks.capacity, **flags,
    )  # fmt: skip
    return out, lse


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
    found = _Map(q, blocks)
    delta, shift = prepared(grad_out, grad_lse, out, lse)
    inputs = (q, k, v, grad_out, delta, shift)
    by_input = tuple(stride for x in inputs[:4] for stride in strides(x))
    scales = (in_base(scale, q.dtype), scale)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if blocks.q.start is not None else q.new_empty(q.shape)
    chosen, flags = found.config("grad_list")
    grad_list[(found.tiles(chosen.bm), q.shape[2], q.shape[0])](
        *inputs, dq, found.index[0], found.count[0], *found.of_sides(), *scales,
        *by_input, *_by_slot(dq), *delta.stride()[:2], dq.stride(1),
        *found.index[1:], *found.count[1:], *found.side_strides, blocks.k.blocks, blocks.capacity, **flags,
    )  # fmt: skip
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    _grad_keys(inputs, scales, dk, dv, found)
    return dq, dk, dv


def _by_slot(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(2)


def _grad_keys(inputs: tuple[Tensor, ...], scales: tuple[float, float], dk: Tensor, dv: Tensor, found: _Map) -> None:
    """dK and dV in float32, a few heads at a time: from the full rows, then from parts of some rows of the lists."""
    q = inputs[0]
    blocks, turned = found.blocks, transpose(found.blocks)
    batch, _, heads, d = q.shape
    begin, row = lanes(turned.offset, batch, heads), lanes(turned.row, batch, heads)
    full, full_count = lanes(turned.full, batch, heads), lanes(turned.full_count, batch, heads)
    by_input = tuple(stride for x in inputs[:4] for stride in strides(x))
    by_row = inputs[4].stride()[:2]
    keys = blocks.k.blocks * blocks.k.block
    chosen, flags = found.config("grad_entries")
    tiles, halvings = triton.cdiv(found.listed, chosen.bn), max(blocks.q.blocks, blocks.capacity).bit_length()
    for group, rows in _portions(found, batch, heads, d):
        first, number = group.start, group.stop - group.start
        given = (*(x[:, :, group] for x in inputs[:4]), *(x[:, group] for x in inputs[4:]))
        total = torch.zeros(2, batch, number, dk.shape[1], d, dtype=torch.float32, device=q.device)
        grad_entries[(triton.cdiv(keys, chosen.bn), number, batch)](
            *given, total[0], total[1], from_head(full, first), from_head(full_count, first), *found.of_sides(first),
            *scales, *by_input, *total.stride()[1:3], 0, d, *by_row,
            *full[1:], *full_count[1:], *found.side_strides,
            blocks.k.blocks, 0, triton.cdiv(keys, chosen.bn), 0, LISTED=False, **flags,
        )  # fmt: skip
        for low in range(0, blocks.q.blocks, rows) if tiles else ():
            high = min(low + rows, blocks.q.blocks)
            part = torch.empty(2, batch, number, high - low, found.listed, d, dtype=torch.float32, device=q.device)
            index, count = from_head(found.index, first), from_head(found.count, first)
            grad_entries[((high - low) * tiles, number, batch)](
                *given, part[0], part[1], index, count, *found.of_sides(first),
                *scales, *by_input, *part.stride()[1:5], *by_row,
                *found.index[1:], *found.count[1:], *found.side_strides,
                blocks.k.blocks, blocks.capacity, tiles, low, LISTED=True, **flags,
            )  # fmt: skip
            sum_entries[(triton.cdiv(keys, ROWS), number, batch)](
                total[0], total[1], part[0], part[1], index, count, from_head(begin, first), from_head(row, first),
                from_head(found.k_length, first), from_head(found.k_start, first),
                *total.stride()[1:4], *part.stride()[1:5], *found.index[1:], *found.count[1:], *begin[1:], *row[1:],
                *found.k_length[1:], *found.k_start[1:], blocks.k.blocks, blocks.capacity, low, high, halvings,
                BK=blocks.k.block, ROWS=ROWS, D=d, COLUMNS=triton.next_power_of_2(d),
                STARTS_K=blocks.k.start is not None, num_warps=4,
            )  # fmt: skip
        for target, sums in ((dk, total[0]), (dv, total[1])):
            target[:, :, group] = sums.transpose(1, 2)


def _portions(found: _Map, batch: int, heads: int, d: int) -> Iterator[tuple[slice, int]]:
    """Heads at a time, and query blocks at a time, so that their parts fit."""
    of_block = batch * max(1, found.listed) * d * 8
    room = max(1, PARTS // (of_block * found.blocks.q.blocks))
    rows = min(found.blocks.q.blocks, max(1, PARTS // of_block))
    for first in range(0, heads, room):
        yield slice(first, min(first + room, heads)), rows
