"""Mass kernel: ``sum exp(S - LSE)`` of block pairs."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import from_natural, gather_tile, load_rows, power


@triton.jit
def pair_mass(
    p_q,
    p_k,
    p_lse,
    p_mass,
    p_rows,
    p_index,
    p_count,
    p_q_length,
    p_q_start,
    p_k_length,
    p_k_start,
    p_bias,
    scale,
    s_qb,
    s_qh,
    s_qs,
    s_qd,
    s_kb,
    s_kh,
    s_ks,
    s_kd,
    s_lb,
    s_lh,
    s_ls,
    s_index_b,
    s_index_h,
    s_count_b,
    s_count_h,
    s_q_length_b,
    s_q_length_h,
    s_q_start_b,
    s_q_start_h,
    s_k_length_b,
    s_k_length_h,
    s_k_start_b,
    s_k_start_h,
    s_bias_b,
    s_bias_h,
    R,
    Q,
    K,
    M,
    G: tl.constexpr,
    Q_TILES: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ROWS: tl.constexpr,
    LISTED: tl.constexpr,
    STARTS_Q: tl.constexpr,
    STARTS_K: tl.constexpr,
    BIAS: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """``W[i, j] = sum over the rows r of query block i and the slots c of key block j of exp(S_rc - LSE_r)``.

    ``S = scale q k^T + bias``. A program owns BM query rows, of one block or of G whole blocks: consecutive slots, or
    with ROWS those that stand in a list of R offsets. It walks the list of its block (LISTED, and then G is 1) or all
    key blocks, and writes one number per pair, so that no two programs write the same one. Pairs outside the list stay
    as they were. ``scale`` comes in the base of NATURAL.

    Source: AdaSpa (arXiv 2502.21079, section 4.2).
    """
    PER: tl.constexpr = BM // G
    K_TILES: tl.constexpr = (BK + BN - 1) // BN
    WHOLE_K: tl.constexpr = BK % BN == 0 and not STARTS_K
    PRECISION: tl.constexpr = "ieee" if NATURAL else "tf32"
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_first, i_part = i_tile // Q_TILES * G, i_tile % Q_TILES
    p_k += i_b.to(tl.int64) * s_kb + i_h.to(tl.int64) * s_kh
    p_k_length += i_b * s_k_length_b + i_h * s_k_length_h
    p_k_start += i_b * s_k_start_b + i_h * s_k_start_h
    p_bias += i_b * s_bias_b + i_h * s_bias_h

    # [BM]
    o_m = tl.arange(0, BM)
    i_q = i_first + o_m // PER
    m_row = i_q < Q
    b_length = tl.load(p_q_length + i_b * s_q_length_b + i_h * s_q_length_h + i_q, mask=m_row, other=0)
    b_slot = i_q.to(tl.int64) * BQ
    if STARTS_Q:
        b_slot = tl.load(p_q_start + i_b * s_q_start_b + i_h * s_q_start_h + i_q, mask=m_row, other=0).to(tl.int64)
    o_row = i_part * PER + o_m % PER
    if ROWS:
        o_row = tl.load(p_rows + o_row, mask=o_row < R, other=BQ)
    b_slot += o_row
    m_row = o_row < b_length
    p_lse += i_b.to(tl.int64) * s_lb + i_h.to(tl.int64) * s_lh
    b_lse = tl.load(p_lse + b_slot * s_ls, mask=m_row, other=float("inf")).to(tl.float32)
    m_row = m_row & (tl.abs(b_lse) != float("inf"))
    # Rows that do not count get +inf: then their terms vanish.
    b_shift = tl.where(m_row, from_natural(b_lse, NATURAL), float("inf"))

    # Lists of full rows are not read: entry j is block j.
    count, listed, p_list = K, 0, p_index
    if LISTED:
        count = tl.load(p_count + i_b * s_count_b + i_h * s_count_h + i_first)
        listed = tl.where(count == K, 0, count)
        p_list += i_b.to(tl.int64) * s_index_b + i_h.to(tl.int64) * s_index_h + i_first.to(tl.int64) * M
    steps = tl.where(tl.max(m_row.to(tl.int32), 0) > 0, count, 0) * K_TILES
    # [G]
    i_pair = i_first + tl.arange(0, G)
    m_pair = i_pair < Q
    lane = i_b.to(tl.int64) * tl.num_programs(1) + i_h
    p_mass += ((lane * Q + i_pair) * Q_TILES + i_part) * K
    # [BM, D]
    p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
    b_q1 = gather_tile(p_q, b_slot * s_qs, m_row, s_qd, 0, D1, D)
    b_q2 = b_q1
    if D2 > 0:
        b_q2 = gather_tile(p_q, b_slot * s_qs, m_row, s_qd, D1, D2, D)
    # [BM]
    b_sum = tl.zeros([BM], tl.float32)
    o_n = tl.arange(0, BN)

    # As in `attend`, the loop asks ahead: for the next step's length, start and bias, and for the block after that.
    last = tl.maximum(count - 1, 0)
    i_k, i_ahead = 0, tl.minimum(1 // K_TILES, last)
    if LISTED:
        i_k = tl.load(p_list, mask=listed > 0, other=0)
        i_ahead = tl.load(p_list + i_ahead, mask=i_ahead < listed, other=i_ahead)
    n_block = tl.load(p_k_length + i_k)
    start = tl.load(p_k_start + i_k) if STARTS_K else i_k * BK
    bias = from_natural(tl.load(p_bias + i_k).to(tl.float32), NATURAL) if BIAS else 0.0
    for i_step in range(0, steps):
        first_k = i_step % K_TILES * BN
        n_keys = n_block - first_k
        slot = start + first_k
        b_now = b_shift - bias
        n_block = tl.load(p_k_length + i_ahead)
        start = tl.load(p_k_start + i_ahead) if STARTS_K else i_ahead * BK
        bias = from_natural(tl.load(p_bias + i_ahead).to(tl.float32), NATURAL) if BIAS else 0.0
        i_ahead = tl.minimum((i_step + 2) // K_TILES, last)
        # This step's block is read once more: Triton does not pipeline loops that carry a value over two steps.
        i_now = i_step // K_TILES
        if LISTED:
            i_ahead = tl.load(p_list + i_ahead, mask=i_ahead < listed, other=i_ahead)
            i_now = tl.load(p_list + i_now, mask=i_now < listed, other=i_now)
        # [BN, D]
        b_k = load_rows(p_k, slot, n_keys, s_ks, s_kd, BN, 0, D1, D, WHOLE_K)
        # [BM, BN]
        b_s = tl.dot(b_q1, tl.trans(b_k), input_precision=PRECISION)
        if D2 > 0:
            b_k = load_rows(p_k, slot, n_keys, s_ks, s_kd, BN, D1, D2, D, WHOLE_K)
            b_s = tl.dot(b_q2, tl.trans(b_k), b_s, input_precision=PRECISION)
        if n_keys < BN:
            b_s = tl.where(o_n[None, :] < n_keys, b_s, -float("inf"))
        b_p = power(b_s * scale - b_now[:, None], NATURAL)
        # [BM]
        b_sum = tl.where(first_k == 0, 0.0, b_sum) + tl.sum(b_p, 1)
        # [G]; every tile of a key block writes the sum so far, and the last one stays.
        tl.store(p_mass + i_now, tl.sum(tl.reshape(b_sum, [G, PER]), 1), mask=m_pair)
