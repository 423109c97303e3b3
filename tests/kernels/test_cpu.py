"""CPU kernels against the float64 reference, by the law: every corner of lists and lengths, every gradient."""

from __future__ import annotations

import oracle
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, filled, hold, hold_padded_first, make
from torch import Tensor

import vsparse
from vsparse import BlockMap, reference
from vsparse.kernels.cpu import mass as cpu_mass
from vsparse.kernels.cpu import rows as cpu_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_activation_scales(dtype: torch.dtype, size: float) -> None:
    for seed in range(4):
        hold(make(seed, dtype=dtype, size=size))


@given(
    seed=strategies.seeds,
    q=st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 5, 16, 33])),
    k=st.tuples(st.integers(1, 9), st.sampled_from([1, 3, 8, 40])),
    ragged=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    lead=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
)
def test_lists_and_lengths(
    seed: int,
    q: tuple[int, int],
    k: tuple[int, int],
    ragged: tuple[bool, bool],
    bias: bool,
    density: float,
    lead: tuple[int, int],
) -> None:
    # float64, where two ways to add cannot be told apart by luck; the dtypes have their fixed cases above.
    case = make(seed, q=q, k=k, ragged=ragged, bias=bias, density=density, lead=lead, width=4)
    oracle.assert_identity(
        lambda q, k, v: vsparse.block_sparse_attention(q, k, v, case.blocks),
        lambda q, k, v: reference.block_sparse_attention(q, k, v, case.blocks, scale=case.scale),
        case.inputs,
    )


@pytest.mark.parametrize("width", [3, 64, 80, 96, 128, 256])
def test_head_dims(width: int) -> None:
    hold(make(3, width=width))
    hold(make(3, width=width, dtype=torch.bfloat16))


@pytest.mark.parametrize("q", [(40, 1), (5, 8)])
@pytest.mark.parametrize("k", [(40, 1), (3, 30)])
def test_single_tokens_and_long_chunks(q: tuple[int, int], k: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hold(make(7, q=q, k=k, dtype=dtype, ragged=(False, True)))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few dozen slots make many chunks, lane groups, parts and tiles."""
    for module, name, value in (
        (cpu_rows, "PIECE", 64),
        (cpu_rows, "GROUP", 64),
        (cpu_rows, "PART", 3),
        (cpu_mass, "TILE", 1),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [(6, 9), (40, 1)])
def test_work_in_many_chunks(q: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(3):
        hold(make(seed, q=q, k=(7, 12), dtype=dtype, bias=seed == 1, ragged=(seed == 2, seed == 1)))


@pytest.mark.usefixtures("small_chunks")
def test_mass_and_pool_in_many_chunks() -> None:
    case = make(4, q=(6, 9), k=(7, 12))
    sides = case.blocks.q, case.blocks.k
    lse = vsparse.block_sparse_attention(*case.inputs, BlockMap.full(*sides))[1]
    for candidates in (None, case.blocks):
        options = {"candidates": candidates, "scale": case.scale}
        with oracle.poison():
            oracle.assert_law(
                lambda q, k, o=options: vsparse.block_mass(q, k, lse, *sides, **o),
                lambda q, k, o=options: reference.block_mass(q, k, lse.to(q.dtype), *sides, **o),
                case.inputs[:2],
                grads=False,
            )
    oracle.assert_law(
        lambda x: vsparse.block_pool(x, sides[1]), lambda x: reference.block_pool(x, sides[1])[0], case.inputs[1:2]
    )


@pytest.mark.parametrize("filler", [-1, 2**31 - 1])
@pytest.mark.parametrize("q", [(4, 8), (12, 1)])
def test_entries_past_the_count_are_never_read(q: tuple[int, int], filler: int) -> None:
    """A filler of -1 or 0 is no block: nothing is fetched for it, and it adds nothing to the denominator."""
    hold(filled(make(2, q=q, k=(7, 12)), filler))


@pytest.mark.parametrize("q", [8, 1])
def test_a_fully_padded_first_block_is_no_nan(q: int) -> None:
    """Nor a row of such blocks alone: its output is 0, its LSE -inf."""
    hold_padded_first(q, 8, DTYPES)


@pytest.mark.parametrize("q", [(4, 8), (12, 1)])
def test_omitted_blocks_may_hold_nan(q: tuple[int, int]) -> None:
    for seed in range(4):
        case = make(seed, q=q, k=(9, 4), density=0.15)
        query, key, value = case.inputs
        assert bool(oracle.unused_keys(case.blocks, key.shape[1]).any()), "the case must omit something"
        planted = [query, oracle.plant_nan(key, case.blocks), oracle.plant_nan(value, case.blocks)]

        def attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap = case.blocks) -> tuple[Tensor, Tensor]:
            return vsparse.block_sparse_attention(q, k, v, blocks)

        with oracle.poison():
            clean, found = oracle.run(attend, case.inputs), oracle.run(attend, planted)
        assert clean.keys() == found.keys()
        for name, value in found.items():
            assert torch.equal(value, clean[name]), f"{name} changed"


def test_two_runs_are_bit_equal_and_leave_the_generator_alone() -> None:
    case = make(5, dtype=torch.bfloat16)

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        return vsparse.block_sparse_attention(*x, case.blocks)

    with oracle.still_generator():
        first, second = oracle.run(attend, case.inputs), oracle.run(attend, case.inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_another_default_device_does_not_matter() -> None:
    case = make(5, q=(12, 1))
    sides = case.blocks.q, case.blocks.k

    def all_ops(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = vsparse.block_sparse_attention(q, k, v, case.blocks)
        mass = vsparse.block_mass(q, k, lse, *sides, candidates=case.blocks)
        return out, lse, mass, *vsparse.search_attention(k, k, v, sides[1]), vsparse.block_pool(q, sides[0])

    here = oracle.run(all_ops, case.inputs, grads=False)
    with torch.device("meta"):
        there = all_ops(*case.inputs)
    for mine, theirs in zip(here.values(), there, strict=True):
        assert torch.equal(mine, theirs)


def test_strided_inputs() -> None:
    case = make(6)
    wide = [torch.cat([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., :16] for x in case.inputs]
    assert not any(x.is_contiguous() for x in wide)
    for mine, theirs in zip(
        vsparse.block_sparse_attention(*wide, case.blocks),
        vsparse.block_sparse_attention(*case.inputs, case.blocks),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("which", ["all", "candidates", "rows", "stale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mass(which: str, dtype: torch.dtype) -> None:
    case = make(8, dtype=dtype, ragged=(False, True))
    q, k, _ = case.inputs
    sides = case.blocks.q, case.blocks.k
    lse = vsparse.block_sparse_attention(*case.inputs, BlockMap.full(*sides))[1]
    options: dict[str, object] = {}
    if which == "candidates":
        options["candidates"] = case.blocks
    if which == "rows":
        options["rows"] = torch.tensor([0, 3, 5])
    if which == "stale":
        lse = lse + torch.randn(lse.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    oracle.assert_law(
        lambda q, k: vsparse.block_mass(q, k, lse, *sides, **options),  # type: ignore[arg-type]
        lambda q, k: reference.block_mass(
            q, k, lse.to(reference.statistics_dtype(q.dtype)), *sides, scale=case.scale, **options
        ),  # type: ignore[arg-type]
        (q, k),
        grads=False,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_pool(dtype: torch.dtype, ragged: bool) -> None:
    case = make(9, dtype=dtype, ragged=(False, ragged))
    side = case.blocks.k
    oracle.assert_law(
        lambda x: vsparse.block_pool(x, side), lambda x: reference.block_pool(x, side)[0], case.inputs[1:2]
    )
    oracle.assert_law(
        lambda x: vsparse.block_pool(x, side, self_similarity=True)[1],
        lambda x: reference.block_pool(x, side)[1],
        case.inputs[1:2],
        grads=False,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_equals_the_unsplit_attention(dtype: torch.dtype) -> None:
    case = make(10, dtype=dtype, density=0.7)
    keep = case.blocks.to_mask()
    left = torch.arange(keep.shape[-1]) % 2 == 0
    parts = [BlockMap.from_mask(keep & side, case.blocks.q, case.blocks.k) for side in (left, ~left)]

    def split(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = [vsparse.block_sparse_attention(q, k, v, blocks) for blocks in parts]
        return vsparse.merge_attention([out for out, _ in found], [lse for _, lse in found])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = [reference.block_sparse_attention(q, k, v, blocks, scale=case.scale) for blocks in parts]
        return reference.merge_attention([out for out, _ in found], [lse for _, lse in found])

    oracle.assert_law(split, plain, case.inputs)
    oracle.assert_identity(
        split, lambda q, k, v: reference.block_sparse_attention(q, k, v, case.blocks, scale=case.scale), case.inputs
    )


def test_search_is_dense_attention_with_its_mass() -> None:
    case = make(11, q=(5, 6), k=(5, 6))
    side, inputs = case.blocks.q, case.inputs[:1] * 3
    oracle.assert_law(
        lambda q, k, v: vsparse.search_attention(q, k, v, side)[:2],
        lambda q, k, v: reference.search_attention(q, k, v, side, scale=case.scale)[:2],
        inputs,
    )
