"""The meaning of every op, in plain PyTorch.

Each function here is a definition: any floating dtype, any device, memory quadratic in the sequence. Implementations
in `vsparse.kernels` are tested against these in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsparse.blocks import BlockMap, lists
from vsparse.layouts import Blocking

__all__ = [
    "block_mass",
    "block_pool",
    "block_pool_backward",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "merge_attention",
    "merge_attention_backward",
    "reorder",
    "search_attention",
    "select_blocks",
    "slot_block",
    "statistics_dtype",
]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of LSE, mass and pooled values: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slot_block(blocking: Blocking, slots: int) -> Tensor:
    """``[B|1, H|1, S]`` int64: the block of each valid slot, -1 for slots that hold no valid token."""
    slot = torch.arange(slots, device=blocking.length.device)
    if blocking.start is None:
        block = slot // blocking.block
        length = blocking.length.long()[..., block]
        return torch.where(slot % blocking.block < length, block, -1)
    start, length = (x[..., None].long() for x in torch.broadcast_tensors(blocking.start, blocking.length))
    inside = (slot >= start) & (slot < start + length)
    return torch.where(inside.any(-2), inside.int().argmax(-2), -1)


def _pairs(blocks: BlockMap, rows: int, columns: int) -> Tensor:
    """``[B|1, H|1, Sq, Sk]`` bool: which query slot attends to which key slot."""
    q, k = slot_block(blocks.q, rows), slot_block(blocks.k, columns)
    keep = blocks.to_mask()
    lead = torch.broadcast_shapes(keep.shape[:2], q.shape[:2], k.shape[:2])
    keep = keep.expand(*lead, -1, -1)
    by_row = keep.gather(2, q.clamp_min(0)[..., None].expand(*lead, rows, keep.shape[-1]))
    by_pair = by_row.gather(3, k.clamp_min(0)[..., None, :].expand(*lead, rows, columns))
    return by_pair & (q >= 0)[..., None] & (k >= 0)[..., None, :]


def _logits(q: Tensor, k: Tensor, blocks: BlockMap, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled logits ``[B, H, Sq, Sk]`` with -inf outside the map, and the ``[B|1, H|1, Sq, Sk]`` pair mask."""
    pairs = _pairs(blocks, q.shape[1], k.shape[1])
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    if blocks.key_bias is not None:
        block = slot_block(blocks.k, k.shape[1]).clamp_min(0)
        lead = torch.broadcast_shapes(blocks.key_bias.shape[:2], block.shape[:2])
        bias = blocks.key_bias.to(s.dtype).expand(*lead, -1)
        s = s + bias.gather(-1, block.expand(*lead, -1))[:, :, None]
    return torch.where(pairs, s, -torch.inf), pairs


def _used(x: Tensor, pairs: Tensor) -> Tensor:
    """``x`` with zeros in key slots that no query of the head attends to, so that they may hold anything."""
    return torch.where(pairs.any(-2).transpose(1, 2)[..., None], x, 0)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, scale: float, skip_threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the kept, valid key slots of each query slot.

    ``S = scale q k^T + key_bias``, ``LSE = log sum exp S`` (natural log), ``out = sum exp(S - LSE) v``. A query slot
    that is invalid or attends to nothing gives ``out = 0`` and ``LSE = -inf``.

    Args:
        q: ``[B, Sq, H, D]``. k, v: ``[B, Sk, H, D]``. blocks: the map. scale: logit scale.
        skip_threshold: Leave out of ``out``, not out of the LSE, the key blocks that come too late in their list to
            matter: those where every row of the query block has ``max S`` in the block at least this far below its
            maximum over the list so far (SpargeAttn, arXiv 2502.18137, section 3.4).

    Returns:
        out ``[B, Sq, H, D]`` in the dtype of ``q``; lse ``[B, Sq, H]`` float32 (float64 for float64).
    """
    s, pairs = _logits(q, k, blocks, scale)
    lse = s.to(statistics_dtype(q.dtype)).logsumexp(-1)
    if skip_threshold is not None:
        pairs = pairs & ~_late(s, blocks, skip_threshold)
    p = torch.where(pairs, (s - torch.where(lse.isinf(), 0, lse).to(s.dtype)[..., None]).exp(), 0)
    out = torch.einsum("bhnm,bmhd->bnhd", p, _used(v, pairs))
    return out, lse.transpose(1, 2).contiguous()


def _late(s: Tensor, blocks: BlockMap, threshold: float) -> Tensor:
    """``[B, H, Sq, Sk]`` bool: pairs of blocks whose logits ``s`` stay ``threshold`` below the maximum so far."""
    row, column = (slot_block(side, size) for side, size in zip((blocks.q, blocks.k), s.shape[2:], strict=True))
    place = _sink(column, blocks.k)[..., None, :].expand_as(s)
    top = s.new_full((*s.shape[:3], blocks.k.blocks + 1), -torch.inf).scatter_reduce(3, place, s, "amax")[..., :-1]
    near = (top - top.cummax(-1).values > -threshold).to(s.dtype)
    of_row = _sink(row, blocks.q)[..., None].expand_as(near)
    near = near.new_zeros(*s.shape[:2], blocks.q.blocks + 1, blocks.k.blocks).scatter_reduce(2, of_row, near, "amax")
    return (near.gather(2, of_row).gather(3, column.clamp_min(0)[..., None, :].expand_as(s)) == 0) & (s > -torch.inf)


def block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: BlockMap,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `block_sparse_attention` for a constant map, with the gradient that arrives through the LSE.

    ``delta = sum_d out dOut``, ``P = exp(S - LSE)``, ``dV = P^T dOut``, ``dS = P (dOut v^T - delta + dLSE)``,
    ``dQ = scale dS k``, ``dK = scale dS^T q``.
    """
    s, pairs = _logits(q, k, blocks, scale)
    lse = lse.transpose(1, 2)
    empty = lse.isinf()
    p = torch.where(pairs, (s - torch.where(empty, 0, lse).to(s.dtype)[..., None]).exp(), 0)
    grad_out = torch.where(empty.transpose(1, 2)[..., None], 0, grad_out)
    shift = -(out * grad_out).sum(-1, dtype=lse.dtype).transpose(1, 2)
    if grad_lse is not None:
        shift = shift + torch.where(empty, 0, grad_lse.transpose(1, 2))
    dp = torch.einsum("bnhd,bmhd->bhnm", grad_out, _used(v, pairs))
    ds = torch.where(pairs, p * (dp + shift.to(dp.dtype)[..., None]), 0) * scale
    return (
        torch.einsum("bhnm,bmhd->bnhd", ds, _used(k, pairs)),
        torch.einsum("bhnm,bnhd->bmhd", ds, q),
        torch.einsum("bhnm,bnhd->bmhd", p, grad_out),
    )


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_blocking: Blocking,
    k_blocking: Blocking,
    *,
    scale: float,
    candidates: BlockMap | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """``W[i, j] = sum over query slots r of block i and key slots c of block j of exp(S_rc - LSE_r)``.

    Args:
        q: ``[B, Sq, H, D]``. k: ``[B, Sk, H, D]``. lse: ``[B, Sq, H]``; slots with -inf contribute nothing.
        candidates: Only these block pairs are computed, the others are 0. None: all pairs.
        rows: ``[R]`` int64, offsets inside a query block; only those query slots contribute. None: all.

    Returns:
        ``[B, H, Q, K]`` float32 (float64 for float64 input).
    """
    blocks = candidates if candidates is not None else BlockMap.full(q_blocking, k_blocking)
    s, pairs = _logits(q, k, blocks, scale)
    lse = lse.transpose(1, 2)
    row_block, column_block = slot_block(q_blocking, q.shape[1]), slot_block(k_blocking, k.shape[1])
    counted = (row_block >= 0) & ~lse.isinf()
    if rows is not None:
        first = _starts(q_blocking).expand(*row_block.shape[:2], -1).gather(-1, row_block.clamp_min(0))
        place = torch.arange(q.shape[1], device=q.device) - first
        counted = counted & torch.isin(place, rows)
    p = torch.where(pairs & counted[..., None], (s - torch.where(lse.isinf(), 0, lse).to(s.dtype)[..., None]).exp(), 0)
    p = p.to(statistics_dtype(q.dtype))
    by_column = p.new_zeros(*p.shape[:3], k_blocking.blocks + 1)
    by_column = by_column.scatter_add(3, _sink(column_block, k_blocking)[..., None, :].expand_as(p), p)[..., :-1]
    by_row = p.new_zeros(*p.shape[:2], q_blocking.blocks + 1, k_blocking.blocks)
    return by_row.scatter_add(2, _sink(row_block, q_blocking)[..., None].expand_as(by_column), by_column)[:, :, :-1]


def _starts(blocking: Blocking) -> Tensor:
    if blocking.start is not None:
        return blocking.start.long()
    return (torch.arange(blocking.blocks, device=blocking.length.device) * blocking.block)[None, None]


def _sink(block: Tensor, blocking: Blocking) -> Tensor:
    """Block ids with one extra bin for slots that hold no valid token."""
    return torch.where(block < 0, blocking.blocks, block)


def search_attention(
    q: Tensor, k: Tensor, v: Tensor, blocking: Blocking, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, its LSE, and the exact block mass. Returns ``(out, lse, mass)`` of the functions above."""
    out, lse = block_sparse_attention(q, k, v, BlockMap.full(blocking), scale=scale)
    return out, lse, block_mass(q, k, lse, blocking, blocking, scale=scale)


def block_pool(x: Tensor, blocking: Blocking) -> tuple[Tensor, Tensor]:
    """Mean of the valid slots of each block, and their mean pairwise cosine similarity.

    The similarity is ``|| sum of x / |x| ||^2 / n^2`` over the n valid slots (SpargeAttn, arXiv 2502.18137, section
    3.3; a zero vector counts as a zero direction). Empty blocks give 0 for both.

    Args:
        x: ``[B, S, H, D]``.

    Returns:
        mean ``[B, K, H, D]`` and similarity ``[B, K, H]``, float32 (float64 for float64 input).
    """
    x = x.to(statistics_dtype(x.dtype))
    block = _sink(slot_block(blocking, x.shape[1]), blocking)
    place = block.expand(x.shape[0], x.shape[2], -1).transpose(1, 2)[..., None].expand_as(x)
    x = torch.where(place < blocking.blocks, x, 0)
    empty = x.new_zeros(x.shape[0], blocking.blocks + 1, *x.shape[2:])
    count = blocking.length.expand(x.shape[0], x.shape[2], -1).transpose(1, 2)[..., None].clamp_min(1)
    norm = x.norm(dim=-1, keepdim=True)
    direction = torch.where(norm > 0, x / torch.where(norm > 0, norm, 1), 0)
    mean = empty.scatter_add(1, place, x)[:, :-1] / count
    spread = empty.scatter_add(1, place, direction)[:, :-1] / count
    return mean, spread.square().sum(-1)


def block_pool_backward(grad: Tensor, x: Tensor, blocking: Blocking) -> Tensor:
    """Gradient of the mean: every valid slot receives the gradient of its block divided by the block's length.

    Args:
        grad: ``[B, K, H, D]``. x: ``[B, S, H, D]``, for its shape and dtype.
    """
    block = slot_block(blocking, x.shape[1])
    count = blocking.length.expand(x.shape[0], x.shape[2], -1).transpose(1, 2)[..., None].clamp_min(1)
    place = block.clamp_min(0).expand(x.shape[0], x.shape[2], -1).transpose(1, 2)[..., None].expand_as(x)
    valid = (block >= 0).transpose(1, 2)[..., None]
    return torch.where(valid, (grad / count).gather(1, place), 0).to(x.dtype)


def reorder(x: Tensor, index: Tensor) -> Tensor:
    """``out[b, s, h] = x[b, index[b, h, s], h]``, and 0 where the index is negative.

    Args:
        x: ``[B, L, H, D]``. index: ``[B|1, H|1, S]`` int64.

    Returns:
        ``[B, S, H, D]``.
    """
    place = index.expand(x.shape[0], x.shape[2], -1).transpose(1, 2)[..., None]
    return torch.where(place < 0, 0, x.gather(1, place.clamp_min(0).expand(-1, -1, -1, x.shape[3])))


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets from the attention over each.

    ``LSE = log sum_i exp(LSE_i)``, ``out = sum_i exp(LSE_i - LSE) out_i``; a row that is empty in every part gives
    ``out = 0`` and ``LSE = -inf``.

    Args:
        outs: Tensors ``[B, S, H, D]``. lses: as many tensors ``[B, S, H]`` (natural log).
    """
    weight, lse = _merge_weights(lses)
    wide = torch.stack([o.to(lse.dtype) for o in outs])
    return (weight[..., None] * wide).sum(0).to(outs[0].dtype), lse


def _merge_weights(lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    return torch.where(lse.isinf(), 0, (stacked - torch.where(lse.isinf(), 0, lse)).exp()), lse


def merge_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """``dOut_i = w_i dOut``, ``dLSE_i = w_i (dLSE + dOut . (out_i - out))`` with ``w_i = exp(LSE_i - LSE)``."""
    weight, lse = _merge_weights(lses)
    wide = torch.stack([o.to(lse.dtype) for o in outs])
    out, wide_grad = (weight[..., None] * wide).sum(0), grad_out.to(lse.dtype)
    arriving = (wide_grad * (wide - out)).sum(-1)
    if grad_lse is not None:
        arriving = arriving + torch.where(lse.isinf(), 0, grad_lse)
    d_outs = [(w[..., None] * wide_grad).to(outs[0].dtype) for w in weight]
    return d_outs, [w * a for w, a in zip(weight, arriving, strict=True)]


def select_blocks(
    scores: Tensor,
    length: Tensor,
    forced: Tensor | None,
    limit: Tensor,
    *,
    rule: str,
    budget: str,
    least: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """Lists of the best key blocks of every row. Of equal scores the lower block index is the better one.

    Args:
        scores: ``[B|1, H|1, Q, K]`` float. length: ``[B|1, H|1, K]`` int32; empty key blocks are never chosen.
        forced: ``[B|1, H|1, Q|1, K]`` bool, always kept, or None.
        limit: ``[B|1, H|1, Q|1]``. With ``rule`` "count": that many are kept (int). "reach" and "stay": the best until
            their sum reaches this share of the row's total, with or without the one that crosses it (float64); a share
            of 1 keeps all. "value": those that score at least this much (float64).
        budget: "exempt": forced blocks are out of the race; "compete": they come first in it; "join": they take part
            like the others, and are added.
        least: So many of the best are kept in any case.
        capacity: M, entries of a list; further ones are cut off.

    Returns:
        index ``[B, H, Q, M]`` and count ``[B, H, Q]``, int32, over the common shape of the arguments.
    """
    used = (length > 0)[:, :, None]
    ranked = torch.where(used, scores, -torch.inf)
    if forced is not None and budget != "join":
        ranked = torch.where(forced, torch.inf if budget == "compete" else -torch.inf, ranked)
    open_, limit = ranked > -torch.inf, limit[..., None]
    lead = torch.broadcast_shapes(ranked.shape, limit.shape)
    place = ranked.argsort(dim=-1, descending=True, stable=True).expand(lead)
    rank = torch.arange(ranked.shape[-1], device=scores.device)
    chosen = (rank < least).expand(lead)
    if rule == "count":
        chosen = chosen | (rank < limit)
    elif rule != "value":
        weight = torch.where(open_ & used, scores, 0).expand(lead).gather(-1, place)
        reached = weight.cumsum(-1, dtype=torch.float64)
        goal = limit * reached[..., -1:]
        before = torch.nn.functional.pad(reached[..., :-1], (1, 0))
        chosen = chosen | (before < goal if rule == "reach" else reached <= goal) | (limit >= 1.0)
    keep = torch.zeros(lead, dtype=torch.bool, device=scores.device).scatter(-1, place, chosen)
    if rule == "value":
        keep = keep | (ranked >= limit)
    keep = keep & open_
    return lists(keep if forced is None else keep | forced, capacity)
