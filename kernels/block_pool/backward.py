"""Backward kernel: the gradient of the mean, spread over the slots of each block."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import store_tile


@triton.jit
def spread(
    p_grad,
    p_dx,
    p_length,
    p_start,
    s_gb,
    s_gh,
    s_gs,
    s_gd,
    s_db,
    s_dh,
    s_ds,
    s_length_b,
    s_length_h,
    s_start_b,
    s_start_h,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    STARTS: tl.constexpr,
):
    """``dX = grad / n`` in the n valid slots of one block, 0 in its others; with starts those belong to nobody."""
    i_k, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(p_length + i_b * s_length_b + i_h * s_length_h + i_k)
    slot, n_slots = i_k * BLOCK, BLOCK
    if STARTS:
        slot, n_slots = tl.load(p_start + i_b * s_start_b + i_h * s_start_h + i_k), length
    p_grad += i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh + i_k.to(tl.int64) * s_gs
    p_dx += i_b.to(tl.int64) * s_db + i_h.to(tl.int64) * s_dh + slot.to(tl.int64) * s_ds
    o_row, o_d = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # [D]
    b_share = tl.load(p_grad + o_d * s_gd, mask=o_d < D, other=0.0).to(tl.float32)
    b_share = tl.math.div_rn(b_share, tl.maximum(length, 1).to(tl.float32))
    for first in range(0, n_slots, ROWS):
        # [ROWS, D]
        b_dx = tl.where((first + o_row < length)[:, None], b_share[None, :], 0.0)
        store_tile(p_dx, b_dx, n_slots - first, s_ds, ROWS, 0, COLUMNS, D)
        p_dx += ROWS * s_ds
