"""Sharing a budget among layers and heads: the best there is on small cases, and how far from it on large ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsparse.measure.tune import allocation
from vsparse.measure.tune.allocation import Allocation, allocate, lower_hull

numbers = st.integers(0, 40).map(float)
items_of = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=5)


def by_hand(items: list[Any], budget: float) -> float:
    """The least error of all combinations within the budget."""
    return min(
        sum(error for _, error in picked)
        for picked in itertools.product(*items)
        if sum(cost for cost, _ in picked) <= budget
    )


def checked(found: Allocation, items: list[Any], budget: float) -> None:
    assert found.cost == sum(choices[j][0] for choices, j in zip(items, found.chosen, strict=True)) <= budget + 1e-6
    assert found.error == sum(choices[j][1] for choices, j in zip(items, found.chosen, strict=True))


@given(items=items_of, more=numbers)
def test_small_cases_are_exact(items: list[Any], more: float) -> None:
    budget = sum(min(cost for cost, _ in choices) for choices in items) + more
    found = allocate(items, budget)
    checked(found, items, budget)
    assert found.error == found.bound == by_hand(items, budget)


@given(items=items_of, more=numbers)
def test_the_lagrangian_is_between_its_bound_and_a_step(items: list[Any], more: float) -> None:
    """The bound is one, and the gap is less than what one step of one hull takes away."""
    budget = sum(min(cost for cost, _ in choices) for choices in items) + more
    found = allocation._lagrangian(items, budget)
    checked(found, items, budget)
    best = by_hand(items, budget)
    assert found.bound <= best + 1e-9 * (1 + best)
    assert best <= found.error
    steps = [choices[a][1] - choices[b][1] for choices in items for a, b in itertools.pairwise(lower_hull(choices))]
    assert found.error - found.bound <= max(steps, default=0.0) + 1e-9


def test_on_the_hull_it_is_exact() -> None:
    """Convex choices and a budget that is spent to the last unit: greedy is optimal."""
    items = [[(float(c), scale * (8 - c) ** 2) for c in range(9)] for scale in (1.0, 2.0, 5.0)]
    for budget in range(25):
        found = allocation._lagrangian(items, float(budget))
        assert found.error == pytest.approx(by_hand(items, budget))


@given(choices=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_hull(choices: list[tuple[float, float]]) -> None:
    hull = lower_hull(choices)
    points = [choices[i] for i in hull]
    assert points[0][0] == min(cost for cost, _ in choices)
    assert points[-1][1] == min(error for _, error in choices)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert slopes == sorted(set(slopes))
    assert all(slope < 0 for slope in slopes)
    for cost, error in choices:  # none lies below
        for (a, b), slope in zip(itertools.pairwise(points), slopes, strict=True):
            if a[0] <= cost <= b[0]:
                assert error >= a[1] + slope * (cost - a[0]) - 1e-9


@pytest.mark.parametrize(
    ("items", "budget", "words"),
    [
        ([], 1.0, "there must be items"),
        ([[(1.0, 1.0)], []], 1.0, "each with a choice"),
        ([[(1.0, -1.0)]], 1.0, "finite and not negative"),
        ([[(float("nan"), 1.0)]], 1.0, "finite and not negative"),
        ([[(2.0, 1.0)], [(1.0, 1.0)]], 2.5, "a budget of 2.5 is below the cheapest choices, 3"),
    ],
)
def test_refusals(items: Any, budget: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        allocate(items, budget)
