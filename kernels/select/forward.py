"""One row of scores to one list, by bisection over the bits of the scores: no sort, no mask in memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order(b_score):
    """float32 -> uint32 with the same order; equal numbers (0 and -0) give equal keys, NaN is above +inf."""
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_score == 0.0, 0, b_bits)
    b_bits = tl.where(b_score != b_score, 0x7FC00000, b_bits)
    # Negative numbers are turned over; then the sign bit is.
    return (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def best(b_key, number):
    """The ``number`` largest keys, of equal ones those with the lower index."""
    floor = tl.zeros([1], tl.uint32)
    for i_bit in tl.static_range(32):
        trial = floor | (1 << (31 - i_bit))
        enough = tl.sum((b_key >= trial).to(tl.int32), 0) >= number
        floor = tl.where(enough, trial, floor)
    m_above = b_key > floor
    m_equal = b_key == floor
    missing = number - tl.sum(m_above.to(tl.int32), 0)
    return m_above | (m_equal & (tl.cumsum(m_equal.to(tl.int32), 0) <= missing))


@triton.jit
def until(b_key, b_weight, goal, CROSSING: tl.constexpr):
    """The largest keys until their weights sum to ``goal``, with or without the one that crosses it; float64 sums."""
    floor = tl.zeros([1], tl.uint32)
    for i_bit in tl.static_range(32):
        trial = floor | (1 << (31 - i_bit))
        total = tl.sum(tl.where(b_key >= trial, b_weight, 0.0), 0)
        if CROSSING:
            floor = tl.where(total >= goal, trial, floor)
        else:
            floor = tl.where(total > goal, trial, floor)
    m_above = b_key > floor
    b_equal = tl.where(b_key == floor, b_weight, 0.0)
    above = tl.sum(tl.where(m_above, b_weight, 0.0), 0)
    b_reached = above + tl.cumsum(b_equal, 0)
    if CROSSING:
        m_fits = b_reached - b_equal < goal
    else:
        m_fits = b_reached <= goal
    return m_above | ((b_key == floor) & m_fits)


@triton.jit
def select(
    p_scores,
    p_length,
    p_forced,
    p_limit,
    p_index,
    p_count,
    s_scores_b,
    s_scores_h,
    s_scores_q,
    s_scores_k,
    s_length_b,
    s_length_h,
    s_forced_b,
    s_forced_h,
    s_forced_q,
    s_forced_k,
    s_limit_b,
    s_limit_h,
    s_limit_q,
    K,
    M,
    least,
    COLUMNS: tl.constexpr,
    RULE: tl.constexpr,
    BUDGET: tl.constexpr,
    LEAST: tl.constexpr,
    FORCED: tl.constexpr,
):
    """Lists of the best key blocks of one row: `vsparse.reference.select_blocks`. A program is a row."""
    i_q, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.num_programs(0)
    o_k = tl.arange(0, COLUMNS)
    m_k = o_k < K
    p_scores += i_b.to(tl.int64) * s_scores_b + i_h.to(tl.int64) * s_scores_h + i_q.to(tl.int64) * s_scores_q
    # [COLUMNS]
    b_score = tl.load(p_scores + o_k * s_scores_k, mask=m_k, other=-float("inf")).to(tl.float32)
    m_used = tl.load(p_length + i_b * s_length_b + i_h * s_length_h + o_k, mask=m_k, other=0) > 0
    m_forced = m_k & False
    if FORCED:
        p_forced += i_b.to(tl.int64) * s_forced_b + i_h.to(tl.int64) * s_forced_h + i_q.to(tl.int64) * s_forced_q
        m_forced = tl.load(p_forced + o_k * s_forced_k, mask=m_k, other=0) != 0
    b_ranked = tl.where(m_used, b_score, -float("inf"))
    if BUDGET == "exempt":
        b_ranked = tl.where(m_forced, -float("inf"), b_ranked)
    if BUDGET == "compete":
        b_ranked = tl.where(m_forced, float("inf"), b_ranked)
    m_open = b_ranked > -float("inf")
    b_key = tl.where(m_k, order(b_ranked), 0)
    limit = tl.load(p_limit + i_b * s_limit_b + i_h * s_limit_h + i_q * s_limit_q)
    if RULE == "count":
        m_keep = best(b_key, tl.maximum(limit, least))
    else:
        if RULE == "value":
            m_keep = b_ranked.to(tl.float64) >= limit
        else:
            b_weight = tl.where(m_open & m_used, b_score, 0.0).to(tl.float64)
            m_keep = until(b_key, b_weight, limit * tl.sum(b_weight, 0), RULE == "reach")
            m_keep = m_keep | (tl.zeros([COLUMNS], tl.float64) + limit >= 1.0)
        if LEAST:
            m_keep = m_keep | best(b_key, least)
    m_keep = (m_keep & m_open) | m_forced
    b_place = tl.cumsum(m_keep.to(tl.int32), 0) - 1
    row = (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * rows + i_q
    tl.store(p_index + row * M + b_place, o_k, mask=m_keep & (b_place < M))
    tl.store(p_count + row, tl.sum(m_keep.to(tl.int32), 0))
