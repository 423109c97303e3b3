"""The Triton mass kernel and the search in the interpreter, by the law: lists, lengths, sampled rows, stale LSEs."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any

import interpreter
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, Case, make
from torch import Tensor

import vsparse
from vsparse import BlockMap, backend, reference
from vsparse.kernels.block_mass import launch, tuning
from vsparse.kernels.tiles import Width
from vsparse.layouts import Blocking

TILE = (4, 16)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with interpreter.triton_kernels("block_mass", "search_attention"):
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows: blocks of a few dozen slots then take several, and shorter ones share one."""

    def config(arch: int, width: Width, rows: int, blocks: int, *_: int) -> tuning.Config:
        each = 16 if blocks == 1 else min(16, 1 << max(0, rows - 1).bit_length())
        return tuning.Config(16, 16, 4, 1, blocks=16 // each)

    monkeypatch.setattr(launch, "config", config)


def sides(case: Case) -> tuple[Blocking, Blocking]:
    return case.blocks.q, case.blocks.k


def stale_lse(case: Case) -> Tensor:
    """``[B, Sq, H]``: the LSE over all keys as of slightly other inputs; -inf where no token is, and elsewhere."""
    q, k, v = (x.double() for x in case.inputs)
    lse = reference.block_sparse_attention(q, k, v, BlockMap.full(*sides(case)), scale=case.scale)[1]
    generator = torch.Generator().manual_seed(0)
    lse = lse + torch.randn(lse.shape, generator=generator) * 0.1
    return torch.where(torch.rand(lse.shape, generator=generator) < 0.1, -torch.inf, lse).float()


def hold(case: Case, *, listed: bool = False, rows: Tensor | None = None) -> None:
    """The implementation itself, for the op hands no bias on."""
    lse, options = stale_lse(case), {"candidates": case.blocks if listed else None, "rows": rows}
    with oracle.poison():
        oracle.assert_law(
            lambda q, k: launch.block_mass(q, k, lse, *sides(case), scale=case.scale, **options),
            lambda q, k: reference.block_mass(
                q, k, lse.to(reference.statistics_dtype(q.dtype)), *sides(case), scale=case.scale, **options
            ),
            case.inputs[:2],
            grads=False,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_activation_scales(dtype: torch.dtype, size: float) -> None:
    case = make(1, q=TILE, k=TILE, dtype=dtype, size=size)
    hold(case)
    hold(case, listed=True)


@pytest.mark.usefixtures("small_tiles")
@given(
    seed=st.integers(0, 999),
    q=st.tuples(st.integers(1, 3), st.sampled_from([1, 7, 16, 33])),
    k=st.tuples(st.integers(1, 4), st.sampled_from([1, 16, 24, 32])),
    ragged=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    lead=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
    dtype=st.sampled_from(DTYPES),
    listed=st.booleans(),
    rows=st.none() | st.lists(st.integers(-3, 40), max_size=40),
)
def test_lists_and_lengths(
    seed: int,
    q: tuple[int, int],
    k: tuple[int, int],
    ragged: tuple[bool, bool],
    bias: bool,
    density: float,
    lead: tuple[int, int],
    dtype: torch.dtype,
    listed: bool,
    rows: list[int] | None,
) -> None:
    case = make(seed, q=q, k=k, ragged=ragged, bias=bias, density=density, lead=lead, dtype=dtype)
    hold(case, listed=listed, rows=None if rows is None else torch.tensor(rows, dtype=torch.int64))


@pytest.mark.parametrize("width", [3, 48, 64, 80, 96, 128, 160, 256])
def test_head_dims(width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hold(make(3, q=(3, 16), k=(3, 16), width=width, dtype=dtype), listed=True)


@pytest.mark.parametrize(("q", "k"), [((3, 64), (3, 64)), ((5, 16), (3, 64)), ((1, 200), (2, 128))])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_shipped_configurations(q: tuple[int, int], k: tuple[int, int], width: int) -> None:
    hold(make(4, q=q, k=k, width=width, dtype=torch.bfloat16))
    hold(make(4, q=q, k=k, width=width, dtype=torch.bfloat16), listed=True)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("rows", [[], [0], [15, 3, 3, 99, -1, 2**40, 9], list(range(64)) * 2])
def test_sampled_rows(rows: list[int], ragged: bool) -> None:
    for block, listed in ((16, False), (40, True)):
        case = make(7, q=(3, block), k=TILE, ragged=(ragged, not ragged))
        hold(case, listed=listed, rows=torch.tensor(rows, dtype=torch.int64))


@pytest.mark.parametrize("block", [16, 64, 200])
def test_sampled_rows_cost_their_share(block: int) -> None:
    for rows in (torch.tensor([3, 3, -1, block, 7]), torch.arange(16)):
        used = launch._offsets(rows, block)
        assert tuning.config(90, Width.of(64), len(used), 1, 64, 2).bm == 16  # as few as a product takes
        shared = tuning.config(90, Width.of(64), len(used), 99, 64, 2)
        assert shared.bm == 128
        assert shared.blocks == 128 // (1 << (len(used) - 1).bit_length())
        inside = torch.unique(rows[(rows >= 0) & (rows < block)])
        assert torch.equal(used[: len(inside)].long(), inside)
        assert bool((used[len(inside) :] == block).all())
    assert len(launch._offsets(torch.arange(3 * block), block)) == block


def test_rows_without_a_finite_lse_do_not_count() -> None:
    case = make(2, q=TILE, k=TILE)
    q, k, _ = case.inputs
    lse = stale_lse(case)
    empty = torch.arange(lse.shape[1]) % 3 == 0
    lse[:, empty] = -torch.inf
    lse[:, 1] = torch.inf
    empty[1] = True
    planted = torch.where(empty[:, None, None], torch.nan, q)  # what they hold is never read
    found = vsparse.block_mass(planted, k, lse, *sides(case))
    assert torch.equal(found, vsparse.block_mass(q, k, lse, *sides(case)))
    oracle.assert_law(
        lambda q, k: vsparse.block_mass(q, k, lse, *sides(case)),
        lambda q, k: reference.block_mass(q, k, lse.to(q.dtype), *sides(case), scale=case.scale),
        (q, k),
        grads=False,
    )


def test_what_is_no_candidate_may_hold_nan() -> None:
    for seed, ragged in ((2, False), (4, True)):
        case = make(seed, q=(3, 16), k=(9, 8), density=0.15, ragged=(False, ragged))
        q, k, _ = case.inputs
        assert bool(oracle.unused_keys(case.blocks, k.shape[1]).any()), "the case must omit something"
        lse, options = stale_lse(case), {"candidates": case.blocks, "rows": torch.tensor([1, 4, 6])}
        idle = (reference.slot_block(case.blocks.q, q.shape[1]) < 0).transpose(1, 2)[..., None]
        padding = (reference.slot_block(case.blocks.k, k.shape[1]) < 0).transpose(1, 2)[..., None]
        planted = torch.where(padding, torch.nan, oracle.plant_nan(k, case.blocks))
        with oracle.poison():
            clean = vsparse.block_mass(q, k, lse, *sides(case), **options)
            found = vsparse.block_mass(torch.where(idle, torch.nan, q), planted, lse, *sides(case), **options)
        assert torch.equal(found, clean)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 2, 4, 6, 8])[::2]])
def test_strided_inputs_are_read_in_place(rows: Tensor | None) -> None:
    case = make(6, q=TILE, k=TILE)
    plain = [*case.inputs[:2], stale_lse(case)]
    apart = [strided(x) for x in plain]
    assert not any(x.is_contiguous() for x in apart)
    options: dict[str, Any] = {"candidates": case.blocks, "rows": rows}
    expected = vsparse.block_mass(*plain, *sides(case), **options)
    assert torch.equal(vsparse.block_mass(*apart, *sides(case), **options), expected)


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_are_bit_equal_and_leave_the_generator_alone() -> None:
    case = make(5, q=(2, 40), k=(3, 24), dtype=torch.bfloat16)
    lse = stale_lse(case)
    with oracle.still_generator():
        first, second = (vsparse.block_mass(*case.inputs[:2], lse, *sides(case)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_of_its_own_lse_adds_up_to_the_tokens(dtype: torch.dtype) -> None:
    case = make(8, q=TILE, k=TILE, dtype=dtype)
    q, k, v = case.inputs
    lse = reference.block_sparse_attention(q, k, v, BlockMap.full(*sides(case)), scale=case.scale)[1]
    oracle.assert_law(
        lambda q, k: vsparse.block_mass(q, k, lse, *sides(case)).sum(-1),
        lambda q, k: reference.block_mass(
            q, k, lse.to(reference.statistics_dtype(q.dtype)), *sides(case), scale=case.scale
        ).sum(-1),
        (q, k),
        grads=False,
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_search_is_dense_attention_with_its_mass(dtype: torch.dtype, ragged: bool) -> None:
    case = make(10, q=TILE, k=TILE, dtype=dtype, ragged=(ragged, ragged))
    side, inputs = case.blocks.k, [case.inputs[1], *case.inputs[1:]]
    oracle.assert_law(
        lambda q, k, v: vsparse.search_attention(q, k, v, side),
        lambda q, k, v: reference.search_attention(q, k, v, side, scale=case.scale),
        inputs,
        grads=False,
    )
    oracle.assert_law(
        lambda q, k, v: vsparse.search_attention(q, k, v, side)[:2],
        lambda q, k, v: reference.search_attention(q, k, v, side, scale=case.scale)[:2],
        inputs,
        also=[oracle.fused(BlockMap.full(side), case.scale)],
    )


def test_refusals_are_reasons() -> None:
    case = make(1, q=TILE, k=TILE)
    q, k, v = case.inputs
    lse = stale_lse(case)
    (mass,), (search,) = (backend.implementations(op, "cuda") for op in ("block_mass", "search_attention"))
    assert mass.unsupported(q, k, lse, *sides(case), scale=1.0) == []
    assert "float64 is not among" in mass.unsupported(q.double(), k.double(), lse, *sides(case), scale=1.0)[0]
    assert "of one dtype" in mass.unsupported(q.half(), k, lse, *sides(case), scale=1.0)[0]
    for scale in (-1.0, 0.0, float("inf"), float("nan")):
        assert "must be a positive number" in mass.unsupported(q, k, lse, *sides(case), scale=scale)[0]
    wide = make(1, q=TILE, k=TILE, width=257)
    assert "head_dim 257 is larger than 256" in mass.unsupported(*wide.inputs[:2], lse, *sides(case), scale=1.0)[0]
    assert search.unsupported(k, k, v, case.blocks.k, scale=1.0) == []
    assert "must be a positive number" in search.unsupported(k, k, v, case.blocks.k, scale=-1.0)[0]


def test_a_map_of_strided_lists() -> None:
    case = make(7, q=TILE, k=TILE)
    index = case.blocks.index
    wide = dc.replace(case.blocks, index=torch.cat([index, index], -1)[..., : index.shape[-1]])
    lse = stale_lse(case)
    assert not wide.index.is_contiguous()
    mine, theirs = (
        vsparse.block_mass(*case.inputs[:2], lse, *sides(case), candidates=blocks) for blocks in (wide, case.blocks)
    )
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("arch", [0, 80, 89, 90, 100])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_shared_memory(arch: int, itemsize: int) -> None:
    """Q and the ring of K: the estimate by which the depths were chosen."""
    most = {0: 99, 80: 163, 89: 99, 90: 227, 100: 227}[arch] * 1024
    for d in (16, 64, 80, 128, 160, 256):
        for block in (16, 64, 128, 1000):
            width = Width.of(d)
            chosen = tuning.config(arch, width, block, 9, block, itemsize)
            columns = width.D1 + width.D2
            assert (chosen.bm + (chosen.stages - 1) * chosen.bn) * columns * itemsize + 1024 <= most
