"""Tiles of the pooling kernels, which only move memory."""

from __future__ import annotations

from typing import NamedTuple

import triton

from vsparse.kernels.tiles import tile_rows

ELEMENTS = 4096  # of a tile: 32 per thread, three of which the forward holds at once


class Config(NamedTuple):
    """How the kernels are launched.

    Args:
        rows: Slots of a tile. columns: a power of two that covers the head dimension. warps: per program.
    """

    rows: int
    columns: int
    warps: int


def config(block: int, d: int) -> Config:
    """The configuration for blocks of this many slots and this head dimension."""
    columns = max(16, int(triton.next_power_of_2(d)))
    return Config(tile_rows(block, ELEMENTS // columns), columns, 4)
