"""The launch configuration: a pure function of sizes and dtype."""

from __future__ import annotations

from typing import NamedTuple

from vsparse.kernels.tiles import Width, tile_rows


class Config(NamedTuple):
    """Gathered query rows and key rows of a tile, warps of a program, depth of the copy pipeline."""

    bm: int
    bn: int
    warps: int
    stages: int


def config(width: Width, k_block: int, itemsize: int) -> Config:
    """Tiles for ``width`` columns, key blocks of ``k_block`` slots and elements of ``itemsize`` bytes."""
    if itemsize == 4 or width.D1 + width.D2 > 128:
        return Config(32, tile_rows(k_block, 32), 4, 1)
    return Config(64, tile_rows(k_block, 64), 4, 1)
