"""Merging attention over disjoint key sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["merge_attention", "merge_attention_backward"]


def _weights(lses: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """``exp(LSE_i - LSE)`` of every part, 0 where every part is empty, and ``LSE``."""
    lse = torch.stack(list(lses)).logsumexp(0)
    shift = torch.where(lse == -torch.inf, 0, lse)
    return [(x - shift).exp() for x in lses], lse


def _combine(weights: Sequence[Tensor], outs: Sequence[Tensor]) -> Tensor:
    total = weights[0][..., None] * outs[0]
    for weight, out in zip(weights[1:], outs[1:], strict=True):
        total.addcmul_(weight[..., None], out.to(total.dtype))
    return total


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Implements `vsparse.reference.merge_attention`, one part at a time."""
    weights, lse = _weights(lses)
    return _combine(weights, outs).to(outs[0].dtype).contiguous(), lse


def merge_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Implements `vsparse.reference.merge_attention_backward`."""
    weights, lse = _weights(lses)
    wide, total = grad_out.to(lse.dtype), _combine(weights, outs)
    through = 0 if grad_lse is None else torch.where(lse == -torch.inf, 0, grad_lse)
    d_outs = [(weight[..., None] * wide).to(outs[0].dtype) for weight in weights]
    d_lses = [weight * ((wide * (out - total)).sum(-1) + through) for weight, out in zip(weights, outs, strict=True)]
    return [x.contiguous() for x in d_outs], [x.contiguous() for x in d_lses]
