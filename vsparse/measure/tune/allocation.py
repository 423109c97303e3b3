"""Sharing a budget: one choice for each item, so that the costs stay within a bound and the errors are least."""

from __future__ import annotations

import dataclasses as dc
import heapq
import itertools
import math
from collections.abc import Sequence

__all__ = ["EXHAUSTIVE", "Allocation", "allocate", "lower_hull"]

EXHAUSTIVE = 20_000
"""Up to so many combinations all are tried, and the result is the best there is."""

Choices = Sequence[tuple[float, float]]
"""Of one item: (cost, error) of each of its choices."""


@dc.dataclass(frozen=True, kw_only=True)
class Allocation:
    """One choice for each item.

    Args:
        chosen: Number of the choice, for each item. cost, error: sums over the items.
        bound: No allocation within the budget has a smaller error than this.
    """

    chosen: tuple[int, ...]
    cost: float
    error: float
    bound: float


def allocate(items: Sequence[Choices], budget: float) -> Allocation:
    """The choices of least total error whose total cost does not exceed a budget.

    With few combinations all are tried. Otherwise the Lagrangian of the problem is solved: every item climbs the lower
    convex hull of its choices, always the step that takes away most error for its cost, until the next one does not
    fit; what is left of the budget goes to single steps, on the hull or not, that still fit. What the first step that
    did not fit would have given is the gap to the bound (Everett 1963, generalised Lagrange multipliers).

    Args:
        items: Choices of each item; costs and errors are finite and not negative. budget: bound on the total cost.

    Raises:
        ValueError: no item, an item without a choice, numbers that are not finite or negative, or a budget below the
            cheapest choices.
    """
    _check(items)
    cheapest = sum(min(cost for cost, _ in choices) for choices in items)
    slack = 1e-9 * max(1.0, abs(budget))
    if cheapest > budget + slack:
        raise ValueError(f"allocate: a budget of {budget:.6g} is below the cheapest choices, {cheapest:.6g}")
    if math.prod(len(choices) for choices in items) <= EXHAUSTIVE:
        return _best_of_all(items, budget + slack)
    return _lagrangian(items, budget + slack)


def lower_hull(choices: Choices) -> list[int]:
    """Numbers of the choices on the lower convex hull of (cost, error), from the cheapest to the best."""
    found: list[int] = []
    for i in sorted(range(len(choices)), key=lambda i: choices[i]):
        cost, error = choices[i]
        if found and error >= choices[found[-1]][1]:
            continue
        while len(found) > 1 and _rate(choices, found[-2], found[-1]) <= _rate(choices, found[-2], i):
            found.pop()
        if len(found) == 1 and cost == choices[found[0]][0]:
            found.pop()
        found.append(i)
    return found


def _rate(choices: Choices, low: int, high: int) -> float:
    """Error that a step takes away, for its cost."""
    return (choices[low][1] - choices[high][1]) / (choices[high][0] - choices[low][0])


def _lagrangian(items: Sequence[Choices], budget: float) -> Allocation:
    hulls = [lower_hull(choices) for choices in items]
    place = [0] * len(items)
    left = budget - sum(items[i][hull[0]][0] for i, hull in enumerate(hulls))
    steps = [(-_rate(items[i], hull[0], hull[1]), i) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    missed = 0.0
    while steps:
        rate, i = heapq.heappop(steps)
        hull, at = hulls[i], place[i]
        cost = items[i][hull[at + 1]][0] - items[i][hull[at]][0]
        if cost > left:
            missed = -rate * left
            break
        left -= cost
        place[i] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_rate(items[i], hull[at + 1], hull[at + 2]), i))
    chosen = [hull[at] for hull, at in zip(hulls, place, strict=True)]
    bound = sum(items[i][j][1] for i, j in enumerate(chosen)) - missed
    _fill(items, chosen, left)
    return _made(items, chosen, bound)


def _fill(items: Sequence[Choices], chosen: list[int], left: float) -> None:
    """Spend what is left on the single changes that help most."""
    while True:
        best, gain = None, 0.0
        for i, choices in enumerate(items):
            cost, error = choices[chosen[i]]
            for j, (other, less) in enumerate(choices):
                if other - cost <= left and error - less > gain:
                    best, gain = (i, j), error - less
        if best is None:
            return
        left -= items[best[0]][best[1]][0] - items[best[0]][chosen[best[0]]][0]
        chosen[best[0]] = best[1]


def _best_of_all(items: Sequence[Choices], budget: float) -> Allocation:
    best: tuple[float, float, tuple[int, ...]] | None = None
    for chosen in itertools.product(*(range(len(choices)) for choices in items)):
        cost = sum(choices[j][0] for choices, j in zip(items, chosen, strict=True))
        if cost > budget:
            continue
        error = sum(choices[j][1] for choices, j in zip(items, chosen, strict=True))
        if best is None or (error, cost, chosen) < best:
            best = (error, cost, chosen)
    assert best is not None
    return _made(items, best[2], best[0])


def _made(items: Sequence[Choices], chosen: Sequence[int], bound: float) -> Allocation:
    picked = [choices[j] for choices, j in zip(items, chosen, strict=True)]
    cost, error = (sum(pair[axis] for pair in picked) for axis in (0, 1))
    return Allocation(chosen=tuple(chosen), cost=cost, error=error, bound=bound)


def _check(items: Sequence[Choices]) -> None:
    if not items or not all(items):
        raise ValueError("allocate: there must be items, each with a choice")
    worst = min(min(pair) for choices in items for pair in choices)
    if not all(math.isfinite(x) for choices in items for pair in choices for x in pair) or worst < 0.0:
        raise ValueError("allocate: costs and errors must be finite and not negative")
