"""What the Triton kernels share: tiles of strided tensors on the device, launch arguments on the host."""

from __future__ import annotations

from .descriptors import described, undescribed
from .host import Width, architecture, lanes, map_lanes, on_its_device, reasons, strides, tile_rows
from .language import (
    LN2,
    LOG2E,
    absorb,
    copy_rows,
    from_natural,
    gather_tile,
    load_rows,
    load_tile,
    power,
    scatter_tile,
    store_tile,
    to_natural,
)

__all__ = [
    "LN2",
    "LOG2E",
    "Width",
    "absorb",
    "architecture",
    "copy_rows",
    "described",
    "from_natural",
    "gather_tile",
    "lanes",
    "load_rows",
    "load_tile",
    "map_lanes",
    "on_its_device",
    "power",
    "reasons",
    "scatter_tile",
    "store_tile",
    "strides",
    "tile_rows",
    "to_natural",
    "undescribed",
]
