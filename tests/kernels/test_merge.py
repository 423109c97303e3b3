"""Triton merging kernels in the interpreter, by the law: any number of parts, empty rows, every gradient."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES
from kernel_cases import make as make_case
from torch import Tensor

import vsparse
from vsparse import BlockMap, backend, reference
from vsparse.kernels.merge import launch, tuning


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with interpreter.triton_kernels("merge_attention", "merge_attention_backward"):
        yield


def make(
    seed: int,
    parts: int,
    *,
    shape: tuple[int, int, int, int] = (2, 37, 2, 16),
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> list[Tensor]:
    """Outputs and then LSEs of ``parts`` parts: each empty in some rows, the first rows empty in all of them."""
    generator = torch.Generator().manual_seed(seed)
    outs, lses = [], []
    for _ in range(parts):
        lse = torch.randn(shape[:3], generator=generator) * 2 * size
        lse[torch.rand(shape[:3], generator=generator) < 0.2] = -torch.inf
        lse[:, :2] = -torch.inf
        out = torch.randn(shape, generator=generator) * size
        outs.append(torch.where(lse.isinf()[..., None], 0, out).to(dtype))
        lses.append(lse)
    return [*outs, *lses]


def merged(*x: Tensor) -> tuple[Tensor, Tensor]:
    return vsparse.merge_attention(x[: len(x) // 2], x[len(x) // 2 :])


def plain(*x: Tensor) -> tuple[Tensor, Tensor]:
    return reference.merge_attention(x[: len(x) // 2], x[len(x) // 2 :])


def hold(inputs: list[Tensor]) -> None:
    with oracle.poison():
        oracle.assert_law(merged, plain, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_activation_scales(parts: int, dtype: torch.dtype, size: float) -> None:
    hold(make(parts, parts, dtype=dtype, size=size))


@given(
    seed=st.integers(0, 999),
    parts=st.integers(1, 3),
    batch=st.integers(1, 2),
    slots=st.sampled_from([1, 8, 11]),
    heads=st.integers(1, 2),
    width=st.sampled_from([1, 5, 16]),
    dtype=st.sampled_from(DTYPES),
)
def test_shapes(seed: int, parts: int, batch: int, slots: int, heads: int, width: int, dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "config", lambda *_: tuning.Config(8, 16, 4))
        hold(make(seed, parts, shape=(batch, slots, heads, width), dtype=dtype))


@pytest.mark.parametrize("width", [3, 64, 80, 96, 128, 256])
def test_head_dims(width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hold(make(3, 2, shape=(1, 20, 1, width), dtype=dtype))


def test_gradient_of_one_output_only() -> None:
    inputs = make(4, 3)
    oracle.assert_law(lambda *x: merged(*x)[0], lambda *x: plain(*x)[0], inputs)
    outs, lses = inputs[:3], inputs[3:]
    oracle.assert_law(lambda *x: merged(*outs, *x)[1], lambda *x: plain(*outs, *x)[1], lses)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_equals_the_unsplit_attention(dtype: torch.dtype) -> None:
    case = make_case(10, dtype=dtype, density=0.7)
    keep = case.blocks.to_mask()
    third = torch.arange(keep.shape[-1]) % 3
    maps = [BlockMap.from_mask(keep & (third == i), case.blocks.q, case.blocks.k) for i in range(3)]

    def split(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = [vsparse.block_sparse_attention(q, k, v, blocks) for blocks in maps]
        return vsparse.merge_attention([out for out, _ in found], [lse for _, lse in found])

    def unsplit(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = [reference.block_sparse_attention(q, k, v, blocks, scale=case.scale) for blocks in maps]
        return reference.merge_attention([out for out, _ in found], [lse for _, lse in found])

    oracle.assert_law(split, unsplit, case.inputs)


def test_rows_that_are_empty_everywhere() -> None:
    inputs = [x.requires_grad_() for x in make(2, 3)]
    out, lse = merged(*inputs)
    assert bool((out[:, :2] == 0).all())
    assert bool((lse[:, :2] == -torch.inf).all())
    torch.autograd.backward([out, lse], [torch.ones_like(out), torch.full_like(lse, torch.nan).where(lse.isinf(), 1)])
    for x in inputs:
        assert x.grad is not None
        assert bool((x.grad[:, :2] == 0).all())
        assert bool(x.grad.isfinite().all())


def test_one_part_is_handed_through() -> None:
    out, lse = make(5, 1)
    assert all(map(torch.equal, merged(out, lse), (out, lse)))


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]


def test_strided_inputs_and_gradients_are_read_in_place() -> None:
    inputs = make(6, 2)
    outs, lses = inputs[:2], inputs[2:]
    # One part of each kind stays as it is: every part has strides of its own.
    mixed = [outs[0], strided(outs[1])], [strided(lses[0]), lses[1]]
    for mine, theirs in zip(launch.merge_attention(*mixed), launch.merge_attention(outs, lses), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous()
    grads = torch.randn_like(outs[0]), torch.ones(()).expand_as(lses[0])
    found = launch.merge_attention_backward(strided(grads[0]), grads[1], *mixed)
    expected = launch.merge_attention_backward(grads[0], grads[1].contiguous(), outs, lses)
    for mine, theirs in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous()


def test_two_runs_are_bit_equal_and_leave_the_generator_alone() -> None:
    inputs = make(7, 3, dtype=torch.bfloat16)
    with oracle.still_generator():
        first, second = oracle.run(merged, inputs), oracle.run(merged, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_refusals_are_reasons() -> None:
    outs, lses = make(1, 2)[:2], make(1, 2)[2:]
    (forward,), (backward,) = (
        backend.implementations(op, "cuda") for op in ("merge_attention", "merge_attention_backward")
    )
    assert forward.unsupported(outs, lses) == backward.unsupported(outs[0], None, outs, lses) == []
    assert "float64 is not among" in forward.unsupported(outs, [lses[0], lses[1].double()])[0]
    assert "float64 is not among" in backward.unsupported(outs[0], lses[0].double(), outs, lses)[0]
    wide = make(1, 1, shape=(1, 2, 1, 257))
    assert "head_dim 257 is larger than 256" in forward.unsupported(wide[:1], wide[1:])[0]
