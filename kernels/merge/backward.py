"""Backward kernel: the gradients of every part."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import load_tile, store_tile

from .device import union


@triton.jit
def grad_parts(
    p_grad,
    p_grad_lse,
    p_outs,
    p_lses,
    p_d_outs,
    p_d_lses,
    s_gb,
    s_gh,
    s_gs,
    s_gd,
    s_lb,
    s_lh,
    s_ls,
    s_outs,
    s_lses,
    SLOTS,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):
    """``dOut_i = w_i dOut``, ``dLSE_i = w_i (dLSE + dOut . (out_i - out))`` with ``w_i = exp(LSE_i - LSE)``.

    Since the weights add up to 1, ``dOut . (out_i - out) = sum_j w_j (dOut . out_i - dOut . out_j)``: every part is
    read once, and where one part outweighs the others nothing cancels.
    """
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = i_tile * ROWS
    n_rows = SLOTS - first
    # [ROWS]
    o_row = first.to(tl.int64) + tl.arange(0, ROWS)
    m_row = o_row < SLOTS
    b_weights, b_lse = union(p_lses, s_lses, i_b, i_h, o_row, m_row, PARTS)
    # [ROWS, D]
    p_grad += i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh + first.to(tl.int64) * s_gs
    b_grad = load_tile(p_grad, n_rows, s_gs, s_gd, ROWS, 0, COLUMNS, D, False).to(tl.float32)
    heads = tl.num_programs(1)
    lane = i_b.to(tl.int64) * SLOTS * heads + i_h
    tile = (lane + first.to(tl.int64) * heads) * D
    # [ROWS]
    b_dots = ()
    for i in tl.static_range(PARTS):
        o_first = i_b.to(tl.int64) * s_outs[4 * i] + i_h.to(tl.int64) * s_outs[4 * i + 1]
        p_part = p_outs[i] + o_first + first.to(tl.int64) * s_outs[4 * i + 2]
        b_part = load_tile(p_part, n_rows, s_outs[4 * i + 2], s_outs[4 * i + 3], ROWS, 0, COLUMNS, D, False)
        b_dots += (tl.sum(b_grad * b_part.to(tl.float32), 1),)
        store_tile(p_d_outs[i] + tile, b_weights[i][:, None] * b_grad, n_rows, heads * D, ROWS, 0, COLUMNS, D)
    b_through = tl.zeros([ROWS], tl.float32)
    if GRAD_LSE:
        p_grad_lse += i_b.to(tl.int64) * s_lb + i_h.to(tl.int64) * s_lh
        b_grad_lse = tl.load(p_grad_lse + o_row * s_ls, mask=m_row, other=0.0).to(tl.float32)
        b_through = tl.where(tl.abs(b_lse) == float("inf"), 0.0, b_grad_lse)
    for i in tl.static_range(PARTS):
        b_arriving = b_through
        for j in tl.static_range(PARTS):
            b_arriving += b_weights[j] * (b_dots[i] - b_dots[j])
        b_arriving *= b_weights[i]
        tl.store(p_d_lses[i] + lane + o_row * heads, b_arriving.to(p_d_lses[i].dtype.element_ty), mask=m_row)
