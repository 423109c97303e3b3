"""Gradients of maps that choose per token. No atomics: parts of dQ are written apart and summed in list order."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import from_natural, gather_tile, load_tile, power, scatter_tile, store_tile


@triton.jit
def grad_rows(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_delta,
    p_shift,
    p_part,
    p_index,
    p_begin,
    p_row,
    p_q_length,
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
    s_ps,
    s_pm,
    s_db,
    s_dh,
    s_index_b,
    s_index_h,
    s_begin_b,
    s_begin_h,
    s_row_b,
    s_row_h,
    s_q_length_b,
    s_q_length_h,
    s_k_length_b,
    s_k_length_h,
    s_k_start_b,
    s_k_start_h,
    s_bias_b,
    s_bias_h,
    K,
    M,
    TILES,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    LISTED: tl.constexpr,
    STARTS_K: tl.constexpr,
    BIAS: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """``dQ = scale dS k`` of gathered query tokens; the programs are those of `attend_rows`."""
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p_begin += i_b * s_begin_b + i_h * s_begin_h
    K_TILES: tl.constexpr = (BK + BN - 1) // BN
    PRECISION: tl.constexpr = "ieee" if NATURAL else "tf32"
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    if LISTED:
        i_k = i_tile // TILES
        first = tl.load(p_begin + i_k) + i_tile % TILES * BM
        end = tl.load(p_begin + i_k + 1)
        steps = K_TILES
    else:
        i_k = 0
        first = i_tile * BM
        end = tl.load(p_begin)
        steps = K * K_TILES
    if first < end:
        m_row = first + o_m < end
        p_k += i_b.to(tl.int64) * s_kb + i_h.to(tl.int64) * s_kh
        p_v += i_b.to(tl.int64) * s_vb + i_h.to(tl.int64) * s_vh
        p_k_length += i_b * s_k_length_b + i_h * s_k_length_h
        p_k_start += i_b * s_k_start_b + i_h * s_k_start_h
        p_bias += i_b * s_bias_b + i_h * s_bias_h
        # [BM]
        b_row = tl.load(
            p_row + i_b.to(tl.int64) * s_row_b + i_h.to(tl.int64) * s_row_h + first + o_m, mask=m_row, other=0
        )
        b_row = b_row.to(tl.int64)
        p_q_length += i_b * s_q_length_b + i_h * s_q_length_h
        m_live = m_row & (tl.load(p_q_length + b_row, mask=m_row, other=0) > 0)
        o_statistics = i_b.to(tl.int64) * s_db + i_h.to(tl.int64) * s_dh + b_row
        b_delta = tl.load(p_delta + o_statistics, mask=m_live, other=0.0)
        b_lse = tl.load(p_shift + o_statistics, mask=m_live, other=float("inf"))
        # [BM, D]
        p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
        p_grad += i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh
        b_q1 = gather_tile(p_q, b_row * s_qs, m_live, s_qd, 0, D1, D)
        b_g1 = gather_tile(p_grad, b_row * s_gs, m_live, s_gd, 0, D1, D)
        b_q2, b_g2 = b_q1, b_g1
        if D2 > 0:
            b_q2 = gather_tile(p_q, b_row * s_qs, m_live, s_qd, D1, D2, D)
            b_g2 = gather_tile(p_grad, b_row * s_gs, m_live, s_gd, D1, D2, D)
        b_dq1 = tl.zeros([BM, D1], tl.float32)
        b_dq2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
        for i_step in range(0, steps):
            i_block = i_k + i_step // K_TILES
            first_k = i_step % K_TILES * BN
            slot = i_block * BK
            if STARTS_K:
                slot = tl.load(p_k_start + i_block)
            slot += first_k
            n_keys = tl.load(p_k_length + i_block) - first_k
            bias = 0.0
            if BIAS:
                bias = from_natural(tl.load(p_bias + i_block).to(tl.float32), NATURAL)
            # [BN, D]
            p_k_tile = p_k + slot.to(tl.int64) * s_ks
            p_v_tile = p_v + slot.to(tl.int64) * s_vs
            b_k1 = load_tile(p_k_tile, n_keys, s_ks, s_kd, BN, 0, D1, D, False)
            b_v = load_tile(p_v_tile, n_keys, s_vs, s_vd, BN, 0, D1, D, False)
            b_k2 = b_k1
            # [BM, BN]
            b_s = tl.dot(b_q1, tl.trans(b_k1), input_precision=PRECISION)
            b_dp = tl.dot(b_g1, tl.trans(b_v), input_precision=PRECISION)
            if D2 > 0:
                b_k2 = load_tile(p_k_tile, n_keys, s_ks, s_kd, BN, D1, D2, D, False)
                b_v = load_tile(p_v_tile, n_keys, s_vs, s_vd, BN, D1, D2, D, False)
                b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
                b_dp = tl.dot(b_g2, tl.trans(b_v), b_dp, input_precision=PRECISION)
            b_p = power(b_s * logit_scale - (b_lse - bias)[:, None], NATURAL)
            b_p = tl.where(o_n[None, :] < n_keys, b_p, 0.0)
            b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k1.dtype)
            b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision=PRECISION)
            if D2 > 0:
                b_dq2 = tl.dot(b_ds, b_k2, b_dq2, input_precision=PRECISION)
        # [BM]
        o_part = b_row * s_ps
        if LISTED:
            p_index += i_b.to(tl.int64) * s_index_b + i_h.to(tl.int64) * s_index_h
            # The first match: entries past the count may hold anything.
            b_entry = tl.full([BM], M, tl.int32)
            for i_entry in range(0, M):
                b_listed = tl.load(p_index + b_row * M + i_entry, mask=m_row, other=-1)
                b_entry = tl.minimum(b_entry, tl.where(b_listed == i_k, i_entry, M))
            o_part += b_entry * s_pm
        p_part += i_b.to(tl.int64) * s_pb + i_h.to(tl.int64) * s_ph
        scatter_tile(p_part, o_part, b_dq1 * scale, m_row, 0, D1, D)
        if D2 > 0:
            scatter_tile(p_part, o_part, b_dq2 * scale, m_row, D1, D2, D)


@triton.jit
def grad_blocks(
    p_q,
    p_k,
    p_v,
    p_grad,
    p_delta,
    p_shift,
    p_dk,
    p_dv,
    p_begin,
    p_row,
    p_full,
    p_full_count,
    p_q_length,
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
    s_kgb,
    s_kgh,
    s_kgs,
    s_db,
    s_dh,
    s_begin_b,
    s_begin_h,
    s_row_b,
    s_row_h,
    s_full_b,
    s_full_h,
    s_full_count_b,
    s_full_count_h,
    s_q_length_b,
    s_q_length_h,
    s_k_length_b,
    s_k_length_h,
    s_k_start_b,
    s_k_start_h,
    s_bias_b,
    s_bias_h,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    STARTS_K: tl.constexpr,
    BIAS: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """``dV = P^T dOut`` and ``dK = scale dS^T q`` of BN rows of a key block, over the tokens that keep it, gathered."""
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
    lane = i_b.to(tl.int64) * s_db + i_h.to(tl.int64) * s_dh
    p_begin += i_b * s_begin_b + i_h * s_begin_h + i_k
    p_q_length += i_b * s_q_length_b + i_h * s_q_length_h
    begin = tl.load(p_begin)
    listed = tl.load(p_begin + 1) - begin
    whole = tl.load(p_full_count + i_b * s_full_count_b + i_h * s_full_count_h)
    p_list = p_row + i_b.to(tl.int64) * s_row_b + i_h.to(tl.int64) * s_row_h + begin
    p_rest = p_full + i_b.to(tl.int64) * s_full_b + i_h.to(tl.int64) * s_full_h
    tiles = (listed + BM - 1) // BM
    steps = tl.where(n_keys > 0, tiles + (whole + BM - 1) // BM, 0)

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
    o_m = tl.arange(0, BM)
    for i_step in range(0, steps):
        # The tiles of listed tokens, then those of full rows; a tile holds one kind.
        from_list = i_step < tiles
        o_entry = tl.where(from_list, i_step, i_step - tiles) * BM + o_m
        m_row = o_entry < tl.where(from_list, listed, whole)
        b_row = tl.load(tl.where(from_list, p_list, p_rest) + o_entry, mask=m_row, other=0).to(tl.int64)
        m_live = m_row & (tl.load(p_q_length + b_row, mask=m_row, other=0) > 0)
        b_lse = tl.load(p_shift + lane + b_row, mask=m_live, other=float("inf"))
        b_delta = tl.load(p_delta + lane + b_row, mask=m_live, other=0.0)
        # [BM, D]
        b_q1 = gather_tile(p_q, b_row * s_qs, m_live, s_qd, 0, D1, D)
        b_g1 = gather_tile(p_grad, b_row * s_gs, m_live, s_gd, 0, D1, D)
        b_q2, b_g2 = b_q1, b_g1
        # [BN, BM]
        b_s = tl.dot(b_k1, tl.trans(b_q1), input_precision=PRECISION)
        b_dp = tl.dot(b_v1, tl.trans(b_g1), input_precision=PRECISION)
        if D2 > 0:
            b_q2 = gather_tile(p_q, b_row * s_qs, m_live, s_qd, D1, D2, D)
            b_g2 = gather_tile(p_grad, b_row * s_gs, m_live, s_gd, D1, D2, D)
            b_s = tl.dot(b_k2, tl.trans(b_q2), b_s, input_precision=PRECISION)
            b_dp = tl.dot(b_v2, tl.trans(b_g2), b_dp, input_precision=PRECISION)
        b_p = power(b_s * logit_scale - (b_lse - bias)[None, :], NATURAL)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q1.dtype)
        b_p = b_p.to(b_g1.dtype)
        b_dv1 = tl.dot(b_p, b_g1, b_dv1, input_precision=PRECISION)
        b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=PRECISION)
        if D2 > 0:
            b_dv2 = tl.dot(b_p, b_g2, b_dv2, input_precision=PRECISION)
            b_dk2 = tl.dot(b_ds, b_q2, b_dk2, input_precision=PRECISION)

    n_slots = n_keys if STARTS_K else BK - first
    valid = tl.arange(0, BN)[:, None] < n_keys
    p_dk += i_b.to(tl.int64) * s_kgb + slot.to(tl.int64) * s_kgs + i_h * s_kgh
    p_dv += i_b.to(tl.int64) * s_kgb + slot.to(tl.int64) * s_kgs + i_h * s_kgh
    store_tile(p_dk, tl.where(valid, b_dk1 * scale, 0.0), n_slots, s_kgs, BN, 0, D1, D)
    store_tile(p_dv, tl.where(valid, b_dv1, 0.0), n_slots, s_kgs, BN, 0, D1, D)
    if D2 > 0:
        store_tile(p_dk, tl.where(valid, b_dk2 * scale, 0.0), n_slots, s_kgs, BN, D1, D2, D)
        store_tile(p_dv, tl.where(valid, b_dv2, 0.0), n_slots, s_kgs, BN, D1, D2, D)
