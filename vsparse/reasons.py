"""Why a method cannot run on a video or a device."""

from __future__ import annotations

import torch

from vsparse import backend
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Blocking, Layout
from vsparse.methods.base import Method, Site

__all__ = ["grid_reasons", "kernel_reasons"]


def grid_reasons(method: Method, grid: Grid) -> list[str]:
    """Why a method cannot run on a video, whose size is known only when it is called."""
    if "time" not in method.requires or grid.t > 1:
        return []
    return [
        f"{method.key} needs 'time', more than one latent frame, and this video has one; generate more frames, or "
        "choose a method that does without"
    ]


def kernel_reasons(method: Method, layout: Layout, site: Site, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why the attention op cannot run a method on a device; asks the implementations about tensors without data."""
    meta = layout.to("meta") if layout.length.device.type != "meta" else layout
    blocking = Blocking(length=meta.length, block=meta.block, start=meta.start)
    q = torch.empty(1, layout.slots, site.heads, site.head_dim, dtype=dtype, device="meta")
    options = {"scale": site.head_dim**-0.5, "skip_threshold": None, **method.kernel_options()}
    return backend.reasons("block_sparse_attention", device.type, q, q, q, BlockMap.full(blocking), **options)
