"""Op schemas, shapes under FakeTensor, autograd, and the public wrappers that check and call them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsparse import backend
from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking
from vsparse.reference import statistics_dtype

__all__ = [
    "block_mass",
    "block_pool",
    "block_sparse_attention",
    "merge_attention",
    "search_attention",
    "unsupported",
]

# ---- a BlockMap crosses the op boundary as tensors and ints ------------------------------------------------------


def _blocking(length: Tensor, start: Tensor | None, block: int) -> Blocking:
    return Blocking(length=length, start=start, block=block)


def _map(
    index: Tensor,
    count: Tensor,
    q_length: Tensor,
    k_length: Tensor,
    q_start: Tensor | None,
    k_start: Tensor | None,
    key_bias: Tensor | None,
    q_block: int,
    k_block: int,
) -> BlockMap:
    return BlockMap(index, count, _blocking(q_length, q_start, q_block), _blocking(k_length, k_start, k_block), key_bias)


def _flat(blocks: BlockMap) -> tuple[Any, ...]:
    q, k = blocks.q, blocks.k
    return blocks.index, blocks.count, q.length, k.length, q.start, k.start, blocks.key_bias, q.block, k.block


# ---- block-sparse attention --------------------------------------------------------------------------------------


@torch.library.custom_op("vsparse::block_sparse_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    q_length: Tensor,
    k_length: Tensor,
    q_start: Tensor | None,
    k_start: Tensor | None,
    key_bias: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
    skip_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    blocks = _map(index, count, q_length, k_length, q_start, k_start, key_bias, q_block, k_block)
    options = {"scale": scale, "skip_threshold": skip_threshold}
    run = backend.lookup("block_sparse_attention", q.device.type, q, k, v, blocks, **options).run
    out, lse = run(q, k, v, blocks, **options)
    return out, lse


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("vsparse::block_sparse_attention_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor,
    q_length: Tensor,
    k_length: Tensor,
    q_start: Tensor | None,
    k_start: Tensor | None,
    key_bias: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _map(index, count, q_length, k_length, q_start, k_start, key_bias, q_block, k_block)
    args = (grad_out, grad_lse, q, k, v, out, lse, blocks)
    run = backend.lookup("block_sparse_attention_backward", q.device.type, *args, scale=scale).run
    dq, dk, dv = run(*args, scale=scale)
    return dq, dk, dv


@_attend_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _like(q), _like(k), _like(v)


def _save_map(ctx: Any, index: Tensor, count: Tensor, q_length: Tensor, k_length: Tensor) -> tuple[Tensor, ...]:
    """Keep the map for the backward in whichever form is smaller: lists, or one bit per block pair."""
    ctx.capacity, ctx.as_bits = index.shape[-1], index.shape[-1] * 4 > math.ceil(k_length.shape[-1] / 8)
    if not ctx.as_bits:
        return index, count
    blocks = _map(index, count, q_length, k_length, None, None, None, 0, 0)
    return blocks.to_bits(), count


def _load_map(ctx: Any, stored: Tensor, count: Tensor, q_length: Tensor, k_length: Tensor) -> tuple[Tensor, Tensor]:
    if not ctx.as_bits:
        return stored, count
    q, k = _blocking(q_length, None, 0), _blocking(k_length, None, 0)
    return BlockMap.from_bits(stored, q, k, capacity=ctx.capacity).index, count


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, count, q_length, k_length, *starts_and_bias, q_block, k_block, scale, skip_threshold = inputs
    if skip_threshold is not None:
        raise NotImplementedError("skip_threshold has no gradient: call block_sparse_attention without it to train")
    ctx.set_materialize_grads(False)
    ctx.ints = (q_block, k_block, scale)
    stored, count = _save_map(ctx, index, count, q_length, k_length)
    ctx.save_for_backward(q, k, v, *output, stored, count, q_length, k_length, *starts_and_bias)


def _attend_grad(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, stored, count, q_length, k_length, *starts_and_bias = ctx.saved_tensors
    nothing = (None,) * 11
    if grad_out is None and grad_lse is None:
        return None, None, None, *nothing
    index, count = _load_map(ctx, stored, count, q_length, k_length)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grads = _attend_backward(
        grad_out, grad_lse, q, k, v, out, lse, index, count, q_length, k_length, *starts_and_bias, *ctx.ints
    )
    return *grads, *nothing


_attend.register_autograd(_attend_grad, setup_context=_attend_setup)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockMap,
    *,
    scale: float | None = None,
    skip_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query block over its kept key blocks; exact, differentiable in q, k, v.

    Args:
        q: ``[B, Sq, H, D]`` in block order. k, v: ``[B, Sk, H, D]``. One floating dtype, one device. Slots beyond the
            valid length of a kept block must be finite (`Blocking.pack` zero-fills them); key blocks that no row of a
            head keeps may hold anything.
        blocks: The map; carries the blockings of both sides.
        scale: Logit scale; None: ``D ** -0.5``.
        skip_threshold: Skip ``P V`` of a block whose logits stay this far (natural log) below the running maximum;
            no gradient. None: exact.

    Returns:
        out ``[B, Sq, H, D]`` in the dtype of q; lse ``[B, Sq, H]``, natural log, float32 (float64 for float64 input).
        Rows without a key give 0 and -inf. The gradient that arrives through lse is honoured.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. NotImplementedError: no implementation can run this, with
            every reason.

    Source: the block-sparse softmax that VSA (arXiv 2505.13389, section 3.2) and others share; empty rows, ragged
    blocks and the LSE gradient are defined in `vsparse.reference`.
    """
    _check_attention(q, k, v, blocks)
    return _attend(q, k, v, *_flat(blocks), _scale(scale, q), skip_threshold)


def unsupported(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, skip_threshold: float | None = None) -> list[str]:
    """Why `block_sparse_attention` cannot run these arguments here; empty when it can."""
    try:
        _check_attention(q, k, v, blocks)
    except ValueError as error:
        return [str(error)]
    options = {"scale": _scale(None, q), "skip_threshold": skip_threshold}
    return backend.reasons("block_sparse_attention", q.device.type, q, k, v, blocks, **options)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap) -> None:
    _check_sequence("q", q, blocks.q)
    _check_sequence("k", k, blocks.k)
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, got {tuple(v.shape)} and {tuple(k.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q and k must share B, H and D, got {tuple(q.shape)} and {tuple(k.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    _check_lead("index", blocks.index, q)
    if blocks.index.device != q.device:
        raise ValueError(f"the block map lies on {blocks.index.device}, q on {q.device}")


def _check_sequence(name: str, x: Tensor, blocking: Blocking) -> None:
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating tensor [B, S, H, D], got {x.dtype} {tuple(x.shape)}")
    if blocking.start is None and x.shape[1] != blocking.blocks * blocking.block:
        raise ValueError(
            f"{name} has S={x.shape[1]} slots, its blocking {blocking.blocks} blocks of {blocking.block}: "
            f"pack it with Blocking.pack"
        )
    _check_lead(f"{name} length", blocking.length, x)


def _check_lead(name: str, per_head: Tensor, x: Tensor) -> None:
    if per_head.shape[0] not in (1, x.shape[0]) or per_head.shape[1] not in (1, x.shape[2]):
        raise ValueError(f"{name}: leading sizes {tuple(per_head.shape[:2])} do not fit B={x.shape[0]}, H={x.shape[2]}")


# ---- exact block mass, and the search that returns output, LSE and mass ------------------------------------------


@torch.library.custom_op("vsparse::block_mass", mutates_args=())
def _mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_length: Tensor,
    k_length: Tensor,
    q_start: Tensor | None,
    k_start: Tensor | None,
    index: Tensor | None,
    count: Tensor | None,
    rows: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
) -> Tensor:
    sides = _blocking(q_length, q_start, q_block), _blocking(k_length, k_start, k_block)
    candidates = None if index is None or count is None else BlockMap(index, count, *sides)
    options = {"scale": scale, "candidates": candidates, "rows": rows}
    run = backend.lookup("block_mass", q.device.type, q, k, lse, *sides, **options).run
    return run(q, k, lse, *sides, **options)  # type: ignore[no-any-return]


@_mass.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, q_length: Tensor, k_length: Tensor, *rest: Any) -> Tensor:
    shape = (q.shape[0], q.shape[2], q_length.shape[-1], k_length.shape[-1])
    return q.new_empty(shape, dtype=statistics_dtype(q.dtype))


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    blocking: Blocking,
    k_blocking: Blocking | None = None,
    *,
    scale: float | None = None,
    candidates: BlockMap | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Attention mass of every block pair: ``W[i, j] = sum exp(S_rc - LSE_r)`` over the valid slots of i and j.

    Args:
        q: ``[B, Sq, H, D]``. k: ``[B, Sk, H, D]``. lse: ``[B, Sq, H]``, natural log; it may be a cached one, and then
            rows of W need not sum to the number of valid slots.
        blocking: Blocking of q. k_blocking: blocking of k; None: the same.
        scale: Logit scale; None: ``D ** -0.5``.
        candidates: Compute only these block pairs; the others are 0.
        rows: ``[R]`` int64 offsets inside a query block; only those slots contribute. None: all slots.

    Returns:
        ``[B, H, Q, K]`` float32 (float64 for float64 input). Not differentiable.

    Source: AdaSpa (arXiv 2502.21079, section 4.2); the paper's listing prints the logarithm where exp is meant.
    """
    k_blocking = blocking if k_blocking is None else k_blocking
    _check_sequence("q", q, blocking)
    _check_sequence("k", k, k_blocking)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be [B, Sq, H] = {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    lists = (None, None) if candidates is None else (candidates.index, candidates.count)
    sides = (blocking.length, k_blocking.length, blocking.start, k_blocking.start)
    with torch.no_grad():
        return _mass(q.detach(), k.detach(), lse.detach(), *sides, *lists, rows, blocking.block, k_blocking.block, _scale(scale, q))


@torch.library.custom_op("vsparse::search_attention", mutates_args=())
def _search(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, start: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    blocking = _blocking(length, start, block)
    run = backend.lookup("search_attention", q.device.type, q, k, v, blocking, scale=scale).run
    out, lse, mass = run(q, k, v, blocking, scale=scale)
    return out, lse, mass


@_search.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, length: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = statistics_dtype(q.dtype)
    mass = q.new_empty((q.shape[0], q.shape[2], length.shape[-1], length.shape[-1]), dtype=wide)
    return _like(q), q.new_empty(q.shape[:3], dtype=wide), mass


def _search_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, length, start, ctx.block, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(q, k, v, output[0], output[1], length, start)


def _search_grad(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, length, start = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 7
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    blocks = BlockMap.full(_blocking(length, start, ctx.block))
    return *_attend_backward(grad_out, grad_lse, q, k, v, out, lse, *_flat(blocks), ctx.scale), None, None, None, None


_search.register_autograd(_search_grad, setup_context=_search_setup)


def search_attention(
    q: Tensor, k: Tensor, v: Tensor, blocking: Blocking, *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention that also reports where its mass lies: the first, fused search of AdaSpa.

    Args:
        q, k, v: ``[B, S, H, D]`` in block order. blocking: their blocking. scale: None: ``D ** -0.5``.

    Returns:
        out and lse as of `block_sparse_attention` with every block kept (differentiable), and mass as of `block_mass`
        (not differentiable).

    Source: AdaSpa (arXiv 2502.21079, section 4.2).
    """
    _check_attention(q, k, v, BlockMap.full(blocking))
    return _search(q, k, v, blocking.length, blocking.start, blocking.block, _scale(scale, q))


# ---- pooling -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("vsparse::block_pool", mutates_args=())
def _pool(x: Tensor, length: Tensor, start: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    blocking = _blocking(length, start, block)
    mean, similarity = backend.lookup("block_pool", x.device.type, x, blocking).run(x, blocking)
    return mean, similarity


@_pool.register_fake
def _(x: Tensor, length: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], length.shape[-1], *x.shape[2:])
    wide = statistics_dtype(x.dtype)
    return x.new_empty(shape, dtype=wide), x.new_empty(shape[:3], dtype=wide)


@torch.library.custom_op("vsparse::block_pool_backward", mutates_args=())
def _pool_backward(grad: Tensor, x: Tensor, length: Tensor, start: Tensor | None, block: int) -> Tensor:
    blocking = _blocking(length, start, block)
    return backend.lookup("block_pool_backward", x.device.type, grad, x, blocking).run(grad, x, blocking)  # type: ignore[no-any-return]


@_pool_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return _like(x)


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, length, start, ctx.block = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, length, start)


def _pool_grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, length, start = ctx.saved_tensors
    return (None if grad is None else _pool_backward(grad.contiguous(), x, length, start, ctx.block)), None, None, None


_pool.register_autograd(_pool_grad, setup_context=_pool_setup)


def block_pool(x: Tensor, blocking: Blocking, *, self_similarity: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Mean over the valid slots of each block; differentiable in ``x``.

    Args:
        x: ``[B, S, H, D]`` in block order. blocking: its blocking.
        self_similarity: Also return the mean pairwise cosine similarity of the slots of each block, ``[B, K, H]``
            (not differentiable).

    Returns:
        ``[B, K, H, D]`` float32 (float64 for float64 input); an empty block gives 0.
    """
    _check_sequence("x", x, blocking)
    mean, similarity = _pool(x, blocking.length, blocking.start, blocking.block)
    return (mean, similarity) if self_similarity else mean


# ---- merge -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("vsparse::merge_attention", mutates_args=())
def _merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = backend.lookup("merge_attention", outs[0].device.type, outs, lses).run(outs, lses)
    return out, lse


@_merge.register_fake
def _(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return _like(outs[0]), _like(lses[0])


@torch.library.custom_op("vsparse::merge_attention_backward", mutates_args=())
def _merge_backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    args = (grad_out, grad_lse, outs, lses)
    d_outs, d_lses = backend.lookup("merge_attention_backward", grad_out.device.type, *args).run(*args)
    return list(d_outs), list(d_lses)


@_merge_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    return [_like(x) for x in outs], [_like(x) for x in lses]


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.set_materialize_grads(False)
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses)


def _merge_grad(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, Any]:
    outs, lses = ctx.saved_tensors[: ctx.parts], ctx.saved_tensors[ctx.parts :]
    if grad_out is None and grad_lse is None:
        return [None] * ctx.parts, [None] * ctx.parts
    grad_out = torch.zeros_like(outs[0]) if grad_out is None else grad_out.contiguous()
    return _merge_backward(grad_out, None if grad_lse is None else grad_lse.contiguous(), list(outs), list(lses))


_merge.register_autograd(_merge_grad, setup_context=_merge_setup)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the attention over each; differentiable in both.

    Args:
        outs: One or more tensors ``[B, S, H, D]``. lses: as many tensors ``[B, S, H]``, natural log.

    Returns:
        ``(out, lse)`` of the union. A row that is empty everywhere gives 0 and -inf. The key sets must be disjoint:
        a key counted twice counts twice.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge_attention needs as many outs as lses, at least one, got {len(outs)} and {len(lses)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or lse.shape != out.shape[:3]:
            raise ValueError(
                f"part {i}: out must be {tuple(outs[0].shape)} and lse {tuple(outs[0].shape[:3])}, "
                f"got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    return _merge(outs, lses)
