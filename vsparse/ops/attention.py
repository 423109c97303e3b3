"""Block-sparse attention: op, fake, autograd, public wrapper."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vsparse import backend
from vsparse.blocks import BlockMap
from vsparse.ops.boundary import as_blocking, as_map, as_tensors, check_attention, like, scale_of
from vsparse.reference import statistics_dtype

__all__ = ["attend", "attend_backward", "block_sparse_attention", "load_map", "save_map", "unsupported"]


@torch.library.custom_op("vsparse::block_sparse_attention", mutates_args=())
def attend(
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
    blocks = as_map(index, count, q_length, k_length, q_start, k_start, key_bias, q_block, k_block)
    options = {"scale": scale, "skip_threshold": skip_threshold}
    run = backend.lookup("block_sparse_attention", q.device.type, q, k, v, blocks, **options).run
    out, lse = run(q, k, v, blocks, **options)
    return out, lse


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like(q), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))


@torch.library.custom_op("vsparse::block_sparse_attention_backward", mutates_args=())
def attend_backward(
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
    blocks = as_map(index, count, q_length, k_length, q_start, k_start, key_bias, q_block, k_block)
    args = (grad_out, grad_lse, q, k, v, out, lse, blocks)
    run = backend.lookup("block_sparse_attention_backward", q.device.type, *args, scale=scale).run
    dq, dk, dv = run(*args, scale=scale)
    return dq, dk, dv


@attend_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return like(q), like(k), like(v)


def save_map(index: Tensor, count: Tensor, q_length: Tensor, k_length: Tensor) -> tuple[Tensor, int | None]:
    """The lists in whichever form is smaller for the backward: as they are, or one bit per block pair.

    Returns:
        What to save, and the capacity of the lists where they became bits.
    """
    if index.shape[-1] * 4 <= math.ceil(k_length.shape[-1] / 8):
        return index, None
    blocks = as_map(index, count, q_length, k_length, None, None, None, 0, 0)
    return blocks.to_bits(), index.shape[-1]


def load_map(stored: Tensor, capacity: int | None, q_length: Tensor, k_length: Tensor) -> Tensor:
    """The lists again."""
    if capacity is None:
        return stored
    q, k = as_blocking(q_length, None, 0), as_blocking(k_length, None, 0)
    return BlockMap.from_bits(stored, q, k, capacity=capacity).index


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, count, q_length, k_length, *starts_and_bias, q_block, k_block, scale, skip_threshold = inputs
    if skip_threshold is not None:
        raise NotImplementedError("skip_threshold has no gradient: call block_sparse_attention without it to train")
    ctx.set_materialize_grads(False)
    ctx.ints = (q_block, k_block, scale)
    stored, ctx.capacity = save_map(index, count, q_length, k_length)
    ctx.save_for_backward(q, k, v, *output, stored, count, q_length, k_length, *starts_and_bias)


def _attend_grad(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, stored, count, q_length, k_length, *starts_and_bias = ctx.saved_tensors
    nothing = (None,) * 11
    if grad_out is None and grad_lse is None:
        return None, None, None, *nothing
    index = load_map(stored, ctx.capacity, q_length, k_length)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = attend_backward(
        grad_out, grad_lse, q, k, v, out, lse, index, count, q_length, k_length, *starts_and_bias, *ctx.ints
    )
    return *grads, *nothing


attend.register_autograd(_attend_grad, setup_context=_attend_setup)


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
        skip_threshold: Leave ``P V`` of a block out when every row of the query block has its logits there at least
            this far (natural log) below the maximum over the list so far (SpargeAttn, arXiv 2502.18137, section 3.4);
            the LSE stays exact; no gradient. None: exact.

    Returns:
        out ``[B, Sq, H, D]`` in the dtype of q; lse ``[B, Sq, H]``, natural log, float32 (float64 for float64 input).
        Rows without a key give 0 and -inf. The gradient that arrives through lse is honoured.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. NotImplementedError: no implementation can run this, with
            every reason.

    Source: the block-sparse softmax that VSA (arXiv 2505.13389, section 3.2) and others share; empty rows, ragged
    blocks and the LSE gradient are defined in `vsparse.reference`.
    """
    check_attention(q, k, v, blocks)
    if skip_threshold is not None and not skip_threshold >= 0:
        raise ValueError(f"skip_threshold must be at least 0 or None (exact), got {skip_threshold}")
    out, lse = attend(q, k, v, *as_tensors(blocks), scale_of(scale, q), skip_threshold)
    return out, lse


def unsupported(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, skip_threshold: float | None = None) -> list[str]:
    """Why `block_sparse_attention` cannot run these arguments here; empty when it can."""
    try:
        check_attention(q, k, v, blocks)
    except ValueError as error:
        return [str(error)]
    options = {"scale": scale_of(None, q), "skip_threshold": skip_threshold}
    return backend.reasons("block_sparse_attention", q.device.type, q, k, v, blocks, **options)
