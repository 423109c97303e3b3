"""Backward kernels: dQ over the rows of a map, dK and dV over its transpose. No atomics, so runs repeat to the bit."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import from_natural, load_rows, load_tile, power, store_tile


@triton.jit
def prepare(
    p_out,
    p_grad,
    p_lse,
    p_grad_lse,
    p_delta,
    p_shift,
    s_ob,
    s_oh,
    s_os,
    s_gb,
    s_gh,
    s_gs,
    s_gd,
    s_lb,
    s_lh,
    s_ls,
    SLOTS,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    GRAD_LSE: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """``delta = sum_d out dOut - dLSE``, and the LSE in the base of NATURAL, both ``[B, H, S]``.

    Rows without a key get 0 and +inf: then their probabilities vanish, however large their logits are.
    """
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = i_tile * ROWS
    n_rows = SLOTS - first
    o_row = tl.arange(0, ROWS)
    m_row = o_row < n_rows
    p_out += i_b.to(tl.int64) * s_ob + first.to(tl.int64) * s_os + i_h * s_oh
    p_grad += i_b.to(tl.int64) * s_gb + first.to(tl.int64) * s_gs + i_h.to(tl.int64) * s_gh
    # [ROWS, D]
    b_out = load_tile(p_out, n_rows, s_os, 1, ROWS, 0, D1, D, False).to(tl.float32)
    b_grad = load_tile(p_grad, n_rows, s_gs, s_gd, ROWS, 0, D1, D, False).to(tl.float32)
    # [ROWS]
    b_delta = tl.sum(b_out * b_grad, 1)
    if D2 > 0:
        b_out = load_tile(p_out, n_rows, s_os, 1, ROWS, D1, D2, D, False).to(tl.float32)
        b_grad = load_tile(p_grad, n_rows, s_gs, s_gd, ROWS, D1, D2, D, False).to(tl.float32)
        b_delta += tl.sum(b_out * b_grad, 1)
    heads = tl.num_programs(1)
    b_lse = tl.load(p_lse + ((i_b.to(tl.int64) * SLOTS + first) * heads + i_h) + o_row * heads, mask=m_row, other=0.0)
    if GRAD_LSE:
        p_grad_lse += i_b.to(tl.int64) * s_lb + first.to(tl.int64) * s_ls + i_h * s_lh
        b_delta -= tl.load(p_grad_lse + o_row * s_ls, mask=m_row, other=0.0)
    empty = b_lse == -float("inf")
    lane = (i_b.to(tl.int64) * heads + i_h) * SLOTS + first
    tl.store(p_delta + lane + o_row, tl.where(empty, 0.0, b_delta), mask=m_row)
    tl.store(p_shift + lane + o_row, tl.where(empty, float("inf"), from_natural(b_lse, NATURAL)), mask=m_row)


@triton.jit
def grad_queries(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_delta,
    p_shift,
    p_dq,
    p_index,
    p_count,
    p_q_length,
    p_q_start,
    p_k_length,
    p_k_start,
    p_bias,
    logit_scale,
    scale,
    s_qb,
    s_qh,
    s_qs,
    s_qd,
    s_kb,
    s_kh,
    s_ks,
    s_kd,
    s_vb,
    s_vh,
    s_vs,
    s_vd,
    s_gb,
    s_gh,
    s_gs,
    s_gd,
    s_db,
    s_dh,
    s_ds,
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
    Q_SLOTS,
    K,
    M,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    STARTS_Q: tl.constexpr,
    STARTS_K: tl.constexpr,
    BIAS: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """``dQ = scale dS k`` with ``dS = P (dOut v^T - delta)``: one program for BM rows of a query block."""
    Q_TILES: tl.constexpr = (BQ + BM - 1) // BM
    K_TILES: tl.constexpr = (BK + BN - 1) // BN
    PRECISION: tl.constexpr = "ieee" if NATURAL else "tf32"
    WHOLE_K: tl.constexpr = BK % BN == 0 and not STARTS_K
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_q, first = i_tile // Q_TILES, i_tile % Q_TILES * BM
    n_rows = tl.load(p_q_length + i_b * s_q_length_b + i_h * s_q_length_h + i_q) - first
    row = i_q * BQ + first
    if STARTS_Q:
        row = tl.load(p_q_start + i_b * s_q_start_b + i_h * s_q_start_h + i_q) + first
    p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh + row.to(tl.int64) * s_qs
    p_grad += i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh + row.to(tl.int64) * s_gs
    p_k += i_b.to(tl.int64) * s_kb + i_h.to(tl.int64) * s_kh
    p_v += i_b.to(tl.int64) * s_vb + i_h.to(tl.int64) * s_vh
    p_k_length += i_b * s_k_length_b + i_h * s_k_length_h
    p_k_start += i_b * s_k_start_b + i_h * s_k_start_h
    p_bias += i_b * s_bias_b + i_h * s_bias_h
    count = tl.load(p_count + i_b * s_count_b + i_h * s_count_h + i_q)
    p_list = p_index + i_b.to(tl.int64) * s_index_b + i_h.to(tl.int64) * s_index_h + i_q.to(tl.int64) * M
    listed = tl.where(count == K, 0, count)
    last = tl.maximum(count - 1, 0)
    steps = tl.where(n_rows > 0, count, 0) * K_TILES

    # [BM, D]
    b_q1 = load_tile(p_q, n_rows, s_qs, s_qd, BM, 0, D1, D, False)
    b_g1 = load_tile(p_grad, n_rows, s_gs, s_gd, BM, 0, D1, D, False)
    b_q2, b_g2 = b_q1, b_g1
    if D2 > 0:
        b_q2 = load_tile(p_q, n_rows, s_qs, s_qd, BM, D1, D2, D, False)
        b_g2 = load_tile(p_grad, n_rows, s_gs, s_gd, BM, D1, D2, D, False)
    # [BM]
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    lane = (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * Q_SLOTS + row
    b_delta = tl.load(p_delta + lane + o_m, mask=o_m < n_rows, other=0.0)
    b_lse = tl.load(p_shift + lane + o_m, mask=o_m < n_rows, other=float("inf"))
    # [BM, D]
    b_dq1 = tl.zeros([BM, D1], tl.float32)
    b_dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)

    i_k = tl.load(p_list, mask=listed > 0, other=0)
    n_block = tl.load(p_k_length + i_k)
    start = tl.load(p_k_start + i_k) if STARTS_K else i_k * BK
    bias = from_natural(tl.load(p_bias + i_k).to(tl.float32), NATURAL) if BIAS else 0.0
    i_ahead = tl.minimum(1 // K_TILES, last)
    i_ahead = tl.load(p_list + i_ahead, mask=i_ahead < listed, other=i_ahead)
    for i_step in range(0, steps):
        first_k = i_step % K_TILES * BN
        n_keys = n_block - first_k
        slot = start + first_k
        bias_now = bias
        # Of the next step: its length, start and bias. Of the one after it: its block.
        n_block = tl.load(p_k_length + i_ahead)
        start = tl.load(p_k_start + i_ahead) if STARTS_K else i_ahead * BK
        bias = from_natural(tl.load(p_bias + i_ahead).to(tl.float32), NATURAL) if BIAS else 0.0
        i_ahead = tl.minimum((i_step + 2) // K_TILES, last)
        i_ahead = tl.load(p_list + i_ahead, mask=i_ahead < listed, other=i_ahead)
        # [BN, D]
        b_k1 = load_rows(p_k, slot, n_keys, s_ks, s_kd, BN, 0, D1, D, WHOLE_K)
        b_v1 = load_rows(p_v, slot, n_keys, s_vs, s_vd, BN, 0, D1, D, WHOLE_K)
        b_k2 = b_k1
        # [BM, BN]
        b_s = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
        b_dp = tl.dot(b_g1, tl.trans(b_v1), input_precision=PRECISION)
        if D2 > 0:
            b_k2 = load_rows(p_k, slot, n_keys, s_ks, s_kd, BN, D1, D2, D, WHOLE_K)
            b_v2 = load_rows(p_v, slot, n_keys, s_vs, s_vd, BN, D1, D2, D, WHOLE_K)
            b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
            b_dp = tl.dot(b_g2, tl.trans(b_v2), b_dp, input_precision=PRECISION)
        b_p = power(b_s * logit_scale - (b_lse - bias_now)[:, None], NATURAL)
        if n_keys < BN:
            b_p = tl.where(o_n[None, :] < n_keys, b_p, 0.0)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k1.dtype)
        b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision=PRECISION)
        if D2 > 0:
            b_dq2 = tl.dot(b_ds, b_k2, b_dq2, input_precision=PRECISION)

    n_slots = n_rows if STARTS_Q else BQ - first
    p_dq += i_b.to(tl.int64) * s_db + row.to(tl.int64) * s_ds + i_h * s_dh
    store_tile(p_dq, b_dq1 * scale, n_slots, s_ds, BM, 0, D1, D)
    if D2 > 0:
        store_tile(p_dq, b_dq2 * scale, n_slots, s_ds, BM, D1, D2, D)


@triton.jit
def grad_keys(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_delta,
    p_shift,
    p_dk,
    p_dv,
    p_offset,
    p_row,
    p_full,
    p_full_count,
    p_q_length,
    p_q_start,
    p_k_length,
    p_k_start,
    p_bias,
    logit_scale,
    scale,
    s_qb,
    s_qh,
    s_qs,
    s_qd,
    s_kb,
    s_kh,
    s_ks,
    s_kd,
    s_vb,
    s_vh,
    s_vs,
    s_vd,
    s_gb,
    s_gh,
    s_gs,
    s_gd,
    s_db,
    s_dh,
    s_ds,
    s_offset_b,
    s_offset_h,
    s_row_b,
    s_row_h,
    s_full_b,
    s_full_h,
    s_full_count_b,
    s_full_count_h,
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
    Q_SLOTS,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    STARTS_Q: tl.constexpr,
    STARTS_K: tl.constexpr,
    BIAS: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """``dV = P^T dOut`` and ``dK = scale dS^T q``: one program for BN rows of a key block.

    It walks the query blocks that list the key block, in ascending order, then those that keep everything.
    """
    Q_TILES: tl.constexpr = (BQ + BM - 1) // BM
    K_TILES: tl.constexpr = (BK + BN - 1) // BN
    PRECISION: tl.constexpr = "ieee" if NATURAL else "tf32"
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_k, first = i_tile // K_TILES, i_tile % K_TILES * BN
    n_keys = tl.load(p_k_length + i_b * s_k_length_b + i_h * s_k_length_h + i_k) - first
    slot = i_k * BK + first
    if STARTS_K:
        slot = tl.load(p_k_start + i_b * s_k_start_b + i_h * s_k_start_h + i_k) + first
    bias = 0.0
    if BIAS:
        bias = from_natural(tl.load(p_bias + i_b * s_bias_b + i_h * s_bias_h + i_k).to(tl.float32), NATURAL)
    p_k += i_b.to(tl.int64) * s_kb + i_h.to(tl.int64) * s_kh + slot.to(tl.int64) * s_ks
    p_v += i_b.to(tl.int64) * s_vb + i_h.to(tl.int64) * s_vh + slot.to(tl.int64) * s_vs
    p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
    p_grad += i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh
    p_q_length += i_b * s_q_length_b + i_h * s_q_length_h
    p_q_start += i_b * s_q_start_b + i_h * s_q_start_h
    lane = (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * Q_SLOTS
    p_delta += lane
    p_shift += lane
    p_offset += i_b * s_offset_b + i_h * s_offset_h + i_k
    begin, end = tl.load(p_offset), tl.load(p_offset + 1)
    listed = end - begin
    p_list = p_row + i_b.to(tl.int64) * s_row_b + i_h.to(tl.int64) * s_row_h + begin
    p_rest = p_full + i_b * s_full_b + i_h * s_full_h - listed
    entries = listed + tl.load(p_full_count + i_b * s_full_count_b + i_h * s_full_count_h)
    last = tl.maximum(entries - 1, 0)
    steps = tl.where(n_keys > 0, entries, 0) * Q_TILES

    # [BN, D]
    b_k1 = load_tile(p_k, n_keys, s_ks, s_kd, BN, 0, D1, D, False)
    b_v1 = load_tile(p_v, n_keys, s_vs, s_vd, BN, 0, D1, D, False)
    b_k2, b_v2 = b_k1, b_v1
    if D2 > 0:
        b_k2 = load_tile(p_k, n_keys, s_ks, s_kd, BN, D1, D2, D, False)
        b_v2 = load_tile(p_v, n_keys, s_vs, s_vd, BN, D1, D2, D, False)
    b_dk1, b_dv1 = tl.zeros([BN, D1], tl.float32), tl.zeros([BN, D1], tl.float32)
    b_dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    b_dv2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
    o_m, o_pair = tl.arange(0, BM), tl.arange(0, 2)[None, :]

    # Entries past the end repeat the last one.
    i_q = tl.load(tl.where(listed > 0, p_list, p_rest), mask=entries > 0, other=0)
    n_block = tl.load(p_q_length + i_q)
    start = tl.load(p_q_start + i_q) if STARTS_Q else i_q * BQ
    i_entry = tl.minimum(1 // Q_TILES, last)
    i_ahead = tl.load(tl.where(i_entry < listed, p_list, p_rest) + i_entry, mask=entries > 0, other=0)
    for i_step in range(0, steps):
        first_q = i_step % Q_TILES * BM
        n_rows = n_block - first_q
        row = start + first_q
        # Of the next step: its length and start. Of the one after it: its block.
        n_block = tl.load(p_q_length + i_ahead)
        start = tl.load(p_q_start + i_ahead) if STARTS_Q else i_ahead * BQ
        i_entry = tl.minimum((i_step + 2) // Q_TILES, last)
        i_ahead = tl.load(tl.where(i_entry < listed, p_list, p_rest) + i_entry, mask=entries > 0, other=0)
        # [BM, 2]: in one load, because Triton lets every thread fetch all of a tensor smaller than the program.
        p_pair = tl.where(o_pair == 0, p_shift, p_delta) + (row + o_m)[:, None]
        b_pair = tl.load(p_pair, mask=(o_m < n_rows)[:, None], other=float("inf"))
        # [BM]
        b_lse, b_delta = tl.split(b_pair)
        b_delta = tl.where(o_m < n_rows, b_delta, 0.0)
        # [BM, D]
        b_q1 = load_rows(p_q, row, n_rows, s_qs, s_qd, BM, 0, D1, D, False)
        b_g1 = load_rows(p_grad, row, n_rows, s_gs, s_gd, BM, 0, D1, D, False)
        b_q2, b_g2 = b_q1, b_g1
        # [BN, BM]
        b_s = tl.dot(b_k1, tl.trans(b_q1), input_precision=PRECISION)
        if D2 > 0:
            b_q2 = load_rows(p_q, row, n_rows, s_qs, s_qd, BM, D1, D2, D, False)
            b_g2 = load_rows(p_grad, row, n_rows, s_gs, s_gd, BM, D1, D2, D, False)
            b_s = tl.dot(b_k2, tl.trans(b_q2), b_s, input_precision=PRECISION)
        b_p = power(b_s * logit_scale - (b_lse - bias)[None, :], NATURAL)
        b_dv1 = tl.dot(b_p.to(b_g1.dtype), b_g1, b_dv1, input_precision=PRECISION)
        # The product starts from -delta: delta then takes no registers of its own.
        b_dp = tl.zeros([BN, BM], tl.float32) - b_delta[None, :]
        b_dp = tl.dot(b_v1, tl.trans(b_g1), b_dp, input_precision=PRECISION)
        if D2 > 0:
            b_dv2 = tl.dot(b_p.to(b_g1.dtype), b_g2, b_dv2, input_precision=PRECISION)
            b_dp = tl.dot(b_v2, tl.trans(b_g2), b_dp, input_precision=PRECISION)
        b_ds = (b_p * b_dp).to(b_q1.dtype)
        b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=PRECISION)
        if D2 > 0:
            b_dk2 = tl.dot(b_ds, b_q2, b_dk2, input_precision=PRECISION)

    # Slots of the block past its valid length get 0.
    n_slots = n_keys if STARTS_K else BK - first
    valid = tl.arange(0, BN)[:, None] < n_keys
    p_dk += i_b.to(tl.int64) * s_db + slot.to(tl.int64) * s_ds + i_h * s_dh
    p_dv += i_b.to(tl.int64) * s_db + slot.to(tl.int64) * s_ds + i_h * s_dh
    store_tile(p_dk, tl.where(valid, b_dk1 * scale, 0.0), n_slots, s_ds, BN, 0, D1, D)
    store_tile(p_dv, tl.where(valid, b_dv1, 0.0), n_slots, s_ds, BN, 0, D1, D)
    if D2 > 0:
        store_tile(p_dk, tl.where(valid, b_dk2 * scale, 0.0), n_slots, s_ds, BN, D1, D2, D)
        store_tile(p_dv, tl.where(valid, b_dv2, 0.0), n_slots, s_ds, BN, D1, D2, D)
