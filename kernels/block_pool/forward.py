"""Forward kernel: mean and self-similarity of each block."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import load_tile


@triton.jit
def pool(
    p_x,
    p_mean,
    p_similarity,
    p_length,
    p_start,
    s_xb,
    s_xh,
    s_xs,
    s_xd,
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
    """``mean = sum x / n`` and ``similarity = || sum x / |x| ||^2 / n^2`` over the n valid slots of one block.

    The second is the mean pairwise cosine similarity (SpargeAttn, arXiv 2502.18137, section 3.3). Tiles are added
    element by element and summed over rows once, at the end. Slots without a token are not read.
    """
    i_k, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(p_length + i_b * s_length_b + i_h * s_length_h + i_k)
    slot = i_k * BLOCK
    if STARTS:
        slot = tl.load(p_start + i_b * s_start_b + i_h * s_start_h + i_k)
    p_x += i_b.to(tl.int64) * s_xb + i_h.to(tl.int64) * s_xh + slot.to(tl.int64) * s_xs
    # [ROWS, D]
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_direction = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, length, ROWS):
        b_x = load_tile(p_x, length - first, s_xs, s_xd, ROWS, 0, COLUMNS, D, False).to(tl.float32)
        # [ROWS]
        b_norm = tl.math.sqrt_rn(tl.sum(b_x * b_x, 1))
        b_norm = tl.where(b_norm > 0, b_norm, 1.0)
        # [ROWS, D]
        b_sum += b_x
        b_direction += b_x / b_norm[:, None]
        p_x += ROWS * s_xs

    # [D]
    n = tl.maximum(length, 1).to(tl.float32)
    b_mean = tl.math.div_rn(tl.sum(b_sum, 0), n)
    b_spread = tl.sum(b_direction, 0) / n
    o_d = tl.arange(0, COLUMNS)
    pooled = (i_b.to(tl.int64) * tl.num_programs(0) + i_k) * tl.num_programs(1) + i_h
    tl.store(p_mean + pooled * D + o_d, b_mean, mask=o_d < D)
    tl.store(p_similarity + pooled, tl.sum(b_spread * b_spread, 0))
