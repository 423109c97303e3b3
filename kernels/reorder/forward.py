"""Rows of a sequence in another order."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import gather_tile, scatter_tile


@triton.jit
def move(
    p_x,
    p_y,
    p_index,
    s_xb,
    s_xh,
    s_xs,
    s_xd,
    s_yb,
    s_yh,
    s_ys,
    s_index_b,
    s_index_h,
    SLOTS,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``y[s] = x[index[s]]`` for ROWS slots of one head, zeros where the index is negative."""
    i_h, i_tile, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_slot = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_slot = o_slot < SLOTS
    # [ROWS]
    p_index += i_b.to(tl.int64) * s_index_b + i_h.to(tl.int64) * s_index_h
    b_row = tl.load(p_index + o_slot, mask=m_slot, other=-1).to(tl.int64)
    # [ROWS, COLUMNS]
    p_x += i_b.to(tl.int64) * s_xb + i_h.to(tl.int64) * s_xh
    b_x = gather_tile(p_x, b_row * s_xs, b_row >= 0, s_xd, 0, COLUMNS, D)
    p_y += i_b.to(tl.int64) * s_yb + i_h.to(tl.int64) * s_yh
    scatter_tile(p_y, o_slot * s_ys, b_x, m_slot, 0, COLUMNS, D)
