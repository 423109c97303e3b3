"""Host side: what the pooling kernels refuse, what they are handed, where they write."""

from __future__ import annotations

import torch
from torch import Tensor

from vsparse.kernels.tiles import map_lanes, on_its_device, reasons, strides
from vsparse.layouts import Blocking

from .backward import spread
from .forward import pool
from .tuning import config

__all__ = ["block_pool", "block_pool_backward", "unsupported", "unsupported_backward"]


def unsupported(x: Tensor, blocking: Blocking) -> list[str]:
    """Why the forward kernel cannot run this; empty when it can."""
    return reasons(x, width=x.shape[-1])


def unsupported_backward(grad: Tensor, x: Tensor, blocking: Blocking) -> list[str]:
    """Why the backward kernel cannot run this; empty when it can."""
    return reasons(grad, x, width=x.shape[-1])


@on_its_device
def block_pool(x: Tensor, blocking: Blocking) -> tuple[Tensor, Tensor]:
    """Implements `vsparse.reference.block_pool`."""
    batch, _, heads, d = x.shape
    side, chosen = map_lanes(blocking, batch, heads), config(blocking.block, d)
    mean = x.new_empty(batch, blocking.blocks, heads, d, dtype=torch.float32)
    similarity = x.new_empty(batch, blocking.blocks, heads, dtype=torch.float32)
    pool[(blocking.blocks, heads, batch)](
        x, mean, similarity, side[0], side[3], *strides(x), *side[1:3], *side[4:],
        BLOCK=blocking.block, ROWS=chosen.rows, COLUMNS=chosen.columns, D=d, STARTS=blocking.start is not None,
        num_warps=chosen.warps,
    )  # fmt: skip
    return mean, similarity


@on_its_device
def block_pool_backward(grad: Tensor, x: Tensor, blocking: Blocking) -> Tensor:
    """Implements `vsparse.reference.block_pool_backward`."""
    batch, _, heads, d = x.shape
    side, chosen = map_lanes(blocking, batch, heads), config(blocking.block, d)
    # With starts there may be slots of no block, which no program writes.
    dx = x.new_empty(x.shape) if blocking.start is None else x.new_zeros(x.shape)
    spread[(blocking.blocks, heads, batch)](
        grad, dx, side[0], side[3], *strides(grad), *strides(dx)[:3], *side[1:3], *side[4:],
        BLOCK=blocking.block, ROWS=chosen.rows, COLUMNS=chosen.columns, D=d, STARTS=blocking.start is not None,
        num_warps=chosen.warps,
    )  # fmt: skip
    return dx
