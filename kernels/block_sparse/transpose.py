"""Key-major lists on the device: what `vsparse.blocks.BlockMap.transpose` says, without its sort."""

from __future__ import annotations

import torch
import triton

from vsparse.blocks import BlockMap, Transposed
from vsparse.kernels.tiles import lanes

from .device import collect, mark

__all__ = ["transpose"]

ROWS, COLUMNS, SCANNED = 32, 64, 2048


def transpose(blocks: BlockMap) -> Transposed:
    """Implements `BlockMap.transpose`; entries past those in use hold anything.

    Rows are marked in a transposed bit mask (``Q * K / 8`` bytes a lane), counted, summed up and written. No sync.
    """
    batch, heads, queries = blocks.count.shape
    keys, words = blocks.k.blocks, triton.cdiv(queries, 32)
    entries = queries * blocks.capacity
    device = blocks.index.device
    index, count = lanes(blocks.index, batch, heads), lanes(blocks.count, batch, heads)
    bits = torch.zeros(batch, heads, keys, words, dtype=torch.int32, device=device)
    offset = torch.zeros(batch, heads, keys + 1, dtype=torch.int32, device=device)
    hits = torch.empty(batch, heads, keys, dtype=torch.int32, device=device)
    row = torch.empty(batch, heads, entries, dtype=torch.int32, device=device)
    full = torch.empty(batch, heads, queries, dtype=torch.int32, device=device)
    full_count = torch.empty(batch, heads, dtype=torch.int32, device=device)
    mark[(triton.cdiv(queries, ROWS), heads, batch)](
        index[0], count[0], bits, *index[1:], *count[1:], queries, keys, blocks.capacity, words,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    for write in (False, True):
        collect[(keys + 1, heads, batch)](
            bits, count[0], offset, hits, row, full, full_count, *count[1:], queries, keys, words, entries,
            COLUMNS=min(SCANNED, max(32, int(triton.next_power_of_2(queries)))), WRITE=write, num_warps=4,
        )  # fmt: skip
        if not write:
            torch.cumsum(hits, -1, dtype=torch.int32, out=offset[..., 1:])
    return Transposed(offset, row, full, full_count)
