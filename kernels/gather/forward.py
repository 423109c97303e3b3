"""Attention of maps that choose per token: query tokens that keep the same key block are gathered into tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import LN2, absorb, from_natural, gather_tile, load_tile, scatter_tile, to_natural


@triton.jit
def attend_rows(
    p_q,
    p_k,
    p_v,
    p_part,
    p_part_lse,
    p_index,
    p_begin,
    p_row,
    p_q_length,
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
    s_vb,
    s_vh,
    s_vs,
    s_vd,
    s_pb,
    s_ph,
    s_ps,
    s_pm,
    s_lb,
    s_lh,
    s_ls,
    s_lm,
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
    """``softmax(scale q k^T + bias) v`` and LSE of gathered query tokens.

    LISTED: a program takes BM of the tokens ``row[begin[j]:begin[j + 1]]`` that list key block j, attends to that block
    alone, and writes its part to entry m of the token, where block j stands in the token's list. Otherwise it takes BM
    of the ``begin[0]`` tokens of ``row`` that keep everything, attends to every block, and writes the result itself.
    """
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
        # [BM, D]
        p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
        b_q1 = gather_tile(p_q, b_row * s_qs, m_live, s_qd, 0, D1, D)
        b_q2 = b_q1
        if D2 > 0:
            b_q2 = gather_tile(p_q, b_row * s_qs, m_live, s_qd, D1, D2, D)
        b_max = tl.full([BM], -float("inf"), tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_out1 = tl.zeros([BM, D1], tl.float32)
        b_out2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)
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
            b_k = load_tile(p_k_tile, n_keys, s_ks, s_kd, BN, 0, D1, D, False)
            # [BM, BN]
            b_s = tl.dot(b_q1, tl.trans(b_k), input_precision=PRECISION)
            if D2 > 0:
                b_k = load_tile(p_k_tile, n_keys, s_ks, s_kd, BN, D1, D2, D, False)
                b_s = tl.dot(b_q2, tl.trans(b_k), b_s, input_precision=PRECISION)
            if n_keys < BN:
                b_s = tl.where(o_n[None, :] < n_keys, b_s, -float("inf"))
            b_p, b_alpha, b_max, b_sum, _ = absorb(b_s, b_max, b_sum, scale, bias, NATURAL)
            b_v = load_tile(p_v_tile, n_keys, s_vs, s_vd, BN, 0, D1, D, False)
            b_out1 = tl.dot(b_p.to(b_v.dtype), b_v, b_out1 * b_alpha[:, None], input_precision=PRECISION)
            if D2 > 0:
                b_v = load_tile(p_v_tile, n_keys, s_vs, s_vd, BN, D1, D2, D, False)
                b_out2 = tl.dot(b_p.to(b_v.dtype), b_v, b_out2 * b_alpha[:, None], input_precision=PRECISION)
        b_sum = tl.where(m_live, b_sum, 0.0)
        b_norm = tl.where(b_sum > 0, b_sum, 1.0)
        b_scale = tl.where(m_live, 1.0 / b_norm, 0.0)[:, None]
        b_lse = to_natural(b_max, NATURAL) + tl.math.log2(b_norm) * LN2
        b_lse = tl.where(b_sum > 0, b_lse, -float("inf"))
        # [BM]
        o_part, o_lse = b_row * s_ps, b_row * s_ls
        if LISTED:
            p_index += i_b.to(tl.int64) * s_index_b + i_h.to(tl.int64) * s_index_h
            # The first match: entries past the count may hold anything.
            b_entry = tl.full([BM], M, tl.int32)
            for i_entry in range(0, M):
                b_listed = tl.load(p_index + b_row * M + i_entry, mask=m_row, other=-1)
                b_entry = tl.minimum(b_entry, tl.where(b_listed == i_k, i_entry, M))
            o_part += b_entry * s_pm
            o_lse += b_entry * s_lm
        p_part += i_b.to(tl.int64) * s_pb + i_h.to(tl.int64) * s_ph
        scatter_tile(p_part, o_part, b_out1 * b_scale, m_row, 0, D1, D)
        if D2 > 0:
            scatter_tile(p_part, o_part, b_out2 * b_scale, m_row, D1, D2, D)
        p_part_lse += i_b.to(tl.int64) * s_lb + i_h.to(tl.int64) * s_lh
        tl.store(p_part_lse + o_lse, b_lse, mask=m_row)


@triton.jit
def combine(
    p_part,
    p_part_lse,
    p_out,
    p_lse,
    p_count,
    p_length,
    s_pb,
    s_ph,
    s_ps,
    s_pm,
    s_lb,
    s_lh,
    s_ls,
    s_lm,
    s_ob,
    s_oh,
    s_os,
    s_tb,
    s_th,
    s_ts,
    s_count_b,
    s_count_h,
    s_length_b,
    s_length_h,
    SLOTS,
    K,
    M,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Merge the parts of a token over its list: by their LSE if WEIGHTED, else their plain sum.

    Tokens without a key, or that are not valid, get 0 and -inf. Full rows are left alone.
    """
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, COLUMNS)
    m_row = o_row < SLOTS
    b_count = tl.load(p_count + i_b * s_count_b + i_h * s_count_h + o_row, mask=m_row, other=K)
    b_valid = tl.load(p_length + i_b * s_length_b + i_h * s_length_h + o_row, mask=m_row, other=0) > 0
    m_mine = m_row & (b_count < K)
    p_part += i_b.to(tl.int64) * s_pb + i_h.to(tl.int64) * s_ph
    p_part_lse += i_b.to(tl.int64) * s_lb + i_h.to(tl.int64) * s_lh
    b_max = tl.full([ROWS], -float("inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_entry in range(0, M):
        m_used = m_mine & b_valid & (i_entry < b_count)
        # [ROWS, COLUMNS]
        o_part = o_row.to(tl.int64) * s_ps + i_entry * s_pm
        m_part = m_used[:, None] & (o_d[None, :] < D)
        b_part = tl.load(p_part + o_part[:, None] + o_d[None, :], mask=m_part, other=0.0)
        if WEIGHTED:
            # [ROWS]
            o_lse = o_row.to(tl.int64) * s_ls + i_entry * s_lm
            b_lse = tl.load(p_part_lse + o_lse, mask=m_used, other=-float("inf"))
            b_new = tl.maximum(b_max, b_lse)
            b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_alpha, b_weight = tl.exp(b_max - b_shift), tl.exp(b_lse - b_shift)
            b_sum = b_sum * b_alpha + b_weight
            b_out = b_out * b_alpha[:, None] + b_part * b_weight[:, None]
            b_max = b_new
        else:
            b_out += b_part
    if WEIGHTED:
        b_norm = tl.where(b_sum > 0, b_sum, 1.0)
        b_out = b_out / b_norm[:, None]
        b_lse = tl.where(b_sum > 0, b_max + tl.log(b_norm), -float("inf"))
        p_lse += i_b.to(tl.int64) * s_tb + i_h.to(tl.int64) * s_th
        tl.store(p_lse + o_row.to(tl.int64) * s_ts, b_lse, mask=m_mine)
    p_out += i_b.to(tl.int64) * s_ob + i_h.to(tl.int64) * s_oh
    o_out = o_row.to(tl.int64)[:, None] * s_os + o_d[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_mine[:, None] & (o_d[None, :] < D))
