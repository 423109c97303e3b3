"""Forward kernel: online softmax over the key blocks that each query block lists."""

from __future__ import annotations

import triton
import triton.language as tl

from vsparse.kernels.tiles import LN2, absorb, copy_rows, from_natural, load_tile, store_tile, to_natural


@triton.jit
def attend(
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
    skip,
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
    d_k1,
    d_k2,
    d_v1,
    d_v2,
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
    SKIP: tl.constexpr,
    NATURAL: tl.constexpr,
    TMA: tl.constexpr,
):
    """``out = softmax(scale q k^T + bias) v`` over the listed blocks, and its natural-log LSE.

    A program computes BM rows of one query block. It walks the block's list and asks ahead: for the length of the next
    step's block and the number of the block after it. Both are carried in variables, so that the copies of K and V wait
    for no other load, and Triton does not take the small loads into its copy pipeline. The running maximum ``m``, the
    sum ``l`` and the accumulator follow FlashAttention-2 (arXiv 2307.08691, algorithm 1). ``scale`` and ``skip`` come
    in the base of NATURAL. With TMA, tiles of K and V are read through the descriptors ``d_k1`` to ``d_v2``, of their
    D1 and of their D2 columns (None otherwise); K then has no starts, and BN divides BK.
    """
    Q_TILES: tl.constexpr = (BQ + BM - 1) // BM
    K_TILES: tl.constexpr = (BK + BN - 1) // BN
    WHOLE_K: tl.constexpr = BK % BN == 0 and not STARTS_K
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
    # Lists of full rows are not read: entry j is block j.
    listed = tl.where(count == K, 0, count)
    last = tl.maximum(count - 1, 0)
    steps = tl.where(n_rows > 0, count, 0) * K_TILES

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
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)

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
        b_k = copy_rows(d_k1, p_k, i_b, i_h, slot, n_keys, s_ks, s_kd, BN, 0, D1, D, WHOLE_K, TMA)
        # [BM, BN]
        b_s = tl.dot(b_q1, tl.trans(b_k), input_precision=PRECISION)
        if D2 > 0:
            b_k = copy_rows(d_k2, p_k, i_b, i_h, slot, n_keys, s_ks, s_kd, BN, D1, D2, D, WHOLE_K, TMA)
            b_s = tl.dot(b_q2, tl.trans(b_k), b_s, input_precision=PRECISION)
        if n_keys < BN:
            b_s = tl.where(o_n[None, :] < n_keys, b_s, -float("inf"))
        b_p, b_alpha, b_m, b_l, b_below = absorb(b_s, b_m, b_l, scale, bias_now, NATURAL)
        b_out1 = b_out1 * b_alpha[:, None]
        if D2 > 0:
            b_out2 = b_out2 * b_alpha[:, None]
        near = True
        if SKIP:
            near = tl.max(tl.where(o_m < n_rows, b_below, -float("inf")), 0) > -skip
        if near:
            b_v = copy_rows(d_v1, p_v, i_b, i_h, slot, n_keys, s_vs, s_vd, BN, 0, D1, D, WHOLE_K, TMA)
            b_out1 = tl.dot(b_p.to(b_v.dtype), b_v, b_out1, input_precision=PRECISION)
            if D2 > 0:
                b_v = copy_rows(d_v2, p_v, i_b, i_h, slot, n_keys, s_vs, s_vd, BN, D1, D2, D, WHOLE_K, TMA)
                b_out2 = tl.dot(b_p.to(b_v.dtype), b_v, b_out2, input_precision=PRECISION)

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
