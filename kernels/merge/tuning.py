"""Tiles of the merging kernels, which only move memory."""

from __future__ import annotations

from typing import NamedTuple

import triton

from vsparse.kernels.tiles import tile_rows

ELEMENTS = 2048  # of a tile: 16 per thread of each part that is in flight


class Config(NamedTuple):
    """How the kernels are launched.

    Args:
        rows: Slots of a tile. columns: a power of two that covers the head dimension. warps: per program.
    """

    rows: int
    columns: int
    warps: int


def config(slots: int, d: int) -> Config:
    """The configuration for sequences of this many slots and this head dimension."""
    columns = max(16, int(triton.next_power_of_2(d)))
    return Config(tile_rows(slots, ELEMENTS // columns), columns, 4)
