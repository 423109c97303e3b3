"""Rows of a sequence in another order, zeros where there is none: what packing and unpacking are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vsparse import backend

__all__ = ["reorder", "take"]


def reorder(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`vsparse.reference.reorder`, differentiable in ``x``.

    Args:
        x: ``[B, L, H, D]``.
        index: ``[B|1, H|1, S]`` int64, the row of each slot or -1; no row stands in two slots of a head.
        inverse: ``[B|1, H|1, L]`` int64, the slot of each row or -1. The backward is a gather with it, where the
            gradient of a gather would be a sum with atomics.

    Returns:
        ``[B, S, H, D]``.
    """
    # A compiler fuses the formula with what stands before it; an op would be a wall.
    if torch.compiler.is_compiling():
        y: Tensor = _Traced.apply(x, index, inverse)  # type: ignore[no-untyped-call]
    else:
        y = _reorder(x, index, inverse)
    return y


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather along dim 1 of ``[B, L, H, D]`` with an index ``[B|1, H|1, L']`` of no negative numbers."""
    if index.shape[0] == index.shape[1] == 1:
        return x.index_select(1, index[0, 0])
    wide = index.expand(x.shape[0], x.shape[2], -1).transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(1, wide)


@torch.library.custom_op("vsparse::reorder", mutates_args=())
def _reorder(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return backend.lookup("reorder", x.device.type, x, index).run(x, index)  # type: ignore[no-any-return]


@_reorder.register_fake
def _(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], index.shape[-1], *x.shape[2:])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, inverse = ctx.saved_tensors
    return _reorder(grad, inverse, index), None, None


_reorder.register_autograd(_grad, setup_context=_setup)


class _Traced(torch.autograd.Function):
    """The op for a compiler: the formula, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _formula(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return _formula(grad, inverse), None, None


def _formula(x: Tensor, index: Tensor) -> Tensor:
    return torch.where((index < 0).transpose(1, 2).unsqueeze(-1), 0, take(x, index.clamp_min(0)))
