"""Exact block mass, and the search that returns output, LSE and mass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vsparse import backend
from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking
from vsparse.ops.attention import attend_backward
from vsparse.ops.boundary import as_blocking, as_tensors, check_attention, check_sequence, like, scale_of
from vsparse.reference import statistics_dtype

__all__ = ["block_mass", "search_attention"]


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
    sides = as_blocking(q_length, q_start, q_block), as_blocking(k_length, k_start, k_block)
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
    check_sequence("q", q, blocking)
    check_sequence("k", k, k_blocking)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be [B, Sq, H] = {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    lists = (None, None) if candidates is None else (candidates.index, candidates.count)
    sides = (blocking.length, k_blocking.length, blocking.start, k_blocking.start)
    with torch.no_grad():
        mass: Tensor = _mass(
            q.detach(),
            k.detach(),
            lse.detach(),
            *sides,
            *lists,
            rows,
            blocking.block,
            k_blocking.block,
            scale_of(scale, q),
        )
    return mass


@torch.library.custom_op("vsparse::search_attention", mutates_args=())
def _search(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, start: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    blocking = as_blocking(length, start, block)
    run = backend.lookup("search_attention", q.device.type, q, k, v, blocking, scale=scale).run
    out, lse, mass = run(q, k, v, blocking, scale=scale)
    return out, lse, mass


@_search.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, length: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = statistics_dtype(q.dtype)
    mass = q.new_empty((q.shape[0], q.shape[2], length.shape[-1], length.shape[-1]), dtype=wide)
    return like(q), q.new_empty(q.shape[:3], dtype=wide), mass


def _search_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, length, start, ctx.block, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(q, k, v, output[0], output[1], length, start)


def _search_grad(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, length, start = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 7
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    blocks = BlockMap.full(as_blocking(length, start, ctx.block))
    return (
        *attend_backward(grad_out, grad_lse, q, k, v, out, lse, *as_tensors(blocks), ctx.scale),
        None,
        None,
        None,
        None,
    )


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
    check_attention(q, k, v, BlockMap.full(blocking))
    out, lse, mass = _search(q, k, v, blocking.length, blocking.start, blocking.block, scale_of(scale, q))
    return out, lse, mass
