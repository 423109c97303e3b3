"""The launch configurations, and what their compiled code must keep to: pure functions of sizes and dtype."""

from __future__ import annotations

from typing import NamedTuple

from vsparse.kernels.block_sparse.tuning import Limits
from vsparse.kernels.tiles import Width, tile_rows


class Config(NamedTuple):
    """Query rows and key rows of a tile, warps of a program, depth of the copy pipeline."""

    bm: int
    bn: int
    warps: int
    stages: int


def config(width: Width, k_block: int, itemsize: int) -> Config:
    """Tiles for ``width`` columns, key blocks of ``k_block`` slots and elements of ``itemsize`` bytes."""
    if itemsize == 4 or width.D1 + width.D2 > 128:
        return Config(32, tile_rows(k_block, 32), 4, 1)
    return Config(64, tile_rows(k_block, 64), 4, 1)


def keys_config(step: str, width: Width, q_block: int, itemsize: int) -> Config:
    """Tiles of gathered keys. ``step``: a kernel of `KEYS_LIMITS` with products; ``q_block``: slots of a query block.

    The kernels that walk a list copy ahead, because they know their next keys. `grad_entries` has one or two steps, and
    two accumulators: tiles of 32 queries keep it out of local memory.
    """
    entries = step == "grad_entries"
    if itemsize == 4 or width.D1 + width.D2 > 128:
        return Config(tile_rows(q_block, 32), 32, 4, 1)
    return Config(tile_rows(q_block, 32 if entries else 64), 64, 4, 1 if entries else 2)


# What the code compiled for `keys_config` must keep to, by kernel, for blocks of at least 64 queries.
KEYS_LIMITS = {
    "attend_list": Limits(2),
    "grad_list": Limits(2),
    "grad_entries": Limits(2, spill=32),
    "sum_entries": Limits(4, spill=32),
}
