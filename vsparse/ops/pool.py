"""Mean of each block."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from vsparse import backend
from vsparse.layouts import Blocking
from vsparse.ops.boundary import as_blocking, check_sequence, like
from vsparse.reference import statistics_dtype

__all__ = ["block_pool"]


@torch.library.custom_op("vsparse::block_pool", mutates_args=())
def _pool(x: Tensor, length: Tensor, start: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    blocking = as_blocking(length, start, block)
    mean, similarity = backend.lookup("block_pool", x.device.type, x, blocking).run(x, blocking)
    return mean, similarity


@_pool.register_fake
def _(x: Tensor, length: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], length.shape[-1], *x.shape[2:])
    wide = statistics_dtype(x.dtype)
    return x.new_empty(shape, dtype=wide), x.new_empty(shape[:3], dtype=wide)


@torch.library.custom_op("vsparse::block_pool_backward", mutates_args=())
def _pool_backward(grad: Tensor, x: Tensor, length: Tensor, start: Tensor | None, block: int) -> Tensor:
    blocking = as_blocking(length, start, block)
    return backend.lookup("block_pool_backward", x.device.type, grad, x, blocking).run(grad, x, blocking)  # type: ignore[no-any-return]


@_pool_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return like(x)


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, length, start, ctx.block = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.save_for_backward(length, start)


def _pool_grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    length, start = ctx.saved_tensors
    if grad is None:
        return None, None, None, None
    x = grad.new_empty((), dtype=ctx.dtype).expand(ctx.shape)  # its shape and dtype are all that the backward reads
    return _pool_backward(grad.contiguous(), x, length, start, ctx.block), None, None, None


_pool.register_autograd(_pool_grad, setup_context=_pool_setup)


@overload
def block_pool(x: Tensor, blocking: Blocking, *, self_similarity: Literal[False] = False) -> Tensor: ...


@overload
def block_pool(x: Tensor, blocking: Blocking, *, self_similarity: Literal[True]) -> tuple[Tensor, Tensor]: ...


def block_pool(x: Tensor, blocking: Blocking, *, self_similarity: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Mean over the valid slots of each block; differentiable in ``x``.

    Args:
        x: ``[B, S, H, D]`` in block order. blocking: its blocking.
        self_similarity: Also return the mean pairwise cosine similarity of the slots of each block, ``[B, K, H]``
            (not differentiable).

    Returns:
        ``[B, K, H, D]`` float32 (float64 for float64 input); an empty block gives 0.
    """
    check_sequence("x", x, blocking)
    mean, similarity = _pool(x, blocking.length, blocking.start, blocking.block)
    return (mean, similarity) if self_similarity else mean
