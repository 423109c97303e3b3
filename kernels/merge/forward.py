"""Forward kernel: the weighted sum of the parts."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import load_tile, store_tile

from .device import union


@triton.jit
def merge(
    p_outs,
    p_lses,
    p_out,
    p_lse,
    s_outs,
    s_lses,
    SLOTS,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
):
    """``LSE = log sum_i exp(LSE_i)``, ``out = sum_i exp(LSE_i - LSE) out_i``: one program for ROWS slots of a head.

    Pointers and strides of the parts come as tuples, and the loops over them are unrolled: every part is read once.
    """
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = i_tile * ROWS
    n_rows = SLOTS - first
    # [ROWS]
    o_row = first.to(tl.int64) + tl.arange(0, ROWS)
    m_row = o_row < SLOTS
    b_weights, b_lse = union(p_lses, s_lses, i_b, i_h, o_row, m_row, PARTS)
    # [ROWS, D]
    b_out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.static_range(PARTS):
        o_first = i_b.to(tl.int64) * s_outs[4 * i] + i_h.to(tl.int64) * s_outs[4 * i + 1]
        p_part = p_outs[i] + o_first + first.to(tl.int64) * s_outs[4 * i + 2]
        b_part = load_tile(p_part, n_rows, s_outs[4 * i + 2], s_outs[4 * i + 3], ROWS, 0, COLUMNS, D, False)
        b_out += b_weights[i][:, None] * b_part.to(tl.float32)
    heads = tl.num_programs(1)
    lane = i_b.to(tl.int64) * SLOTS * heads + i_h
    store_tile(p_out + (lane + first.to(tl.int64) * heads) * D, b_out, n_rows, heads * D, ROWS, 0, COLUMNS, D)
    tl.store(p_lse + lane + o_row * heads, b_lse.to(p_lse.dtype.element_ty), mask=m_row)
