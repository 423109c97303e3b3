"""Correctness on the device that is to be timed: attention, forward and backward, and the dispatch of all checks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import vsparse
from vsparse import reference

from . import descriptors
from .check_ops import mass, merge, order, pool, selection
from .clock import attempt
from .inputs import synchronize
from .law import distance, law, poison
from .plan import STEPS
from .samples import Case, Sample, sample

Runs = dict[str, Tensor]


Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _forward(function: Attend, inputs: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return leaves, function(*leaves)


def _backward(leaves: list[Tensor], outputs: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> Runs:
    out, lse = outputs
    by_lse = torch.where(lse.detach().isfinite(), weights[1], 0).to(lse.dtype)
    grads = torch.autograd.grad([out, lse], leaves, [weights[0].to(out.dtype), by_lse])
    return dict(zip(("dq", "dk", "dv"), grads, strict=True))


def _plain(given: Sample, dtype: torch.dtype) -> Runs:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference.block_sparse_attention(q, k, v, given.blocks, scale=given.scale)

    leaves, outputs = _forward(attend, [x.to(dtype) for x in given.clean])
    out, lse = (x.detach() for x in outputs)
    return {"out": out, "lse": lse, **_backward(leaves, outputs, given.weights)}


def _formula(given: Sample, plain: Runs) -> Runs:
    """The backward as a fused kernel computes it, from the output and the LSE."""
    by_lse = torch.where(plain["lse"].isfinite(), given.weights[1], 0).to(plain["lse"].dtype)
    grads = reference.block_sparse_attention_backward(
        given.weights[0].to(plain["out"].dtype), by_lse, *given.clean, plain["out"], plain["lse"], given.blocks,
        scale=given.scale,
    )  # fmt: skip
    return dict(zip(("dq", "dk", "dv"), grads, strict=True))


def _fused(given: Sample) -> Runs:
    """PyTorch's own attention with the map as a mask. On CPUs its exponential is fast rather than exact."""
    blocks, (rows, columns) = given.blocks, (x.shape[1] for x in given.clean[:2])
    pairs = reference._pairs(blocks, rows, columns).expand(2, 2, -1, -1)
    some = pairs.any(-1, keepdim=True)
    bias = torch.zeros(pairs.shape, dtype=given.clean[0].dtype)
    if blocks.key_bias is not None:
        block = reference.slot_block(blocks.k, columns).clamp_min(0).expand(*blocks.key_bias.shape[:2], -1)
        bias = bias + blocks.key_bias.gather(-1, block)[:, :, None].to(bias.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.where(pairs | ~some, bias, -torch.inf)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=given.scale)
        lse = reference.block_sparse_attention(q, k, v, blocks, scale=given.scale)[1]
        return torch.where(some, out, 0).transpose(1, 2), lse

    leaves, outputs = _forward(attend, given.clean)
    return {"out": outputs[0].detach(), **_backward(leaves, outputs, given.weights)}


def attention(case: Case, device: torch.device, tokens: tuple[int, int]) -> dict[str, Any]:
    """Forward and backward of one configuration: for each, "" or what is wrong; and the errors of every tensor.

    Errors are shares of what the law allows, and relative to the truth. A second run must give the same bits.
    """
    given = sample(case, device, tokens)
    described = case.variant == descriptors.VARIANT
    if described and (against := descriptors.against(*given.planted, given.blocks)):
        raise NotImplementedError(against)
    truth = _plain(given, torch.float64)
    working = [_plain(given, given.clean[0].dtype)]
    working.append(_formula(given, working[0]))
    if device.type == "cpu":
        working.append(_fused(given))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with descriptors.forced() if described else contextlib.nullcontext():
            return vsparse.block_sparse_attention(q, k, v, given.blocks)

    names = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv")}
    words, errors, relative = dict.fromkeys(STEPS, ""), {}, {}
    runs: list[Runs] = [{}, {}]
    for run in runs:
        with poison():
            made, words["forward"] = attempt(lambda: (_forward(attend, given.planted), synchronize(device))[0])
            if words["forward"]:
                break
            run.update(out=made[1][0].detach(), lse=made[1][1].detach())
            grads, words["backward"] = attempt(
                lambda made=made: (_backward(*made, given.weights), synchronize(device))[0]
            )
            run.update(grads or {})
    for step, tensors in names.items():
        complaints = [words[step]] if words[step] else []
        for name in tensors if not complaints else ():
            wrong, errors[name] = law(name, runs[0][name], [w[name] for w in working if name in w], truth[name])
            relative[name] = distance(runs[0][name], truth[name])
            same = torch.equal(runs[0][name].nan_to_num(1e30), runs[1][name].nan_to_num(1e30))
            complaints += [wrong] if wrong else []
            complaints += [] if same else [f"{name}: two runs differ"]
        words[step] = "; ".join(complaints)
    if words["forward"] and not words["backward"]:
        words["backward"] = "its forward is wrong"
    return {**words, "errors": errors, "relative": relative}


KINDS = {"attention": attention, "mass": mass, "pool": pool, "merge": merge, "select": selection, "reorder": order}


def run(case: Case, device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Check one case; never raises."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    tokens = (192, 320) if tiny else (1280, 1536)
    found, words = attempt(lambda: KINDS[case.kind](case, device, tokens))
    found = found or {"forward": words, "backward": words, "errors": {}}
    # No implementation for it: there is nothing that could be right or wrong.
    return {**found, "skipped": "NotImplementedError" in found["forward"]}
