"""The forward that reads K and V through tensor descriptors, in the interpreter: the law, equal bits, refusals."""

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
from kernel_cases import Case, hold, make
from torch import Tensor

import vsparse
from vsparse import reference
from vsparse.kernels.block_sparse import launch, tuning
from vsparse.kernels.tiles import Width, descriptors
from vsparse.measure import doctor

HALF = (torch.bfloat16, torch.float16)
OP = "block_sparse_attention"


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with interpreter.triton_kernels(OP, f"{OP}_backward"):
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Descriptors asked for wherever they can be had; the list of those that launches made."""
    found: list[Any] = []
    build = launch.described
    monkeypatch.setattr(launch, "described", lambda *given: found.append(build(*given)) or found[-1])
    monkeypatch.setattr(launch, "config", lambda *sizes: tuning.config(*sizes[:6], True))
    return found


def run(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    return launch.block_sparse_attention(*case.inputs, case.blocks, scale=case.scale, **options)


def same_without(case: Case, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """The same bits as the same tiles read through pointers."""
    chosen = launch.config
    with oracle.poison():
        found = run(case, **options)
        monkeypatch.setattr(launch, "config", lambda *sizes: dc.replace(chosen(*sizes), tma=False))
        wanted = run(case, **options)
    monkeypatch.setattr(launch, "config", chosen)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [8, 48, 64, 72, 80, 96, 128, 256])
def test_head_dims(width: int, dtype: torch.dtype, made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(3, q=(3, 16), k=(3, 16), heads=1, width=width, dtype=dtype)
    hold(case)
    assert len(made) == (4 if Width.of(width).D2 else 2)
    same_without(case, monkeypatch)


@pytest.mark.parametrize(("q", "k"), [((2, 64), (3, 64)), ((1, 128), (3, 64)), ((1, 128), (2, 128))])
@pytest.mark.parametrize("width", [64, 128])
def test_blocks_of_several_tiles(
    q: tuple[int, int], k: tuple[int, int], width: int, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(4, q=q, k=k, batch=1, heads=1, width=width, dtype=torch.bfloat16, density=0.6, size=4.0)
    hold(case)
    assert made
    same_without(case, monkeypatch)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 999),
    q=st.tuples(st.integers(1, 2), st.sampled_from([1, 16, 33])),
    k=st.tuples(st.integers(1, 3), st.sampled_from([16, 32, 48])),
    bias=st.booleans(),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    shared=st.booleans(),
    dtype=st.sampled_from(HALF),
)
def test_lists_and_lengths(
    seed: int, q: tuple[int, int], k: tuple[int, int], bias: bool, density: float, shared: bool, dtype: torch.dtype
) -> None:
    lead = (1, 1) if shared else (1, 2)
    case = make(seed, q=q, k=k, bias=bias, density=density, dtype=dtype, batch=1, lead=lead)
    with pytest.MonkeyPatch.context() as patch, oracle.poison():
        patch.setattr(launch, "config", lambda *_: tuning.Config(16, 16, 4, 1, tma=True))
        assert launch.chosen_for(*case.inputs, case.blocks).tma
        hold(case)
        same_without(case, patch)


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("which", ["k", "k, v", "rest"])
def test_omitted_blocks_may_hold_nan(which: str) -> None:
    case = make(2, q=(2, 16), k=(9, 16), heads=1, density=0.15, dtype=torch.bfloat16)
    query, key, value = case.inputs
    assert bool(oracle.unused_keys(case.blocks, key.shape[1]).any())
    planted = [query, oracle.plant_nan(key, case.blocks), value]
    if which != "k":
        planted[2] = oracle.plant_nan(value, case.blocks)
    if which == "rest":
        idle = (reference.slot_block(case.blocks.q, query.shape[1]) < 0).transpose(1, 2)[..., None]
        planted[0] = torch.where(idle, torch.nan, query)
    with oracle.poison():
        clean, found = run(case), run(dc.replace(case, inputs=planted))
    for mine, theirs in zip(found, clean, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("threshold", [0.0, 2.0, 30.0])
def test_late_blocks_are_skipped_alike(threshold: float, made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(4, q=(3, 16), k=(6, 16), size=2.0, dtype=torch.bfloat16, density=0.8, bias=True)
    same_without(case, monkeypatch, skip_threshold=threshold)
    assert made


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _slice(x: Tensor) -> Tensor:
    """As q, k and v lie beside each other in one projection."""
    return torch.stack([x, x, x], 2)[:, :, 1]


def _far(x: Tensor) -> Tensor:
    """Slots whose offset, counted in elements, takes more than 32 bits; only what is used is touched."""
    far = 2**31 // 640 * 16
    memory = torch.empty(x.shape[1] * far, dtype=x.dtype)
    view = memory.as_strided(x.shape, (x[0, 0].numel(), far, x.shape[3], 1))
    return view.copy_(x)


@pytest.mark.parametrize("lay", [_heads_first, _slice, _far])
def test_strided_tensors_are_read_in_place(lay: Any, made: list[Any]) -> None:
    case = make(6, q=(4, 16), k=(4, 16), dtype=torch.bfloat16)
    apart = [lay(x) for x in case.inputs]
    found = run(dc.replace(case, inputs=apart))
    assert [x.base.data_ptr() for x in made] == [x.data_ptr() for x in apart[1:]]
    for mine, theirs in zip(found, run(case), strict=True):
        assert torch.equal(mine, theirs)


def test_the_strides_of_single_elements_do_not_count(made: list[Any]) -> None:
    case = make(6, q=(2, 16), k=(2, 16), batch=1, heads=1, dtype=torch.bfloat16)
    odd = [x.as_strided(x.shape, (3, x.stride(1), 5, 1)) for x in case.inputs]
    for mine, theirs in zip(run(dc.replace(case, inputs=odd)), run(case), strict=True):
        assert torch.equal(mine, theirs)
    assert all(stride % 8 == 0 and stride > 0 for each in made for stride in each.strides[:-1])


def _odd(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :1]], -1)[..., :-1]


def _columns(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _shifted(x: Tensor) -> Tensor:
    memory = torch.cat([x.new_zeros(1), x.flatten()])
    return memory[1:].view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    return x[:, :, :1].expand_as(x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_odd, "v: slots are 68 bytes apart, a descriptor needs a positive multiple of 16"),
        (_columns, "v: columns are 2 elements apart"),
        (_shifted, "v: its memory does not start at a multiple of 16 bytes"),
        (_expanded, "v: heads are 0 bytes apart"),
    ],
)
def test_tensors_that_have_none_are_read_through_pointers(change: Any, words: str, made: list[Any]) -> None:
    case = make(1, q=(2, 16), k=(3, 16), dtype=torch.bfloat16)
    case = dc.replace(case, inputs=[*case.inputs[:2], change(case.inputs[2])])
    told = launch.notes(*case.inputs, case.blocks, scale=1.0)
    assert any(line.startswith(f"no tensor descriptors: {words}") for line in told)
    plain = [x.clone(memory_format=torch.contiguous_format) for x in case.inputs]
    found = run(case)
    assert not made
    for mine, theirs in zip(found, run(dc.replace(case, inputs=plain)), strict=True):
        assert torch.equal(mine, theirs)
    assert made


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": (3, 16), "ragged": (False, True)}, "key blocks that have starts"),
        ({"k": (3, 24)}, "key blocks of 24 slots are no whole number of tiles of 32 rows"),
        ({"k": (3, 16), "dtype": torch.float32}, "torch.float32 would spill registers"),
        ({"k": (3, 16), "width": 3}, "k: heads are 6 bytes apart"),
    ],
)
def test_maps_and_dtypes_that_have_none(options: dict[str, Any], words: str, made: list[Any]) -> None:
    case = make(1, **{"q": (2, 16), "dtype": torch.bfloat16, **options})
    assert words in "; ".join(launch.notes(*case.inputs, case.blocks, scale=1.0))
    hold(case)
    assert not made


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (("architecture", lambda _: 80), "compute capability 8.0 has no tensor descriptors, 9.0 is the first"),
        (("TRITON", (99, 0)), "is older than 99.0"),
    ],
)
def test_devices_and_versions(patch: tuple[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, *patch)
    case = make(1, q=(2, 16), k=(3, 16), dtype=torch.bfloat16)
    assert words in "; ".join(launch.notes(*case.inputs, case.blocks, scale=1.0))
    assert descriptors.undescribed({"x": torch.empty(0, 1, 1, 1)})[-1] == "x: it is empty"


def test_nothing_takes_them_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(1, q=(2, 64), k=(3, 64), width=64, dtype=torch.bfloat16)
    (note,) = launch.notes(*case.inputs, case.blocks, scale=1.0)
    assert note == "no tensor descriptors: they were not measured to be faster"
    for arch in (0, 80, 89, 90, 100, 103, 120):
        sizes = arch, Width.of(64), 64, 64, 2
        assert not tuning.config("attend", *sizes).tma
        assert tuning.config("attend", *sizes) == tuning.config("attend", *sizes, False)
        has = tuning.config("attend", *sizes, True).tma
        assert has == tuning.limits("attend", *sizes, True).tma == (arch in (0, 90, 100, 103))
        assert not any(tuning.config(step, *sizes, True).tma for step in ("grad_queries", "grad_keys"))
    monkeypatch.setattr(launch, "architecture", lambda _: 120)
    (note,) = launch.notes(*case.inputs, case.blocks, scale=1.0)
    assert note == "no tensor descriptors: no configuration with them for compute capability 12.0"


def test_what_is_measured_becomes_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "DESCRIPTORS", frozenset({(90, 64, False)}))
    sizes = Width.of(64), 64, 64, 2
    assert tuning.config("attend", 90, *sizes) == tuning.config("attend", 90, *sizes, True)
    assert not tuning.config("attend", 100, *sizes).tma
    monkeypatch.setattr(launch, "architecture", lambda _: 90)
    case = make(1, q=(2, 64), k=(3, 64), width=64, dtype=torch.bfloat16)
    assert launch.notes(*case.inputs, case.blocks, scale=1.0) == []
    hold(case)
    assert not launch.chosen_for(*case.inputs[:2], _columns(case.inputs[2]), case.blocks).tma


def test_the_doctor_says_why_there_are_none() -> None:
    found = doctor.notes(doctor.verdicts())
    said = {words: calls for words, calls in found.items() if "descriptors" in words}
    assert "triton: no tensor descriptors: they were not measured to be faster" in said
    assert "float32" in said["triton: no tensor descriptors: torch.float32 would spill registers"]
    assert all(OP in calls for calls in said.values())


def test_gradients_flow_through_it(made: list[Any]) -> None:
    case = make(5, q=(2, 16), k=(3, 16), dtype=torch.bfloat16)
    oracle.run(lambda *x: vsparse.block_sparse_attention(*x, case.blocks), case.inputs)
    assert len(made) == 2
