"""What both merging kernels compute: the weights of the parts and the LSE of their union."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def union(p_lses, s_lses, i_b, i_h, o_row, m_row, PARTS: tl.constexpr):
    """``w_i = exp(LSE_i - LSE)`` of every part, a tuple of ``[ROWS]``, and ``LSE = log sum_i exp(LSE_i)``.

    Where the LSE is infinite the weights are 0. ``s_lses`` holds the strides of batch, head and slot of each part.
    """
    b_lses = ()
    for i in tl.static_range(PARTS):
        o_lane = i_b.to(tl.int64) * s_lses[3 * i] + i_h.to(tl.int64) * s_lses[3 * i + 1]
        b_part = tl.load(p_lses[i] + o_lane + o_row * s_lses[3 * i + 2], mask=m_row, other=-float("inf"))
        b_lses += (b_part.to(tl.float32),)
    # [ROWS]
    b_top = b_lses[0]
    for i in tl.static_range(1, PARTS):
        b_top = tl.maximum(b_top, b_lses[i])
    m_some = tl.abs(b_top) != float("inf")
    b_shift = tl.where(m_some, b_top, 0.0)
    b_sum = tl.zeros_like(b_top)
    for i in tl.static_range(PARTS):
        b_sum += tl.exp(b_lses[i] - b_shift)
    b_sum = tl.where(m_some, b_sum, 1.0)
    b_weights = ()
    for i in tl.static_range(PARTS):
        b_weights += (tl.where(m_some, tl.exp(b_lses[i] - b_shift) / b_sum, 0.0),)
    return b_weights, b_top + tl.log(b_sum)
