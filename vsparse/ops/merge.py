"""Merging attention over disjoint key sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsparse import backend
from vsparse.ops.boundary import like

__all__ = ["merge_attention"]


@torch.library.custom_op("vsparse::merge_attention", mutates_args=())
def _merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = backend.lookup("merge_attention", outs[0].device.type, outs, lses).run(outs, lses)
    return out, lse


@_merge.register_fake
def _(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return like(outs[0]), like(lses[0])


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
    return [like(x) for x in outs], [like(x) for x in lses]


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.set_materialize_grads(False)
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses)


def _merge_grad(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, Any]:
    saved = ctx.saved_tensors  # read once: checkpointing unpacks each saved tensor a single time
    outs, lses = saved[: ctx.parts], saved[ctx.parts :]
    if grad_out is None and grad_lse is None:
        return [None] * ctx.parts, [None] * ctx.parts
    grad_out = torch.zeros_like(outs[0]) if grad_out is None else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    d_outs, d_lses = _merge_backward(grad_out, grad_lse, list(outs), list(lses))
    return d_outs, d_lses


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
    out, lse = _merge(outs, lses)
    return out, lse
