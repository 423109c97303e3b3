"""Gradients of maps with key blocks of a few tokens. No atomics: what each list entry adds to its keys is written
apart, then summed key by key, in the order of the transposed lists."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import gather_tile, load_rows, load_tile, power, scatter_tile, store_tile

from .keys_forward import listed_keys


@triton.jit
def grad_list(
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
    s_lane_b,
    s_lane_h,
    s_os,
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
    """``dQ = scale dS k`` with ``dS = P (dOut v^T - delta)``; the programs and their walk are as in `attend_list`."""
    Q_TILES: tl.constexpr = (BQ + BM - 1) // BM
    PRECISION: tl.constexpr = "ieee" if NATURAL else "tf32"
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
    listed = count < K
    n_keys = tl.where(n_rows > 0, count * BK, 0)

    # [BM, D]
    b_q1 = load_tile(p_q, n_rows, s_qs, s_qd, BM, 0, D1, D, False)
    b_g1 = load_tile(p_grad, n_rows, s_gs, s_gd, BM, 0, D1, D, False)
    b_q2, b_g2 = b_q1, b_g1
    if D2 > 0:
        b_q2 = load_tile(p_q, n_rows, s_qs, s_qd, BM, D1, D2, D, False)
        b_g2 = load_tile(p_grad, n_rows, s_gs, s_gd, BM, D1, D2, D, False)
    # [BM]
    o_m = tl.arange(0, BM)
    lane = i_b.to(tl.int64) * s_lane_b + i_h.to(tl.int64) * s_lane_h + row
    b_delta = tl.load(p_delta + lane + o_m, mask=o_m < n_rows, other=0.0)
    b_lse = tl.load(p_shift + lane + o_m, mask=o_m < n_rows, other=float("inf"))
    # [BM, D]
    b_dq1 = tl.zeros([BM, D1], tl.float32)
    b_dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)

    b_slot, m_ahead, b_ahead = listed_keys(
        p_list, p_k_length, p_k_start, p_bias, 0, n_keys, listed, BK, BN, STARTS_K, BIAS, NATURAL
    )
    for i_step in range(0, (n_keys + BN - 1) // BN):
        # [BN]
        o_k, o_v, m_key, b_bias = b_slot.to(tl.int64) * s_ks, b_slot.to(tl.int64) * s_vs, m_ahead, b_ahead
        b_slot, m_ahead, b_ahead = listed_keys(
            p_list, p_k_length, p_k_start, p_bias, i_step * BN + BN, n_keys, listed, BK, BN, STARTS_K, BIAS, NATURAL
        )
        # [BN, D]
        b_k1 = gather_tile(p_k, o_k, m_key, s_kd, 0, D1, D)
        b_v = gather_tile(p_v, o_v, m_key, s_vd, 0, D1, D)
        b_k2 = b_k1
        # [BM, BN]
        b_s = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
        b_dp = tl.dot(b_g1, tl.trans(b_v), input_precision=PRECISION)
        if D2 > 0:
            b_k2 = gather_tile(p_k, o_k, m_key, s_kd, D1, D2, D)
            b_v = gather_tile(p_v, o_v, m_key, s_vd, D1, D2, D)
            b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
            b_dp = tl.dot(b_g2, tl.trans(b_v), b_dp, input_precision=PRECISION)
        b_s = b_s * logit_scale - b_lse[:, None]
        if BIAS:
            b_s += b_bias[None, :]
        b_p = tl.where(m_key[None, :], power(b_s, NATURAL), 0.0)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k1.dtype)
        b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision=PRECISION)
        if D2 > 0:
            b_dq2 = tl.dot(b_ds, b_k2, b_dq2, input_precision=PRECISION)

    n_slots = n_rows if STARTS_Q else BQ - first
    p_dq += i_b.to(tl.int64) * s_db + row.to(tl.int64) * s_os + i_h * s_dh
    store_tile(p_dq, b_dq1 * scale, n_slots, s_os, BM, 0, D1, D)
    if D2 > 0:
        store_tile(p_dq, b_dq2 * scale, n_slots, s_os, BM, D1, D2, D)


@triton.jit
def grad_entries(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_delta,
    p_shift,
    p_dk,
    p_dv,
    p_list,
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
    s_pb,
    s_ph,
    s_pq,
    s_ps,
    s_lane_b,
    s_lane_h,
    s_list_b,
    s_list_h,
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
    K,
    M,
    TILES,
    FIRST,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    LISTED: tl.constexpr,
    STARTS_Q: tl.constexpr,
    STARTS_K: tl.constexpr,
    BIAS: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """``dV = P^T dOut`` and ``dK = scale dS^T q`` of BN keys, over one query block or over all that keep everything.

    LISTED: the keys are BN of those that query block FIRST + i lists; the result is part i and goes to the place of the
    key in the list. Otherwise they are BN adjacent ones, the query blocks are the first ``count`` of ``list``, and
    the result goes to the slot of the key.
    """
    Q_TILES: tl.constexpr = (BQ + BM - 1) // BM
    PRECISION: tl.constexpr = "ieee" if NATURAL else "tf32"
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p_list += i_b.to(tl.int64) * s_list_b + i_h.to(tl.int64) * s_list_h
    p_count += i_b * s_count_b + i_h * s_count_h
    i_part = i_tile // TILES
    first = i_tile % TILES * BN
    if LISTED:
        count = tl.load(p_count + FIRST + i_part)
        n_keys = tl.where(count < K, count * BK, 0)
        p_keys = p_list + (FIRST + i_part).to(tl.int64) * M
        blocks = 1
    else:
        n_keys = K * BK
        p_keys = p_list
        blocks = tl.load(p_count)
    if first < n_keys:
        p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
        p_grad += i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh
        p_k += i_b.to(tl.int64) * s_kb + i_h.to(tl.int64) * s_kh
        p_v += i_b.to(tl.int64) * s_vb + i_h.to(tl.int64) * s_vh
        p_q_length += i_b * s_q_length_b + i_h * s_q_length_h
        p_q_start += i_b * s_q_start_b + i_h * s_q_start_h
        p_k_length += i_b * s_k_length_b + i_h * s_k_length_h
        p_k_start += i_b * s_k_start_b + i_h * s_k_start_h
        p_bias += i_b * s_bias_b + i_h * s_bias_h
        lane = i_b.to(tl.int64) * s_lane_b + i_h.to(tl.int64) * s_lane_h
        # [BN]
        b_slot, m_key, b_bias = listed_keys(
            p_keys, p_k_length, p_k_start, p_bias, first, n_keys, LISTED, BK, BN, STARTS_K, BIAS, NATURAL
        )
        o_k, o_v = b_slot.to(tl.int64) * s_ks, b_slot.to(tl.int64) * s_vs
        # [BN, D]
        b_k1, b_v1 = gather_tile(p_k, o_k, m_key, s_kd, 0, D1, D), gather_tile(p_v, o_v, m_key, s_vd, 0, D1, D)
        b_k2, b_v2 = b_k1, b_v1
        if D2 > 0:
            b_k2, b_v2 = gather_tile(p_k, o_k, m_key, s_kd, D1, D2, D), gather_tile(p_v, o_v, m_key, s_vd, D1, D2, D)
        b_dk1, b_dv1 = tl.zeros([BN, D1], tl.float32), tl.zeros([BN, D1], tl.float32)
        b_dk2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
        b_dv2 = tl.zeros([BN, D2 if D2 > 0 else 16], tl.float32)
        o_m = tl.arange(0, BM)
        for i_step in range(0, blocks * Q_TILES):
            i_q = FIRST + i_part
            if not LISTED:
                i_q = tl.load(p_list + i_step // Q_TILES)
            first_q = i_step % Q_TILES * BM
            n_rows = tl.load(p_q_length + i_q) - first_q
            row = i_q * BQ
            if STARTS_Q:
                row = tl.load(p_q_start + i_q)
            row += first_q
            # [BM]
            b_lse = tl.load(p_shift + lane + row + o_m, mask=o_m < n_rows, other=float("inf"))
            b_delta = tl.load(p_delta + lane + row + o_m, mask=o_m < n_rows, other=0.0)
            # [BM, D]
            b_q1 = load_rows(p_q, row, n_rows, s_qs, s_qd, BM, 0, D1, D, False)
            b_g1 = load_rows(p_grad, row, n_rows, s_gs, s_gd, BM, 0, D1, D, False)
            b_q2, b_g2 = b_q1, b_g1
            # [BN, BM]
            b_s = tl.dot(b_k1, tl.trans(b_q1), input_precision=PRECISION)
            b_dp = tl.dot(b_v1, tl.trans(b_g1), input_precision=PRECISION)
            if D2 > 0:
                b_q2 = load_rows(p_q, row, n_rows, s_qs, s_qd, BM, D1, D2, D, False)
                b_g2 = load_rows(p_grad, row, n_rows, s_gs, s_gd, BM, D1, D2, D, False)
                b_s = tl.dot(b_k2, tl.trans(b_q2), b_s, input_precision=PRECISION)
                b_dp = tl.dot(b_v2, tl.trans(b_g2), b_dp, input_precision=PRECISION)
            b_s = b_s * logit_scale - b_lse[None, :]
            if BIAS:
                b_s += b_bias[:, None]
            b_p = power(b_s, NATURAL)
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q1.dtype)
            b_p = b_p.to(b_g1.dtype)
            b_dv1 = tl.dot(b_p, b_g1, b_dv1, input_precision=PRECISION)
            b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=PRECISION)
            if D2 > 0:
                b_dv2 = tl.dot(b_p, b_g2, b_dv2, input_precision=PRECISION)
                b_dk2 = tl.dot(b_ds, b_q2, b_dk2, input_precision=PRECISION)

        # [BN]: keys that are not valid get 0 in their slot, and nothing where nobody will look.
        o_key = first + tl.arange(0, BN)
        o_part = b_slot.to(tl.int64) * s_ps
        m_part = m_key
        if LISTED:
            o_part = i_part.to(tl.int64) * s_pq + o_key.to(tl.int64) * s_ps
        elif not STARTS_K:
            m_part = o_key < n_keys
        p_dk += i_b.to(tl.int64) * s_pb + i_h.to(tl.int64) * s_ph
        p_dv += i_b.to(tl.int64) * s_pb + i_h.to(tl.int64) * s_ph
        b_valid = m_key[:, None]
        scatter_tile(p_dk, o_part, tl.where(b_valid, b_dk1 * scale, 0.0), m_part, 0, D1, D)
        scatter_tile(p_dv, o_part, tl.where(b_valid, b_dv1, 0.0), m_part, 0, D1, D)
        if D2 > 0:
            scatter_tile(p_dk, o_part, tl.where(b_valid, b_dk2 * scale, 0.0), m_part, D1, D2, D)
            scatter_tile(p_dv, o_part, tl.where(b_valid, b_dv2, 0.0), m_part, D1, D2, D)


@triton.jit
def place_of(p_list, b_low, b_high, b_value, HALVINGS):
    """First place in ``[low, high)`` of ascending lists whose entry is not below ``value``, or ``high``."""
    for _ in range(0, HALVINGS):
        m_open = b_low < b_high
        b_middle = (b_low + b_high) // 2
        m_below = tl.load(p_list + b_middle, mask=m_open, other=0) < b_value
        b_low = tl.where(m_open & m_below, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_below, b_middle, b_high)
    return b_low


@triton.jit
def sum_entries(
    p_dk,
    p_dv,
    p_part_dk,
    p_part_dv,
    p_index,
    p_count,
    p_begin,
    p_row,
    p_k_length,
    p_k_start,
    s_db,
    s_dh,
    s_ds,
    s_pb,
    s_ph,
    s_pq,
    s_ps,
    s_index_b,
    s_index_h,
    s_count_b,
    s_count_h,
    s_begin_b,
    s_begin_h,
    s_row_b,
    s_row_h,
    s_k_length_b,
    s_k_length_h,
    s_k_start_b,
    s_k_start_h,
    K,
    M,
    FIRST,
    END,
    HALVINGS,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    STARTS_K: tl.constexpr,
):
    """Add to ``dK`` and ``dV`` of ROWS keys their parts from query blocks FIRST to END, in ascending order."""
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p_begin += i_b * s_begin_b + i_h * s_begin_h
    p_count += i_b * s_count_b + i_h * s_count_h
    p_row += i_b.to(tl.int64) * s_row_b + i_h.to(tl.int64) * s_row_h
    p_index += i_b.to(tl.int64) * s_index_b + i_h.to(tl.int64) * s_index_h
    p_k_length += i_b * s_k_length_b + i_h * s_k_length_h
    p_k_start += i_b * s_k_start_b + i_h * s_k_start_h
    p_part_dk += i_b.to(tl.int64) * s_pb + i_h.to(tl.int64) * s_ph
    p_part_dv += i_b.to(tl.int64) * s_pb + i_h.to(tl.int64) * s_ph
    o_key = i_tile * ROWS + tl.arange(0, ROWS)
    b_block = o_key // BK
    b_slot, m_key, _ = listed_keys(
        p_begin, p_k_length, p_k_start, p_begin, i_tile * ROWS, K * BK, False, BK, ROWS, STARTS_K, False, True
    )
    # [ROWS]: where the query blocks of this turn stand among those that list the key.
    b_begin = tl.load(p_begin + b_block, mask=m_key, other=0)
    b_end = tl.load(p_begin + b_block + 1, mask=m_key, other=0)
    b_first = place_of(p_row, b_begin, b_end, FIRST, HALVINGS)
    b_number = place_of(p_row, b_first, b_end, END, HALVINGS) - b_first
    most = tl.max(b_number, 0)
    if most > 0:
        # [ROWS, COLUMNS]
        o_d = tl.arange(0, COLUMNS)
        m_d = o_d[None, :] < D
        o_sum = i_b.to(tl.int64) * s_db + i_h.to(tl.int64) * s_dh + b_slot.to(tl.int64) * s_ds
        o_sum = o_sum[:, None] + o_d[None, :]
        m_sum = m_key[:, None] & m_d
        b_dk = tl.load(p_dk + o_sum, mask=m_sum, other=0.0)
        b_dv = tl.load(p_dv + o_sum, mask=m_sum, other=0.0)
        for i_entry in range(0, most):
            # [ROWS]
            m_used = m_key & (i_entry < b_number)
            b_row = tl.load(p_row + b_first + i_entry, mask=m_used, other=0)
            b_low = b_row.to(tl.int64) * M
            b_high = b_low + tl.load(p_count + b_row, mask=m_used, other=0)
            b_entry = place_of(p_index, b_low, b_high, b_block, HALVINGS) - b_low
            o_part = (b_row - FIRST).to(tl.int64) * s_pq + (b_entry * BK + o_key % BK) * s_ps
            # [ROWS, COLUMNS]
            o_part = o_part[:, None] + o_d[None, :]
            m_part = m_used[:, None] & m_d
            b_dk += tl.load(p_part_dk + o_part, mask=m_part, other=0.0)
            b_dv += tl.load(p_part_dv + o_part, mask=m_part, other=0.0)
        tl.store(p_dk + o_sum, b_dk, mask=m_sum)
        tl.store(p_dv + o_sum, b_dv, mask=m_sum)
