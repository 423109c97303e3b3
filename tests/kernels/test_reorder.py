"""Packing and unpacking as one op: on the CPU and in the interpreter, equal to the definition to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import interpreter
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES
from torch import Tensor

from vsparse import backend, reference
from vsparse.layouts.reorder import reorder


@pytest.fixture(params=["copied", "triton"], autouse=True)
def _implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    chosen = interpreter.triton_kernels("reorder") if request.param == "triton" else contextlib.nullcontext()
    with chosen:
        x, index = torch.zeros(1, 2, 1, 3), torch.zeros(1, 1, 2, dtype=torch.int64)
        assert backend.lookup("reorder", "cpu", x, index).name == request.param, "these tests would test another"
        yield


def orders(seed: int, rows: int, slots: int, lead: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Random partial permutations: the row of each slot, the slot of each row, -1 for none."""
    generator = torch.Generator().manual_seed(seed)
    index, inverse = torch.full((*lead, slots), -1), torch.full((*lead, rows), -1)
    for b, h in ((b, h) for b in range(lead[0]) for h in range(lead[1])):
        number = int(torch.randint(0, min(rows, slots) + 1, (), generator=generator))
        row, slot = (torch.randperm(size, generator=generator)[:number] for size in (rows, slots))
        index[b, h, slot], inverse[b, h, row] = row, slot
    return index, inverse


@settings(max_examples=20)
@given(
    seed=st.integers(0, 999),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 5, 16, 80])),
    shared=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
)
def test_it_is_the_definition(
    seed: int, sizes: tuple[int, int], shape: tuple[int, int, int], shared: tuple[bool, bool], dtype: torch.dtype
) -> None:
    batch, heads, width = shape
    lead = (1 if shared[0] else batch, 1 if shared[1] else heads)
    index, inverse = orders(seed, *sizes, lead)
    x = torch.randn(batch, sizes[0], heads, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with oracle.poison():
        found = oracle.run(lambda y: reorder(y, index, inverse), [x])
    for name, wanted in oracle.run(lambda y: reference.reorder(y, index), [x]).items():
        assert torch.equal(found[name], wanted), name


def several_tiles() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 300, 2, 64), *orders(3, 300, 290, (2, 1))


def test_strided_rows_that_nobody_takes_may_hold_nan() -> None:
    x, index, inverse = several_tiles()
    wide = torch.stack([x, torch.full_like(x, torch.nan)], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
    planted = torch.where((inverse < 0).transpose(1, 2)[..., None], torch.nan, wide)
    assert not wide.is_contiguous()
    for y in (x, wide, planted):
        assert torch.equal(reorder(y, index, inverse), reference.reorder(x, index))


def test_the_gradient_is_a_gather_and_strides_are_those_of_the_fake() -> None:
    x, index, inverse = several_tiles()
    x.requires_grad_()
    y = reorder(x, index, inverse)
    grad = torch.randn(y.shape).transpose(0, 1).contiguous().transpose(0, 1)
    y.backward(grad)
    assert torch.equal(x.grad, reference.reorder(grad, inverse))
    oracle.strides_agree(reorder, (x.detach(), index, inverse))


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_compiler_sees_the_formula(lead: tuple[int, int]) -> None:
    """Traced, it is no op but a few that can be fused, with the same values and the same gradient."""
    index, inverse = orders(5, 12, 14, lead)
    x, graphs = torch.randn(2, 12, 2, 3), []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(reorder, backend=keep, fullgraph=True)
    found = oracle.run(lambda y: compiled(y, index, inverse), [x])
    for name, wanted in oracle.run(lambda y: reorder(y, index, inverse), [x]).items():
        assert torch.equal(found[name], wanted), name
    assert len(graphs) == 1
    parts = [part for part in graphs[0].modules() if isinstance(part, torch.fx.GraphModule)]
    assert not [node for part in parts for node in part.graph.nodes if "vsparse" in str(node.target)]
    torch.compiler.reset()


def test_refusals_are_reasons() -> None:
    x, index, _ = several_tiles()
    (row,) = backend.implementations("reorder", "cuda")
    assert row.unsupported(x, index) == []
    assert "float64 is not among" in row.unsupported(x.double(), index)[0]
