"""Sparse attention for video diffusion transformers: one call puts it in, one call takes it out.

``import vsparse`` loads torch and the standard library; everything else is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "apply": "vsparse.patch",
    "plan": "vsparse.planning",
    "load": "vsparse.patch",
    "patch_of": "vsparse.patch",
    "Patch": "vsparse.patch",
    "Plan": "vsparse.planning",
    "list_methods": "vsparse.methods",
    "Method": "vsparse.methods",
    "Schedule": "vsparse.schedule",
    "Grid": "vsparse.geometry",
    "TileLayout": "vsparse.layouts",
    "RasterLayout": "vsparse.layouts",
    "PartitionLayout": "vsparse.layouts",
    "ClusterLayout": "vsparse.layouts",
    "CurveLayout": "vsparse.layouts",
    "Blocking": "vsparse.layouts",
    "BlockMap": "vsparse.blocks",
    "block_linear_attention": "vsparse.ops",
    "block_sparse_attention": "vsparse.ops",
    "block_mass": "vsparse.ops",
    "host_order_attention": "vsparse.ops",
    "search_attention": "vsparse.ops",
    "block_pool": "vsparse.ops",
    "merge_attention": "vsparse.ops",
    "unsupported": "vsparse.ops",
}
_MODULES = ("patterns", "select")

__all__ = [*_HOMES, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"vsparse.{name}")
    elif name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value = version("vsparse")
        except PackageNotFoundError:
            value = "0+uninstalled"
    else:
        raise AttributeError(f"module 'vsparse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
