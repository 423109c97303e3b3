"""The launch configuration of the mass kernel: a pure function of architecture, shape and dtype."""

from __future__ import annotations

import dataclasses as dc

import triton

from vsparse.kernels.block_sparse import tuning
from vsparse.kernels.tiles import Width, tile_rows


@dc.dataclass(frozen=True)
class Config(tuning.Config):
    """How the kernel is compiled and launched.

    Args:
        blocks: Query blocks that share a tile, each with ``bm / blocks`` of its rows; a power of two.
    """

    blocks: int = 1


def config(arch: int, width: Width, rows: int, blocks: int, k_block: int, itemsize: int) -> Config:
    """The configuration of the mass kernel, which keeps a tile of Q and streams K through it.

    Args:
        arch: 80, 89, 90, ...; 0: unknown, the smallest is chosen. width: head dimension.
        rows: Query rows of a block that count. blocks: most query blocks that may share a tile, because they walk the
            same key blocks. k_block: BK. itemsize: bytes of an element of q.
    """
    columns = width.D1 + width.D2
    # Products in full float32: small tiles, so that nothing spills.
    most_m, most_n = (32, 32) if itemsize == 4 else (128, 64)
    each = min(most_m, int(triton.next_power_of_2(max(1, rows))))
    bm, bn = tile_rows(each * blocks, most_m), tile_rows(k_block, most_n)
    shallow = arch in (0, 89) or columns > 128  # 99 KB of shared memory, or rows of 512 bytes
    stages = 1 if itemsize == 4 else 2 if shallow else 3
    warps = 8 if bm == 128 else 4
    # With 128 registers per thread two programs of 8 warps fit a multiprocessor. Not every device takes the limit.
    registers = 128 if arch and warps == 8 else None
    return Config(bm, bn, warps, stages, registers, blocks=1 if blocks == 1 else bm // each)
