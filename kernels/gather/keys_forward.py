"""Attention of maps with key blocks of a few tokens: the keys that a query block lists are gathered into tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import LN2, absorb, from_natural, gather_tile, load_tile, store_tile, to_natural


@triton.jit
def listed_keys(
    p_list,
    p_k_length,
    p_k_start,
    p_bias,
    first,
    n_keys,
    listed,
    BK: tl.constexpr,
    BN: tl.constexpr,
    STARTS_K: tl.constexpr,
    BIAS: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """Slots of BN keys of a list from key ``first`` on, which of them are valid, and their bias (0 without BIAS).

    Keys are counted through the blocks: number e is slot ``e % BK`` of entry ``e // BK``. Not ``listed``: entry j is
    block j, and nothing of the list is read.
    """
    o_key = first + tl.arange(0, BN)
    m_key = o_key < n_keys
    o_entry, o_slot = o_key // BK, o_key % BK
    # [BN]
    b_block = tl.load(p_list + o_entry, mask=m_key & listed, other=0)
    b_block = tl.where(listed, b_block, o_entry)
    m_key &= o_slot < tl.load(p_k_length + b_block, mask=m_key, other=0)
    b_slot = b_block * BK
    if STARTS_K:
        b_slot = tl.load(p_k_start + b_block, mask=m_key, other=0)
    b_bias = 0.0
    if BIAS:
        b_bias = from_natural(tl.load(p_bias + b_block, mask=m_key, other=0.0).to(tl.float32), NATURAL)
    return b_slot + o_slot, m_key, b_bias


@triton.jit
def attend_list(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
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
    s_vb,
    s_vh,
    s_vs,
    s_vd,
    s_ob,
    s_oh,
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
    """``softmax(scale q k^T + bias) v`` and its natural-log LSE: one program for BM rows of a query block.

    It walks the block's list BN keys at a time; which keys the next step gathers is asked one step ahead.
    """
    Q_TILES: tl.constexpr = (BQ + BM - 1) // BM
    PRECISION: tl.constexpr = "ieee" if NATURAL else "tf32"
    i_tile, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_q, first = i_tile // Q_TILES, i_tile % Q_TILES * BM
    n_rows = tl.load(p_q_length + i_b * s_q_length_b + i_h * s_q_length_h + i_q) - first
    row = i_q * BQ + first
    if STARTS_Q:
        row = tl.load(p_q_start + i_b * s_q_start_b + i_h * s_q_start_h + i_q) + first
    p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh + row.to(tl.int64) * s_qs
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
    b_q2 = b_q1
    if D2 > 0:
        b_q2 = load_tile(p_q, n_rows, s_qs, s_qd, BM, D1, D2, D, False)
    # [BM]
    b_m = tl.full([BM], -float("inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    # [BM, D]
    b_out1 = tl.zeros([BM, D1], tl.float32)
    b_out2 = tl.zeros([BM, D2 if D2 > 0 else 16], tl.float32)

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
        b_k = gather_tile(p_k, o_k, m_key, s_kd, 0, D1, D)
        # [BM, BN]
        b_s = tl.dot(b_q1, tl.trans(b_k), input_precision=PRECISION)
        if D2 > 0:
            b_k = gather_tile(p_k, o_k, m_key, s_kd, D1, D2, D)
            b_s = tl.dot(b_q2, tl.trans(b_k), b_s, input_precision=PRECISION)
        b_s = tl.where(m_key[None, :], b_s, -float("inf"))
        if BIAS:
            b_s = b_s * scale + b_bias[None, :]
            b_p, b_alpha, b_m, b_l, _ = absorb(b_s, b_m, b_l, 1.0, 0.0, NATURAL)
        else:
            b_p, b_alpha, b_m, b_l, _ = absorb(b_s, b_m, b_l, scale, 0.0, NATURAL)
        b_v = gather_tile(p_v, o_v, m_key, s_vd, 0, D1, D)
        b_out1 = tl.dot(b_p.to(b_v.dtype), b_v, b_out1 * b_alpha[:, None], input_precision=PRECISION)
        if D2 > 0:
            b_v = gather_tile(p_v, o_v, m_key, s_vd, D1, D2, D)
            b_out2 = tl.dot(b_p.to(b_v.dtype), b_v, b_out2 * b_alpha[:, None], input_precision=PRECISION)

    o_m = tl.arange(0, BM)
    b_norm = tl.where(b_l > 0, b_l, 1.0)
    b_lse = to_natural(b_m, NATURAL) + tl.math.log2(b_norm) * LN2
    b_lse = tl.where((b_l > 0) & (o_m < n_rows), b_lse, -float("inf"))
    # Slots of the block past its valid length are written as well: 0 and -inf. With starts they belong to nobody.
    n_slots = n_rows if STARTS_Q else BQ - first
    b_norm = tl.where(o_m < n_rows, 1.0 / b_norm, 0.0)
    p_out += i_b.to(tl.int64) * s_ob + row.to(tl.int64) * s_os + i_h * s_oh
    store_tile(p_out, b_out1 * b_norm[:, None], n_slots, s_os, BM, 0, D1, D)
    if D2 > 0:
        store_tile(p_out, b_out2 * b_norm[:, None], n_slots, s_os, BM, D1, D2, D)
    heads = tl.num_programs(1)
    p_lse += (i_b.to(tl.int64) * Q_SLOTS + row) * heads + i_h
    tl.store(p_lse + o_m * heads, b_lse, mask=o_m < n_slots)
