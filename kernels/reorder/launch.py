"""Host side: what the kernel refuses, what it is handed, where it writes."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vsparse.kernels.tiles import lanes, on_its_device, reasons, strides

from .forward import move

__all__ = ["reorder", "unsupported"]

ELEMENTS = 4096  # of a tile: 32 per thread


def unsupported(x: Tensor, index: Tensor) -> list[str]:
    """Why the kernel cannot run this; empty when it can."""
    return reasons(x, width=x.shape[-1])


@on_its_device
def reorder(x: Tensor, index: Tensor) -> Tensor:
    """Implements `vsparse.reference.reorder`."""
    batch, _, heads, d = x.shape
    slots, columns = index.shape[-1], int(triton.next_power_of_2(d))
    order, rows = lanes(index, batch, heads), ELEMENTS // columns
    y = torch.empty(batch, slots, heads, d, dtype=x.dtype, device=x.device)
    # Heads vary fastest: programs that run together read and write the same rows.
    move[(heads, triton.cdiv(slots, rows), batch)](
        x, y, order[0], *strides(x), *strides(y)[:3], *order[1:], slots, ROWS=rows, D=d, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return y
