"""Triton kernels of block-sparse attention in the interpreter, by the law: lists, lengths, widths, every gradient."""

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
from kernel_cases import DTYPES, filled, hold, hold_padded_first, make
from torch import Tensor

import vsparse
from vsparse import BlockMap, backend, reference
from vsparse.kernels.block_sparse import launch, tuning
from vsparse.kernels.block_sparse import transpose as transposing
from vsparse.kernels.tiles import Width

TILE = (4, 16)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with interpreter.triton_kernels("block_sparse_attention", "block_sparse_attention_backward"):
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows: blocks of a few dozen slots then take several."""
    monkeypatch.setattr(launch, "config", lambda *_: tuning.Config(16, 16, 4, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_activation_scales(dtype: torch.dtype, size: float) -> None:
    for seed in (1, 2):
        hold(make(seed, q=TILE, k=TILE, heads=1, dtype=dtype, size=size))


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=10)
@given(
    seed=st.integers(0, 999),
    q=st.tuples(st.integers(1, 2), st.sampled_from([1, 7, 16, 33])),
    k=st.tuples(st.integers(1, 3), st.sampled_from([1, 16, 24, 32])),
    ragged=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
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
    with oracle.poison():
        hold(case)


@pytest.mark.parametrize("width", [3, 16, 48, 64, 80, 96, 128, 160, 256])
def test_head_dims(width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hold(make(3, q=(3, 16), k=(3, 16), batch=1, heads=1, width=width, dtype=dtype))


@pytest.mark.parametrize(
    ("q", "k"), [((2, 64), (3, 64)), ((1, 128), (3, 64)), ((2, 64), (2, 128)), ((1, 128), (2, 128))]
)
@pytest.mark.parametrize("width", [64, 128])
def test_shipped_configurations(q: tuple[int, int], k: tuple[int, int], width: int) -> None:
    hold(make(4, q=q, k=k, batch=1, heads=1, width=width, dtype=torch.bfloat16, density=0.6))


@pytest.mark.parametrize("filler", [-1, 2**31 - 1])
def test_entries_past_the_count_are_never_read(filler: int) -> None:
    """Lists of unequal length are filled up with anything; a filler of -1 or 0 is no block to fetch."""
    hold(filled(make(2, q=(3, 16), k=(5, 16), heads=1), filler))


@pytest.mark.usefixtures("small_tiles")
def test_a_fully_padded_first_block_is_no_nan() -> None:
    """The running maximum is still -inf when the first block has passed, and the row may have no other block."""
    hold_padded_first(16, 16)


@pytest.mark.parametrize("which", ["k", "k, v", "rest"])
def test_omitted_blocks_may_hold_nan(which: str) -> None:
    for seed, ragged in ((2, False), (4, True)):
        case = make(seed, q=(2, 16), k=(9, 8), heads=1, density=0.15, ragged=(False, ragged))
        query, key, value = case.inputs
        unused = oracle.unused_keys(case.blocks, key.shape[1])
        assert bool(unused.any()), "the case must omit something"
        planted = [query, oracle.plant_nan(key, case.blocks), value]
        if which != "k":
            planted[2] = oracle.plant_nan(value, case.blocks)
        if which == "rest":  # query slots without a token may hold anything as well
            idle = (reference.slot_block(case.blocks.q, query.shape[1]) < 0).transpose(1, 2)[..., None]
            planted[0] = torch.where(idle, torch.nan, query)

        def attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap = case.blocks) -> tuple[Tensor, Tensor]:
            return vsparse.block_sparse_attention(q, k, v, blocks)

        with oracle.poison():
            clean, found = oracle.run(attend, case.inputs), oracle.run(attend, planted)
        for name, tensor in clean.items():
            assert torch.equal(found[name], tensor), f"{name} changed"


def test_strided_inputs_and_gradients_are_read_in_place() -> None:
    case = make(6, q=TILE, k=TILE)

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        return vsparse.block_sparse_attention(*x, case.blocks)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]

    def apart(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = vsparse.block_sparse_attention(*map(strided, x), case.blocks)
        return strided(out), lse.transpose(1, 2).contiguous().transpose(1, 2)

    assert not any(strided(x).is_contiguous() for x in case.inputs)
    plain = oracle.run(attend, case.inputs)
    for name, tensor in oracle.run(apart, case.inputs).items():
        assert torch.equal(tensor, plain[name]), name


def test_two_runs_are_bit_equal_and_leave_the_generator_alone() -> None:
    case = make(5, q=TILE, k=TILE, dtype=torch.bfloat16)

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        return vsparse.block_sparse_attention(*x, case.blocks)

    with oracle.still_generator():
        first, second = oracle.run(attend, case.inputs), oracle.run(attend, case.inputs)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("threshold", [0.0, 2.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skip_leaves_late_blocks_out(threshold: float, dtype: torch.dtype) -> None:
    case = make(4, q=(3, 16), k=(6, 16), size=2.0, dtype=dtype, density=0.8, bias=True)
    options = {"skip_threshold": threshold}
    # Which blocks are skipped must not hang on the last bit: the float64 answer is asked for in the working dtype's
    # own products only where it is the same.
    skipped = [
        reference.block_sparse_attention(*(x.to(d) for x in case.inputs), case.blocks, scale=case.scale, **options)[0]
        for d in (torch.float64, dtype)
    ]
    exact = reference.block_sparse_attention(*(x.double() for x in case.inputs), case.blocks, scale=case.scale)[0]
    assert (threshold == 30.0) == torch.equal(skipped[0], exact)
    oracle.assert_law(
        lambda q, k, v: vsparse.block_sparse_attention(q, k, v, case.blocks, **options),
        lambda q, k, v: reference.block_sparse_attention(q, k, v, case.blocks, scale=case.scale, **options),
        case.inputs,
        grads=False,
    )


@pytest.mark.parametrize("scanned", [32, 2048])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_transpose(density: float, scanned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transposing, "SCANNED", scanned)
    for seed, lead in ((1, (1, 1)), (3, (2, 2))):
        blocks = make(seed, q=(70, 1), k=(9, 4), density=density, lead=lead).blocks
        found, wanted = transposing.transpose(blocks), blocks.transpose()
        assert torch.equal(found.offset, wanted.offset)
        assert torch.equal(found.full_count, wanted.full_count)
        used = torch.arange(wanted.row.shape[-1]) < wanted.offset[..., -1:]
        assert torch.equal(torch.where(used, found.row, 70), wanted.row)
        used = torch.arange(70) < wanted.full_count[..., None]
        assert torch.equal(torch.where(used, found.full, 70), wanted.full)


def test_refusals_are_reasons() -> None:
    case = make(1, q=TILE, k=TILE)
    q, k, v = case.inputs
    rows = {row.name: row for row in backend.implementations("block_sparse_attention", "cuda")}
    ask = rows["triton"].unsupported
    assert ask(q, k, v, case.blocks, scale=1.0) == []
    assert "float64 is not among" in ask(q.double(), k.double(), v.double(), case.blocks, scale=1.0)[0]
    assert "must be a positive number" in ask(q, k, v, case.blocks, scale=-1.0)[0]
    wide = make(1, q=TILE, k=TILE, width=257)
    assert "head_dim 257 is larger than 256" in ask(*wide.inputs, wide.blocks, scale=1.0)[0]
    long = make(1, q=(1, 300), k=TILE)
    assert "several" in ask(*long.inputs, long.blocks, scale=1.0, skip_threshold=1.0)[0]


def test_a_map_of_strided_lists() -> None:
    case = make(7, q=TILE, k=TILE)
    index = case.blocks.index
    wide = dc.replace(case.blocks, index=torch.cat([index, index], -1)[..., : index.shape[-1]])
    assert not wide.index.is_contiguous()
    for mine, theirs in zip(
        vsparse.block_sparse_attention(*case.inputs, wide),
        vsparse.block_sparse_attention(*case.inputs, case.blocks),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_offsets_are_wide_enough() -> None:
    """Slots whose offset, counted in elements, takes more than 32 bits; of the memory only what is used is touched."""
    case = make(1, q=(3, 16), k=(3, 16), dtype=torch.bfloat16)
    query, key, value = (x[:1, :, :1] for x in case.inputs)
    blocks = BlockMap.full(*(dc.replace(side, length=side.length[:1]) for side in (case.blocks.q, case.blocks.k)))
    far = 2**31 // 40

    def apart(x: Tensor) -> Tensor:
        memory = torch.empty(x.shape[1] * far, dtype=x.dtype)
        view = memory.as_strided(x.shape, (far, far, x.shape[3], 1))
        view.copy_(x)
        return view

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        return vsparse.block_sparse_attention(*x, blocks)

    def attend_apart(*x: Tensor) -> tuple[Tensor, Tensor]:
        return attend(*map(_Apart.apply, x))

    class _Apart(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return apart(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    assert query.shape[1] * far > 2**31
    plain = oracle.run(attend, (query, key, value))
    for name, tensor in oracle.run(attend_apart, (query, key, value)).items():
        assert torch.equal(tensor, plain[name]), name


@pytest.mark.parametrize("d", range(1, 257))
def test_width_covers_the_head_dim(d: int) -> None:
    width = Width.of(d)
    assert d <= width.D1 + width.D2
    assert width.D1 >= 16
    assert width.D1 & (width.D1 - 1) == 0
    assert width.D2 == 0 or (width.D2 >= 16 and width.D2 & (width.D2 - 1) == 0 and width.D1 >= 64)
    assert max(16, 2 ** (d - 1).bit_length()) >= width.D1 + width.D2
