"""The selection kernel in the interpreter: the very lists of the reference, ties, forced sets and NaN included."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vsparse import backend, reference
from vsparse.blocks import lists
from vsparse.ops.selection import select_blocks

RULES = ("count", "reach", "stay", "value")


def case(seed: int, shape: tuple[int, int, int, int], rule: str, *, ties: bool, forced: bool) -> tuple[Any, ...]:
    """Non-negative float32 scores (four values, if they are to tie), lengths with empty blocks, limits per row."""
    batch, heads, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape, generator=generator)
    if ties:
        scores = (scores * 4).floor() / 4
    length = torch.randint(0, 4, (batch, 1, columns), generator=generator, dtype=torch.int32)
    must = torch.rand(1, heads, rows, columns, generator=generator) < 0.2 if forced else None
    if rule == "count":
        limit = torch.randint(0, columns + 2, (batch, heads, rows), generator=generator, dtype=torch.int32)
    else:
        limit = torch.rand(1, heads, 1, generator=generator, dtype=torch.float64)
        limit[:, 0] = 1.0
    return scores, length, must, limit


def assert_same(args: tuple[Any, ...], **options: Any) -> None:
    wanted = reference.select_blocks(*args, **options)
    with interpreter.triton_kernels("select_blocks"):
        found = select_blocks(*args, *options.values())
    assert torch.equal(found[1], wanted[1])
    used = torch.arange(options["capacity"]) < wanted[1][..., None]
    assert torch.equal(torch.where(used, found[0], -1), torch.where(used, wanted[0], -1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("budget", ["exempt", "compete", "join"])
@pytest.mark.parametrize("forced", [False, True])
def test_rules_and_budgets(rule: str, budget: str, forced: bool) -> None:
    for seed, ties, least in ((0, False, 0), (1, True, 2)):
        args = case(seed, (2, 2, 3, 21), rule, ties=ties, forced=forced)
        assert_same(args, rule=rule, budget=budget, least=least, capacity=21)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 40)),
    rule=st.sampled_from(RULES),
    budget=st.sampled_from(["exempt", "compete", "join"]),
    ties=st.booleans(),
    forced=st.booleans(),
    least=st.integers(0, 3),
    share=st.sampled_from([0.3, 1.0]),
)
def test_shapes(
    seed: int,
    shape: tuple[int, int, int, int],
    rule: str,
    budget: str,
    ties: bool,
    forced: bool,
    least: int,
    share: float,
) -> None:
    args = case(seed, shape, rule, ties=ties, forced=forced)
    assert_same(args, rule=rule, budget=budget, least=least, capacity=max(1, int(share * shape[-1])))


def test_signed_scores_zeros_and_infinities() -> None:
    row = torch.tensor([0.0, -0.0, -1.5, 3.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3.0, -torch.inf])
    scores = row.expand(1, 1, 11, 10)
    limit = torch.arange(11, dtype=torch.int32)[None, None]
    length = torch.ones(1, 1, 10, dtype=torch.int32)
    assert_same((scores, length, None, limit), rule="count", budget="exempt", least=0, capacity=10)


def test_nan_takes_a_place_and_is_not_kept() -> None:
    scores = torch.tensor([1.0, torch.nan, 2.0, 3.0]).expand(1, 1, 4, 4)
    limit, length = torch.arange(1, 5, dtype=torch.int32)[None, None], torch.ones(1, 1, 4, dtype=torch.int32)
    assert_same((scores, length, None, limit), rule="count", budget="exempt", least=0, capacity=4)


def test_strided_and_half_scores() -> None:
    scores, length, forced, limit = case(3, (2, 2, 3, 12), "count", ties=True, forced=True)
    turned = scores.bfloat16().transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    assert_same((turned, length, forced, limit), rule="count", budget="exempt", least=0, capacity=12)


def test_refusals_are_reasons() -> None:
    (row,) = backend.implementations("select_blocks", "cuda")
    args = case(0, (1, 1, 2, 5), "count", ties=False, forced=False)
    options: dict[str, Any] = {"rule": "count", "budget": "exempt", "least": 0, "capacity": 5}
    assert row.unsupported(*args, **options) == []
    assert "float64" in row.unsupported(args[0].double(), *args[1:], **options)[0]
    long = torch.empty(1, 1, 1, 20000, device="meta")
    assert "longer than 16384" in row.unsupported(long, *args[1:], **options)[0]


@pytest.mark.parametrize("capacity", [1, 3, 9])
def test_lists_of_a_mask(capacity: int) -> None:
    keep = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    index, count = lists(keep, capacity)
    for place in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        wanted: Tensor = keep[tuple(place)].nonzero().flatten()
        assert count[tuple(place)] == len(wanted)
        assert index[tuple(place)][: len(wanted)].tolist() == wanted[:capacity].tolist()
