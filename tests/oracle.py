"""The numerics law, and the instruments around it: poison, planted NaN, a guard on the global random generator.

For each tensor::

    err(candidate, truth) <= 2 * err(reference in the working dtype, truth) + floor

``err`` is the largest absolute difference, truth is the reference in float64, and the floor is one unit in the last
place of the working dtype at the largest magnitude of the reference: where the reference happens to be exact, a
candidate may still round once. No test picks a tolerance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vsparse import reference
from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking

Function = Callable[..., Tensor | Sequence[Tensor]]


def ulp_floor(x: Tensor) -> float:
    """One unit in the last place of ``x``'s dtype at its largest finite magnitude."""
    finite = x[x.isfinite()]
    return float(finite.abs().max()) * torch.finfo(x.dtype).eps if finite.numel() else 0.0


def _same_infinities(name: str, candidate: Tensor, truth: Tensor) -> None:
    for value in (torch.inf, -torch.inf):
        assert torch.equal(candidate == value, truth == value), f"{name}: infinities stand elsewhere than in the truth"


def check(name: str, candidate: Tensor, working: Tensor, truth: Tensor, *others: Tensor) -> None:
    """Hold one tensor to the law; the message names the worst coordinate. ``others``: further reference runs."""
    assert candidate.shape == truth.shape, f"{name}: shape {tuple(candidate.shape)}, truth {tuple(truth.shape)}"
    assert candidate.dtype == working.dtype, f"{name}: dtype {candidate.dtype}, reference {working.dtype}"
    _same_infinities(name, candidate, truth)
    finite = truth.isfinite()
    gap = torch.where(finite, candidate.double() - truth, 0).abs()
    assert not bool(gap.isnan().any()), f"{name}: NaN at {gap.isnan().nonzero()[0].tolist()}"
    known = 0.0
    for run_of_reference in (working, *others) if truth.numel() else ():
        known = max(known, float(torch.where(finite, run_of_reference.double() - truth, 0).abs().max()))
    allowed = 2 * known + ulp_floor(working)
    worst = float(gap.max()) if gap.numel() else 0.0
    if worst > allowed:
        place = torch.unravel_index(gap.argmax(), gap.shape)
        raise AssertionError(
            f"{name}: error {worst:.3e} at {[int(i) for i in place]} "
            f"({float(candidate[place]):.6g} for {float(truth[place]):.6g}); allowed {allowed:.3e}, "
            f"reference {known:.3e}"
        )


def run(function: Function, inputs: Sequence[Tensor], seed: int = 0, *, grads: bool = True) -> dict[str, Tensor]:
    """Outputs of a function, and the gradients of a fixed random combination of them in its inputs."""
    leaves = [x.detach().clone().requires_grad_(grads) for x in inputs]
    with torch.set_grad_enabled(grads):
        outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    if not grads:
        return found
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for y in outputs:
        weight = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(y.dtype)
        if y.requires_grad:
            pairs.append((y, torch.where(y.detach().isfinite(), weight, 0)))
    torch.autograd.backward([y for y, _ in pairs], [w for _, w in pairs])
    return found | {f"gradient {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}


def assert_law(
    candidate: Function,
    plain: Function,
    inputs: Sequence[Tensor],
    seed: int = 0,
    *,
    grads: bool = True,
    also: Sequence[Function] = (),
) -> None:
    """Hold a function to a plain one that runs in any dtype: outputs and, unless told otherwise, every gradient.

    Args:
        candidate, plain: Functions of the tensors ``inputs``. inputs: in the working dtype; truth takes float64.
        also: Further ways to run the reference in the working dtype; the worst of their errors counts.
    """
    truth = run(plain, [x.double() for x in inputs], seed, grads=grads)
    working = [run(function, inputs, seed, grads=grads) for function in (plain, *also)]
    for name, value in run(candidate, inputs, seed, grads=grads).items():
        check(name, value, working[0][name], truth[name], *(found[name] for found in working[1:]))


def assert_identity(
    candidate: Function, plain: Function, inputs: Sequence[Tensor], seed: int = 0, *, grads: bool = True
) -> None:
    """Two ways to write the same mathematics must agree: in float64, better than the plain one in float32 does.

    Args:
        candidate, plain: Functions of ``inputs`` that run in float64.
    """
    wide = [x.double() for x in inputs]
    truth = run(plain, wide, seed, grads=grads)
    narrow = run(plain, [x.float() for x in inputs], seed, grads=grads)
    for name, value in run(candidate, wide, seed, grads=grads).items():
        _same_infinities(name, value, truth[name])
        finite = truth[name].isfinite()
        gap, known = (torch.where(finite, x - truth[name], 0).abs().max() for x in (value, narrow[name].double()))
        assert float(gap) <= float(known), f"{name}: differs by {float(gap):.3e}; float32 differs by {float(known):.3e}"


def fused(blocks: BlockMap, scale: float) -> Function:
    """The map as a token mask for PyTorch's own fused attention, with the LSE of the plain formula.

    It is what a host runs. Its exponential on CPUs is fast rather than exact, so that in float32 its gradients lie
    further from the truth than those of the plain formula; a kernel need not be more exact than that.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keep = pairs(blocks, q.shape[1], k.shape[1]).expand(q.shape[0], q.shape[2], -1, -1)
        some = keep.any(-1, keepdim=True)
        bias = torch.zeros(keep.shape, dtype=q.dtype)
        if blocks.key_bias is not None:
            block = reference.slot_block(blocks.k, k.shape[1]).clamp_min(0)
            lead = torch.broadcast_shapes(blocks.key_bias.shape[:2], block.shape[:2])
            by_slot = blocks.key_bias.expand(*lead, -1).gather(-1, block.expand(*lead, -1))
            bias = bias + by_slot[:, :, None].to(q.dtype)
        mask = torch.where(keep | ~some, bias, -torch.inf)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale)
        out = torch.where(some, out, 0).transpose(1, 2)
        return out, reference.block_sparse_attention(q, k, v, blocks, scale=scale)[1]

    return attend


class _ByFormula(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = reference.block_sparse_attention(q, k, v, blocks, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = reference.block_sparse_attention_backward(grad_out, grad_lse, *saved, ctx.blocks, scale=ctx.scale)
        return *grads, None, None


def formula(blocks: BlockMap, scale: float) -> Function:
    """The reference with its backward written out, from the output and the LSE, as every fused kernel computes it.

    ``dP - delta`` cancels where a row has one key; autograd of the plain formula does not meet that difference.
    """
    return lambda q, k, v: _ByFormula.apply(q, k, v, blocks, scale)  # type: ignore[no-any-return]


def pairs(blocks: BlockMap, rows: int, columns: int) -> Tensor:
    """``[B|1, H|1, rows, columns]`` bool: which query slot attends to which key slot."""
    return reference._pairs(blocks, rows, columns)


def unused_keys(blocks: BlockMap, slots: int) -> Tensor:
    """``[B|1, slots, H|1, 1]`` bool: key slots of blocks that no row of the head keeps."""
    kept = blocks.to_mask().any(-2)
    block = _block_of_slot(blocks.k, slots).expand(*kept.shape[:2], -1)
    used = (block >= 0) & kept.gather(-1, block.clamp_min(0))
    return ((block >= 0) & ~used).transpose(1, 2)[..., None]


def _block_of_slot(blocking: Blocking, slots: int) -> Tensor:
    """Block of every slot, padding of a block included; -1 for slots of no block."""
    if blocking.start is None:
        return (torch.arange(slots) // blocking.block)[None, None]
    return reference.slot_block(blocking, slots)


def plant_nan(x: Tensor, blocks: BlockMap) -> Tensor:
    """``x [B, S, H, D]`` with NaN in every key block that no row of its head keeps."""
    return torch.where(unused_keys(blocks, x.shape[1]), torch.nan, x)


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextlib.contextmanager
def still_generator() -> Iterator[None]:
    """Fail if the global random generator moves."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global random generator moved"


def strides_agree(function: Callable[..., Any], args: Sequence[Any]) -> None:
    """The fake of an op must report the shapes, dtypes and strides that the op really returns."""
    from torch._subclasses import FakeTensorMode

    real = function(*args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = function(*[mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args])
    for mine, theirs in zip(_tensors(real), _tensors(fake), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _tensors(part)]
