"""Kernels that turn row-major lists into key-major ones: bits of a transposed mask, then lists of its set bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mark(
    p_index,
    p_count,
    p_bits,
    s_index_b,
    s_index_h,
    s_count_b,
    s_count_h,
    Q,
    K,
    M,
    WORDS,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Set bit ``i % 32`` of ``bits[j, i // 32]`` where row i lists key block j; full rows are left out.

    Rows share words, hence an atomic OR: its result does not depend on the order.
    """
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_q = i_tile * ROWS + tl.arange(0, ROWS)
    m_q = o_q < Q
    # [ROWS]
    b_count = tl.load(p_count + i_b * s_count_b + i_h * s_count_h + o_q, mask=m_q, other=0)
    b_count = tl.where(b_count == K, 0, b_count)
    p_index += i_b.to(tl.int64) * s_index_b + i_h.to(tl.int64) * s_index_h
    p_bits += (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * K * WORDS
    b_bit = 1 << (o_q % 32)
    for first in range(0, tl.max(b_count, 0), COLUMNS):
        o_m = first + tl.arange(0, COLUMNS)
        # [ROWS, COLUMNS]
        m_used = o_m[None, :] < b_count[:, None]
        b_j = tl.load(p_index + o_q[:, None].to(tl.int64) * M + o_m[None, :], mask=m_used, other=0)
        p_word = p_bits + b_j.to(tl.int64) * WORDS + (o_q // 32)[:, None]
        tl.atomic_or(p_word, tl.broadcast_to(b_bit[:, None], [ROWS, COLUMNS]), mask=m_used)


@triton.jit
def collect(
    p_bits,
    p_count,
    p_offset,
    p_hits,
    p_row,
    p_full,
    p_full_count,
    s_count_b,
    s_count_h,
    Q,
    K,
    WORDS,
    ENTRIES,
    COLUMNS: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Count the rows that list a key block, or WRITE them, ascending. The last program does so for the full rows."""
    i_k, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    p_bits += (lane * K + i_k) * WORDS
    p_count += i_b * s_count_b + i_h * s_count_h
    listed = i_k < K
    begin = 0
    p_target = p_full + lane * Q
    if WRITE:
        begin = tl.load(p_offset + lane * (K + 1) + i_k, mask=listed, other=0)
        p_target = tl.where(listed, p_row + lane * ENTRIES + begin, p_target)
    found = 0
    for first in range(0, Q, COLUMNS):
        o_q = first + tl.arange(0, COLUMNS)
        m_q = o_q < Q
        # [COLUMNS]
        b_word = tl.load(p_bits + o_q // 32, mask=m_q & listed, other=0)
        b_full = tl.load(p_count + o_q, mask=m_q & (i_k == K), other=0) == K
        b_hit = tl.where(listed, (b_word >> (o_q % 32)) & 1, (b_full & m_q).to(tl.int32))
        if WRITE:
            tl.store(p_target + found + tl.cumsum(b_hit, 0) - 1, o_q, mask=b_hit > 0)
        found += tl.sum(b_hit, 0)
    if not WRITE:
        tl.store(p_hits + lane * K + i_k, found, mask=listed)
        tl.store(p_full_count + lane, found, mask=i_k == K)
