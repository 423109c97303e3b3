"""One way to be sparse: a method, its dense steps, and a density for each layer and head."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Sequence
from typing import Any

from vsparse.cost import phases
from vsparse.measure.tune.allocation import allocate
from vsparse.measure.tune.probing import Table
from vsparse.methods import Method, Site
from vsparse.methods.by_layer import ByLayer
from vsparse.schedule import Schedule

__all__ = ["Choice", "UnreachableError", "exact_steps", "schedule_of", "shared", "uniform"]


class UnreachableError(ValueError):
    """No choice fits the budget."""


@dc.dataclass(frozen=True, kw_only=True)
class Choice:
    """A method with densities.

    Args:
        name: Of the candidate. method: with one density. dense_steps: share of the denoising steps.
        densities: ``[layers][heads]``; 1: full.
        predicted: Error by the model of `shared`; None for what it did not choose.
    """

    name: str
    method: Method
    dense_steps: float
    densities: tuple[tuple[float, ...], ...]
    predicted: float | None = None

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers all of whose heads are full."""
        return tuple(i for i, heads in enumerate(self.densities) if all(x == 1.0 for x in heads))

    def applied(self) -> tuple[Method, Schedule]:
        """What `vsparse.apply` takes."""
        parts = [self.method.replace(density=heads[0] if len(set(heads)) == 1 else heads) for heads in self.densities]
        schedule = dc.replace(schedule_of(self.method, self.dense_steps), dense_layers=self.dense_layers)
        sparse = [part for i, part in enumerate(parts) if i not in self.dense_layers]
        if all(part == sparse[0] for part in sparse[1:]):
            return (sparse or parts)[0], schedule
        return ByLayer.joined(parts), schedule

    def as_json(self) -> dict[str, Any]:
        """What tells it from others, for a ledger."""
        return {"method": str(self.method), "dense_steps": self.dense_steps, "densities": self.densities}


def schedule_of(method: Method, dense_steps: float) -> Schedule:
    """Dense from the start; a method that keeps its map searches at the end of that, and half-way through the rest."""
    if not method.state_phases:
        return Schedule(dense_steps=dense_steps)
    return Schedule(dense_steps=dense_steps, search_at=(dense_steps, (1.0 + dense_steps) / 2))


def exact_steps(method: Method, dense_steps: float, steps: int) -> int:
    """Denoising steps in which every pair is computed."""
    ran = phases(method, schedule_of(method, dense_steps), Site.alone(heads=1, head_dim=1), steps=steps)
    return sum(phase in method.exact_phases for phase in ran)


def shared(
    name: str,
    method: Method,
    table: Table,
    weights: Sequence[Sequence[float]],
    *,
    density: float,
    dense_steps: float,
    steps: int,
) -> Choice:
    """The densities of least error for an executed density of the whole generation.

    The error of a choice is ``sqrt(sum of weight x squared output error)``: as if what each head gets wrong reached the
    model's answer on its own, as much as it did where that head alone was sparse.

    Args:
        table: Of the method. weights: ``[layers][heads]``, squared error of the answer for a squared error of that
            head's output. density: executed share of the pairs over all steps, dense ones included.

    Raises:
        UnreachableError: the budget is used up by dense steps, or below the least densities of the table.
    """
    exact = exact_steps(method, dense_steps, steps)
    cells = [(layer, head) for layer, heads in enumerate(table.error) for head in range(len(heads))]
    if exact == steps:
        raise UnreachableError(f"all of {steps} steps are dense")
    budget = (density * steps - exact) / (steps - exact) * len(cells)
    items = [
        [(x, weights[i][j] * y) for x, y in zip(table.executed[i][j], table.error[i][j], strict=True)] for i, j in cells
    ]
    least = sum(min(choices)[0] for choices in items)
    if least > budget + 1e-9:
        lowest = (exact + (steps - exact) * least / len(cells)) / steps
        raise UnreachableError(
            f"with {exact} of {steps} steps dense {name} executes at least {lowest:.3f} of the pairs"
        )
    found = allocate(items, budget)
    chosen = iter(found.chosen)
    densities = tuple(tuple(table.densities[next(chosen)] for _ in heads) for heads in table.error)
    return Choice(
        name=name,
        method=method,
        dense_steps=dense_steps,
        densities=densities,
        predicted=math.sqrt(found.error),
    )


def uniform(choice: Choice, density: float) -> Choice:
    """The same method and dense steps, one density for everything."""
    return dc.replace(choice, densities=tuple((density,) * len(x) for x in choice.densities), predicted=None)
