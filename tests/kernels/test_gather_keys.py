"""Kernels of maps with key blocks of a few tokens, in the interpreter and by the law: lists, every gradient."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any

import interpreter
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, Case, hold, hold_padded_first, make
from torch import Tensor

import vsparse
from vsparse import BlockMap, backend, reference
from vsparse.kernels.gather import keys_launch as launch
from vsparse.kernels.gather.tuning import Config

ROWS, KEYS = (2, 20), (37, 1)


@pytest.fixture(autouse=True)
def _gathered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels on CPU tensors, with tiles of 16 rows, so that a few dozen tokens take several."""
    monkeypatch.setattr(launch, "keys_config", lambda *_: Config(16, 16, 4, 1))
    with interpreter.triton_kernels("block_sparse_attention", "block_sparse_attention_backward"):
        yield


def served(case: Case, device: str = "cpu") -> set[str]:
    """Which implementations run the forward and the backward of a case."""
    q, k, v = case.inputs
    forward = backend.lookup("block_sparse_attention", device, q, k, v, case.blocks, scale=1.0)
    args = (q, None, q, k, v, q, None, case.blocks)
    return {forward.name, backend.lookup("block_sparse_attention_backward", device, *args, scale=1.0).name}


def test_keys_of_small_blocks_are_gathered() -> None:
    for block in (1, 2, 8):
        case = make(1, q=ROWS, k=(9, block))
        assert served(case) == served(case, "cuda") == {"triton-gather-keys"}, "these tests would test another kernel"
    assert served(make(1, q=ROWS, k=(9, 9)), "cuda") == {"triton"}
    assert served(make(1, q=(9, 1), k=KEYS), "cuda") == {"triton-gather"}, "tokens against tokens: queries are gathered"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_activation_scales(dtype: torch.dtype, size: float) -> None:
    hold(make(1, q=ROWS, k=KEYS, heads=1, dtype=dtype, size=size))


@settings(max_examples=5)
@given(
    seed=st.integers(0, 999),
    q=st.tuples(st.integers(1, 3), st.sampled_from([2, 16, 18])),
    k=st.tuples(st.integers(1, 40), st.sampled_from([1, 1, 3])),
    ragged=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
    density=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    lanes=st.sampled_from([(1, 2), (2, 1)]),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_lists_and_lengths(
    seed: int,
    q: tuple[int, int],
    k: tuple[int, int],
    ragged: tuple[bool, bool],
    bias: bool,
    density: float,
    lanes: tuple[int, int],
    shared: bool,
    dtype: torch.dtype,
) -> None:
    lead = (1, 1) if shared else lanes
    sizes = {"q": q, "k": k, "batch": lanes[0], "heads": lanes[1], "lead": lead}
    case = make(seed, **sizes, ragged=ragged, bias=bias, density=density, dtype=dtype)
    assert served(case) == {"triton-gather-keys"}
    with oracle.poison():
        hold(case)


@pytest.mark.parametrize("width", [3, 64, 80, 96, 160])
def test_head_dims(width: int) -> None:
    hold(make(3, q=(2, 16), k=(20, 1), batch=1, heads=1, width=width, dtype=torch.bfloat16))


def test_rows_that_keep_all_need_no_list_and_rows_that_keep_nothing_have_none() -> None:
    case = make(2, q=ROWS, k=KEYS)
    full = BlockMap.full(case.blocks.q, case.blocks.k)
    assert full.capacity == 0
    nothing = dc.replace(case.blocks, count=torch.zeros_like(case.blocks.count))
    for blocks in (full, nothing):
        hold(dc.replace(case, blocks=blocks))


def test_a_fully_padded_first_block_is_no_nan() -> None:
    """For keys that are gathered from blocks of a few tokens."""
    hold_padded_first(16, 8)


def test_entries_past_the_count_may_hold_anything() -> None:
    case = make(2, q=ROWS, k=KEYS)
    index, count = case.blocks.index, case.blocks.count
    used = torch.arange(index.shape[-1]) < torch.where(count == KEYS[0], 0, count)[..., None]
    hold(dc.replace(case, blocks=dc.replace(case.blocks, index=torch.where(used, index, 2**31 - 1))))


def test_a_few_heads_and_query_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for lead in ((2, 2), (1, 1)):
        case, runs = make(2, q=(3, 9), k=(21, 1), lead=lead, bias=True), []

        def attend(*x: Tensor, blocks: BlockMap = case.blocks) -> tuple[Tensor, Tensor]:
            return vsparse.block_sparse_attention(*x, blocks)

        for parts in (1, 6_000, 1 << 28):
            monkeypatch.setattr(launch, "PARTS", parts)
            runs.append(oracle.run(attend, case.inputs))
        hold(case)
        for name, tensor in runs[0].items():
            assert all(torch.equal(run[name], tensor) for run in runs), name


def test_portions_fit_and_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(2, q=(4, 16), k=KEYS)
    found = launch._Map(case.inputs[0], case.blocks)
    of_block = 2 * found.listed * 16 * 8
    assert list(launch._portions(found, 2, 3, 16)) == [(slice(0, 3), 4)]
    for parts, heads, rows in ((of_block * 9, 2, 4), (of_block * 3, 1, 3), (1, 1, 1)):
        monkeypatch.setattr(launch, "PARTS", parts)
        portions = list(launch._portions(found, 2, 3, 16))
        assert [x for group, _ in portions for x in range(3)[group]] == [0, 1, 2]
        assert {at_once for _, at_once in portions} == {rows}
        assert portions[0][0] == slice(0, heads)


def test_omitted_keys_and_invalid_tokens_may_hold_nan() -> None:
    for ragged in (False, True):
        cases = (make(seed, q=(2, 9), k=KEYS, heads=1, density=0.05, ragged=(False, ragged)) for seed in range(99))
        case = next(x for x in cases if oracle.unused_keys(x.blocks, x.inputs[1].shape[1]).any())
        query, key, value = case.inputs
        idle, missing = (
            (reference.slot_block(side, x.shape[1]) < 0).transpose(1, 2)[..., None]
            for side, x in ((case.blocks.q, query), (case.blocks.k, key))
        )
        planted = [torch.where(idle, torch.nan, query)]
        planted += [torch.where(missing, torch.nan, oracle.plant_nan(x, case.blocks)) for x in (key, value)]

        def attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap = case.blocks) -> tuple[Tensor, Tensor]:
            return vsparse.block_sparse_attention(q, k, v, blocks)

        with oracle.poison():
            clean, found = oracle.run(attend, case.inputs), oracle.run(attend, planted)
        for name, tensor in clean.items():
            assert torch.equal(found[name], tensor), f"{name} changed"


def test_strided_inputs_and_two_runs_agree_to_the_bit() -> None:
    case = make(6, q=ROWS, k=KEYS, heads=1, dtype=torch.bfloat16)

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


def test_offsets_are_wide_enough() -> None:
    """Slots whose offset, counted in elements, takes more than 32 bits; of the memory only what is used is touched."""
    case = make(1, q=(3, 16), k=KEYS, batch=1, heads=1, dtype=torch.bfloat16)
    far = 2**31 // 30

    class _Apart(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            view = torch.empty(x.shape[1] * far, dtype=x.dtype).as_strided(x.shape, (far, far, x.shape[3], 1))
            return view.copy_(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        return vsparse.block_sparse_attention(*x, case.blocks)

    assert all(x.shape[1] * far > 2**31 for x in case.inputs)
    plain = oracle.run(attend, case.inputs)
    for name, tensor in oracle.run(lambda *x: attend(*map(_Apart.apply, x)), case.inputs).items():
        assert torch.equal(tensor, plain[name]), name


def test_refusals_are_reasons() -> None:
    case = make(1, q=ROWS, k=KEYS)
    rows = {row.name: row for row in backend.implementations("block_sparse_attention", "cuda")}
    ask = rows["triton-gather-keys"].unsupported
    assert ask(*case.inputs, case.blocks, scale=1.0) == []
    assert "must be a positive number" in ask(*case.inputs, case.blocks, scale=0.0)[0]
    assert "none of which is late alone" in ask(*case.inputs, case.blocks, scale=1.0, skip_threshold=1.0)[0]
    tiled = make(1, q=(4, 16), k=(3, 17))
    assert "key blocks of 17 slots" in ask(*tiled.inputs, tiled.blocks, scale=1.0)[0]
