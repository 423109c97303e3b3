"""Triton pooling kernels in the interpreter, by the law: lengths, long blocks, widths, the gradient of the mean."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter
import oracle
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES
from torch import Tensor

import vsparse
from vsparse import backend, reference
from vsparse.kernels.block_pool import launch, tuning
from vsparse.layouts import Blocking


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with interpreter.triton_kernels("block_pool", "block_pool_backward"):
        yield


def make(
    seed: int,
    side: tuple[int, int] = (4, 8),
    *,
    lead: tuple[int, int] = (2, 1),
    ragged: bool = False,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> tuple[Tensor, Blocking]:
    """Random tokens, some of them zero vectors, and a blocking of ``side``: number and size of blocks."""
    blocking = strategies.blocking(*side, seed=seed, lead=lead, ragged=ragged)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, strategies.slots(blocking), 2, width)
    x = torch.randn(shape, generator=generator) * size + torch.randn(width, generator=generator)
    return torch.where(torch.rand(*shape[:3], 1, generator=generator) < 0.1, 0, x).to(dtype), blocking


def hold(x: Tensor, side: Blocking) -> None:
    with oracle.poison():
        oracle.assert_law(lambda x: vsparse.block_pool(x, side), lambda x: reference.block_pool(x, side)[0], [x])
        oracle.assert_law(
            lambda x: vsparse.block_pool(x, side, self_similarity=True),
            lambda x: reference.block_pool(x, side),
            [x],
            grads=False,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_activation_scales(dtype: torch.dtype, size: float) -> None:
    hold(*make(3, dtype=dtype, size=size))


@given(
    seed=st.integers(0, 999),
    side=st.tuples(st.integers(1, 2), st.sampled_from([1, 3, 8, 19])),
    lead=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
    ragged=st.booleans(),
    width=st.sampled_from([1, 5, 16]),
    dtype=st.sampled_from(DTYPES),
)
def test_lengths(
    seed: int, side: tuple[int, int], lead: tuple[int, int], ragged: bool, width: int, dtype: torch.dtype
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # blocks of 19 slots then take several tiles
        patch.setattr(launch, "config", lambda *_: tuning.Config(8, 16, 4))
        hold(*make(seed, side, lead=lead, ragged=ragged, width=width, dtype=dtype))


@pytest.mark.parametrize("width", [3, 64, 80, 96, 128, 256])
def test_head_dims(width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hold(*make(3, (3, 20), width=width, dtype=dtype))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_blocks(dtype: torch.dtype, ragged: bool) -> None:
    assert tuning.config(300, 64).rows == 64
    hold(*make(4, (2, 300), ragged=ragged, dtype=dtype, width=64))


@pytest.mark.parametrize("ragged", [False, True])
def test_slots_without_a_token_may_hold_nan(ragged: bool) -> None:
    x, side = make(6, ragged=ragged)
    idle = (reference.slot_block(side, x.shape[1]) < 0).transpose(1, 2)[..., None]
    assert bool(idle.any())

    def pool(x: Tensor) -> Tensor:
        return vsparse.block_pool(x, side)  # type: ignore[return-value]

    with oracle.poison():
        clean, found = (oracle.run(pool, [y]) for y in (x, torch.where(idle, torch.nan, x)))
        similarity = [
            vsparse.block_pool(y, side, self_similarity=True)[1] for y in (x, torch.where(idle, torch.nan, x))
        ]
    for name, value in clean.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(*similarity)
    assert torch.equal(clean["gradient 0"] == 0, (clean["gradient 0"] == 0) | idle)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]


@pytest.mark.parametrize("ragged", [False, True])
def test_strided_inputs_and_gradients_are_read_in_place(ragged: bool) -> None:
    x, side = make(7, ragged=ragged)
    assert not strided(x).is_contiguous()
    for mine, theirs in zip(launch.block_pool(strided(x), side), launch.block_pool(x, side), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous()
    grad = torch.randn(2, side.blocks, 2, 16, generator=torch.Generator().manual_seed(0))
    found = launch.block_pool_backward(strided(grad), strided(x), side)
    assert torch.equal(found, launch.block_pool_backward(grad, x, side))
    assert found.is_contiguous()


def test_two_runs_are_bit_equal_and_leave_the_generator_alone() -> None:
    x, side = make(5, (3, 40), dtype=torch.bfloat16)
    with oracle.still_generator():
        first, second = (oracle.run(lambda x: launch.block_pool(x, side), [x], grads=False) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_refusals_are_reasons() -> None:
    x, side = make(1)
    (forward,), (backward,) = (backend.implementations(op, "cuda") for op in ("block_pool", "block_pool_backward"))
    grad = vsparse.block_pool(x, side)
    assert forward.unsupported(x, side) == backward.unsupported(grad, x, side) == []
    assert "float64 is not among" in forward.unsupported(x.double(), side)[0]
    assert "float64 is not among" in backward.unsupported(grad.double(), x, side)[0]  # type: ignore[union-attr]
    assert "head_dim 257 is larger than 256" in forward.unsupported(make(1, width=257)[0], side)[0]
