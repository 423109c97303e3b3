"""Kernels of maps that choose per token, in the interpreter and by the law: chunks, lists, every gradient."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, hold, hold_padded_first, make
from torch import Tensor

import vsparse
from vsparse import BlockMap, backend, reference
from vsparse.kernels.gather import launch
from vsparse.kernels.gather.tuning import Config

TOKENS = (21, 1)


@pytest.fixture(autouse=True)
def _gathered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels on CPU tensors, with tiles of 16 rows, so that a few dozen tokens take several."""
    monkeypatch.setattr(launch, "config", lambda *_: Config(16, 16, 4, 1))
    with interpreter.triton_kernels("block_sparse_attention", "block_sparse_attention_backward"):
        yield


def test_single_tokens_are_gathered() -> None:
    case = make(1, q=TOKENS, k=(3, 17))
    for op, args in (
        ("block_sparse_attention", (*case.inputs, case.blocks)),
        ("block_sparse_attention_backward", (case.inputs[0], None, *case.inputs, case.inputs[0], None, case.blocks)),
    ):
        assert backend.lookup(op, "cuda", *args, scale=1.0).name == "triton-gather"
        assert backend.lookup(op, "cpu", *args, scale=1.0).name == "triton-gather", (
            "these tests would test another kernel"
        )
    tiled = make(1, q=(4, 16), k=(3, 17))
    assert backend.lookup("block_sparse_attention", "cuda", *tiled.inputs, tiled.blocks, scale=1.0).name == "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_activation_scales(dtype: torch.dtype, size: float) -> None:
    hold(make(1, q=TOKENS, k=(3, 17), heads=1, dtype=dtype, size=size))


@settings(max_examples=5)
@given(
    seed=st.integers(0, 999),
    q=st.integers(1, 20),
    k=st.tuples(st.integers(1, 3), st.sampled_from([1, 16, 18])),
    starts=st.booleans(),
    bias=st.booleans(),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    lanes=st.sampled_from([(1, 2), (2, 1)]),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_lists_and_lengths(
    seed: int,
    q: int,
    k: tuple[int, int],
    starts: bool,
    bias: bool,
    density: float,
    lanes: tuple[int, int],
    shared: bool,
    dtype: torch.dtype,
) -> None:
    lead = (1, 1) if shared else lanes
    sizes = {"q": (q, 1), "k": k, "batch": lanes[0], "heads": lanes[1], "lead": lead}
    with oracle.poison():
        hold(make(seed, **sizes, ragged=(False, starts), bias=bias, density=density, dtype=dtype))


@pytest.mark.parametrize("width", [3, 64, 80, 96, 160])
def test_head_dims(width: int) -> None:
    hold(make(3, q=(9, 1), k=(2, 16), batch=1, heads=1, width=width, dtype=torch.bfloat16))


@pytest.mark.parametrize("parts", [1, 1 << 28])
def test_a_few_heads_at_a_time(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PARTS", parts)
    for lead in ((2, 2), (1, 1)):
        hold(make(2, q=(9, 1), k=(3, 16), lead=lead, bias=True))


def test_a_fully_padded_first_block_is_no_nan() -> None:
    """For queries that choose one by one."""
    hold_padded_first(1, 17)


def test_omitted_blocks_and_invalid_tokens_may_hold_nan() -> None:
    for ragged in (False, True):
        cases = (make(seed, q=(7, 1), k=(9, 8), heads=1, density=0.05, ragged=(False, ragged)) for seed in range(99))
        case = next(x for x in cases if oracle.unused_keys(x.blocks, x.inputs[1].shape[1]).any())
        query, key, value = case.inputs
        idle = (reference.slot_block(case.blocks.q, query.shape[1]) < 0).transpose(1, 2)[..., None]
        planted = [torch.where(idle, torch.nan, query), *(oracle.plant_nan(x, case.blocks) for x in (key, value))]

        def attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap = case.blocks) -> tuple[Tensor, Tensor]:
            return vsparse.block_sparse_attention(q, k, v, blocks)

        with oracle.poison():
            clean, found = oracle.run(attend, case.inputs), oracle.run(attend, planted)
        for name, tensor in clean.items():
            assert torch.equal(found[name], tensor), f"{name} changed"


def test_strided_inputs_and_two_runs_agree_to_the_bit() -> None:
    case = make(6, q=TOKENS, k=(2, 17), heads=1, dtype=torch.bfloat16)

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        return vsparse.block_sparse_attention(*x, case.blocks)

    def apart(*x: Tensor) -> tuple[Tensor, Tensor]:
        wide = (torch.stack([y, y], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0] for y in x)
        out, lse = attend(*wide)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse

    first = oracle.run(attend, case.inputs)
    for other in (attend, apart):
        for name, tensor in oracle.run(other, case.inputs).items():
            assert torch.equal(tensor, first[name]), name


def test_refusals_are_reasons() -> None:
    case = make(1, q=TOKENS, k=(3, 17))
    ask = backend.implementations("block_sparse_attention", "cuda")[0].unsupported
    assert ask(*case.inputs, case.blocks, scale=1.0) == []
    assert "must be a positive number" in ask(*case.inputs, case.blocks, scale=0.0)[0]
    assert "none of them is late" in ask(*case.inputs, case.blocks, scale=1.0, skip_threshold=1.0)[0]
    tiled = make(1, q=(4, 16), k=(3, 17))
    assert "query blocks of 16 slots" in ask(*tiled.inputs, tiled.blocks, scale=1.0)[0]
