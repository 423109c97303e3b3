"""Host side: what the merging kernels refuse, what they are handed, where they write."""

from __future__ import annotations

from collections.abc import Sequence

import triton
from torch import Tensor

from vsparse.kernels.tiles import on_its_device, reasons, strides

from .backward import grad_parts
from .forward import merge
from .tuning import config

__all__ = ["merge_attention", "merge_attention_backward", "unsupported", "unsupported_backward"]


def unsupported(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> list[str]:
    """Why the forward kernel cannot run this; empty when it can."""
    return reasons(*outs, *lses, width=outs[0].shape[-1])


def unsupported_backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> list[str]:
    """Why the backward kernel cannot run this; empty when it can."""
    grads = [grad_out] if grad_lse is None else [grad_out, grad_lse]
    return reasons(*grads, *outs, *lses, width=grad_out.shape[-1])


@on_its_device
def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Implements `vsparse.reference.merge_attention`."""
    batch, slots, heads, d = outs[0].shape
    chosen = config(slots, d)
    out, lse = (x.new_empty(x.shape) for x in (outs[0], lses[0]))
    merge[(triton.cdiv(slots, chosen.rows), heads, batch)](
        tuple(outs), tuple(lses), out, lse, _strides(outs), _lse_strides(lses), slots,
        PARTS=len(outs), ROWS=chosen.rows, COLUMNS=chosen.columns, D=d, num_warps=chosen.warps,
    )  # fmt: skip
    return out, lse


@on_its_device
def merge_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Implements `vsparse.reference.merge_attention_backward`."""
    batch, slots, heads, d = outs[0].shape
    chosen = config(slots, d)
    d_outs = [x.new_empty(x.shape, dtype=outs[0].dtype) for x in outs]
    d_lses = [x.new_empty(x.shape) for x in lses]
    grad_of_lse = lses[0] if grad_lse is None else grad_lse
    grad_parts[(triton.cdiv(slots, chosen.rows), heads, batch)](
        grad_out, grad_of_lse, tuple(outs), tuple(lses), tuple(d_outs), tuple(d_lses),
        *strides(grad_out), *_lse_strides([grad_of_lse]), _strides(outs), _lse_strides(lses), slots,
        PARTS=len(outs), ROWS=chosen.rows, COLUMNS=chosen.columns, D=d, GRAD_LSE=grad_lse is not None,
        num_warps=chosen.warps,
    )  # fmt: skip
    return d_outs, d_lses


def _strides(outs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(stride for out in outs for stride in strides(out))


def _lse_strides(lses: Sequence[Tensor]) -> tuple[int, ...]:
    """Strides of batch, head and slot of every ``[B, S, H]``."""
    return tuple(stride for lse in lses for stride in (lse.stride(0), lse.stride(2), lse.stride(1)))
