"""From candidates and a target to the choice that meets it: probing, sharing, trying, and trying closer."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Literal

from vsparse.measure.fidelity.spread import spread_of
from vsparse.measure.tune.choice import Choice, UnreachableError, exact_steps, shared
from vsparse.measure.tune.ledger import Ledger
from vsparse.measure.tune.probing import Inputs, Table, inputs_of, probed, sensitivity
from vsparse.measure.tune.trials import Scene, Trials
from vsparse.methods import Method

__all__ = ["DENSE_STEPS", "PROBE_AT", "Found", "Search", "Target"]

DENSE_STEPS = (0.0, 0.1, 0.2, 0.3)
"""Shares of dense steps that are tried."""
FINALISTS = 3
TRIES = 6
FIRST_DENSITY = 0.35  # at which methods are compared when the target is no density
PROBE_AT = 0.25  # density at which heads are about as far off as they are where they are weighed
PROBED = 2  # clips
BY_HEAD = 64  # heads of all layers up to which each has a weight of its own
SHARE = 0.25  # of the calls of a generation that are probed
MOST_INPUTS = 4


@dc.dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked for; one of three.

    Args:
        density: Executed share of the token pairs over the whole generation, dense steps and layers included, at most.
        error: Relative error of the last latents, ``|x - y| / |y|`` against dense, mean over clips, at most.
        seconds: Of one generation, at most.

    Raises:
        ValueError: none or several, or a number out of range.
    """

    density: float | None = None
    error: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in dc.asdict(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"tune: give one target of density, error and seconds, got {given or 'none'}")
        for name, value in given.items():
            most = 1.0 if name == "density" else math.inf
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < most:
                accepted = "between 0 and 1" if name == "density" else "above 0"
                raise ValueError(f"tune: {name} must be a number {accepted}, got {value!r}")

    @property
    def kind(self) -> Literal["density", "error", "seconds"]:
        """Which of them."""
        return "density" if self.density is not None else "error" if self.error is not None else "seconds"

    @property
    def value(self) -> float:
        """Its number."""
        value: float = getattr(self, self.kind)
        return value

    def __str__(self) -> str:
        return {
            "density": f"executed density of at most {self.value:g}",
            "error": f"relative error of the latents of at most {self.value:g}",
            "seconds": f"at most {self.value:g} s for a generation",
        }[self.kind]


@dc.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search ends with.

    Args:
        choice: The best that was found. met: whether it meets the target on the calibration clips.
        value: What the target's quantity came to there. advice: if not met, what would have to give.
        tried: Rows of everything that was compared: name, dense steps, asked and executed density, errors.
        tables, weights: Of all candidates; of layers and heads.
    """

    choice: Choice
    met: bool
    value: float
    advice: str
    tried: Sequence[Mapping[str, Any]]
    tables: Mapping[str, Table]
    weights: Sequence[Sequence[float]]


class Search:
    """Looks for the method, the dense steps and the densities by layer and head that meet a target with least error.

    1. While calibration clips are made densely, every candidate is tried at several densities on a part of what the
       attention layers are given (`probed`), and the models' own inputs are kept for a few calls.
    2. One head at a time (one layer, in large models) is made sparse in these calls, and the change of the model's
       answer measured (`sensitivity`): with the head's output error it gives the weight of that error.
    3. For a budget, densities are shared out (`shared`), with every candidate and number of dense steps; those that
       execute too much are left out. Each is tried on one clip, the best few on all calibration clips.
    4. The winner's budget moves until the target is met as closely as a few tries allow.

    Args:
        trials: With the pipeline, the size and the ledger. candidates: name -> method with a ``density`` per head.
        clips: To calibrate with. target: what is asked for. told: hears what is done.
    """

    def __init__(
        self,
        trials: Trials,
        candidates: Mapping[str, Method],
        clips: Sequence[Scene],
        target: Target,
        *,
        dense_steps: Sequence[float] = DENSE_STEPS,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not candidates or not clips or not dense_steps:
            raise ValueError("tune: there must be candidates, calibration clips and dense steps to try")
        self.trials, self.candidates, self.clips, self.target = trials, dict(candidates), list(clips), target
        self.dense_steps, self._told = tuple(dense_steps), told
        self.ledger: Ledger = trials.ledger
        self._inputs: list[Inputs] = []
        self.tables: dict[str, Table] = {}
        self.weights: list[list[float]] = []
        self._tried: dict[str, dict[str, Any]] = {}

    @property
    def steps(self) -> int:
        """Denoising steps of a generation."""
        return int(self.trials.size["steps"])

    def run(self) -> Found:
        """Search.

        Raises:
            UnreachableError: a density below what any candidate executes; the message says which is the least.
        """
        self._probe()
        density = self.target.density if self.target.density is not None else FIRST_DENSITY
        best = self._best_of(density)
        towards = {"density": self._to_density, "error": self._to_error, "seconds": self._to_seconds}
        choice, met, value, advice = towards[self.target.kind](best)
        return Found(
            choice=choice,
            met=met,
            value=value,
            advice=advice,
            tried=list(self._tried.values()),
            tables=self.tables,
            weights=self.weights,
        )

    # ---- 1 and 2 -------------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        stored = self.ledger.get("tables", self._record)
        self.tables = {
            name: Table(**{**table, "densities": tuple(table["densities"])}) for name, table in stored.items()
        }
        self.weights = self._weights()
        self._inputs = []

    def _weights(self) -> list[list[float]]:
        """For each layer and head: squared error of the model's answer for a squared error of its output."""
        name = next(iter(self.candidates))
        table = self.tables[name]
        alone = sum(len(heads) for heads in table.error) <= BY_HEAD
        cells: list[tuple[int, int | None]] = []
        for layer, heads in enumerate(table.error):
            cells += [(layer, head) for head in range(len(heads))] if alone else [(layer, None)]
        errors = {cell: _errors(table, *cell) for cell in cells}
        # Errors of one size: large ones saturate, and of tiny ones the answer shows nothing but rounding.
        level = median(found[table.nearest(PROBE_AT)] for found in errors.values())
        found: list[list[float]] = [[0.0] * len(heads) for heads in table.error]
        for layer, head in cells:
            mine = errors[layer, head]
            off = [j for j, error in enumerate(mine) if error > 0.0]
            weight = 0.0  # of a head that is never off
            if off:
                at = min(off, key=lambda j: abs(math.log(mine[j] / level)) if level > 0.0 else -mine[j])
                weight = self._moved(name, table.densities[at], layer, head) / mine[at]
            for each in range(len(found[layer])) if head is None else [head]:
                found[layer][each] = weight
        return found

    def _record(self) -> dict[str, Any]:
        self._told("probing the attention layers")

        def run() -> None:
            for scene in self.clips[:PROBED]:
                self.trials.make(scene)  # by the probing kernel, so not kept as the dense clip

        found = probed(self.trials.pipe, self.candidates, run, share=SHARE)
        return {name: dc.asdict(table) for name, table in found.items()}

    def _moved(self, name: str, density: float, layer: int, head: int | None) -> float:
        """Squared relative error of the answer when one layer, or one head of it, is sparse."""
        part = f"layer {layer}" if head is None else f"layer {layer}, head {head}"
        self._told(f"what an error in {part} does")
        found: float = self.ledger.get(
            f"moved {name} {density!r} {layer} {head}",
            lambda: sensitivity(self._some_inputs(), self.candidates[name], density, layer, head),
        )
        return found

    def _some_inputs(self) -> list[Inputs]:
        """A few calls of the models, spread over a generation; made once."""
        if not self._inputs:
            with inputs_of(self.trials.pipe, share=SHARE) as found:
                self.trials.again(self.clips[0])
            every = max(1, len(found) // MOST_INPUTS)
            self._inputs = found[::every][:MOST_INPUTS]
        return self._inputs

    # ---- 3 -------------------------------------------------------------------------------------------------------

    def _best_of(self, density: float) -> Choice:
        """Of all candidates and dense steps the one of least error on the calibration clips."""
        choices, reasons = [], []
        for name in self.candidates:
            for dense_steps in self.dense_steps:
                try:
                    choices.append(self._shared(name, dense_steps, density))
                except UnreachableError as reason:
                    reasons.append(str(reason))
        if not choices:
            raise UnreachableError(f"tune: {self.target} cannot be reached: {'; '.join(dict.fromkeys(reasons))}")
        first = sorted(choices, key=lambda choice: self._error(choice, self.clips[:1]))
        return min(first[:FINALISTS], key=lambda choice: self._error(choice, self.clips))

    def _shared(self, name: str, dense_steps: float, density: float) -> Choice:
        return shared(
            name,
            self.candidates[name],
            self.tables[name],
            self.weights,
            density=density,
            dense_steps=dense_steps,
            steps=self.steps,
        )

    def _error(self, choice: Choice, clips: Sequence[Scene]) -> float:
        error, executed = self.trials.mean(choice, clips)
        row = {
            "name": choice.name,
            "dense_steps": exact_steps(choice.method, choice.dense_steps, self.steps),
            "dense_layers": len(choice.dense_layers),
            "predicted": choice.predicted,
            "density": executed,
            "error": error,
            "clips": len(clips),
        }
        self._tried[str(choice.as_json())] = row
        return error

    # ---- 4 -------------------------------------------------------------------------------------------------------

    def _to_density(self, best: Choice) -> tuple[Choice, bool, float, str]:
        """The budget is lowered until what is executed does not exceed the target."""
        target, asked = self.target.value, self.target.value
        for _ in range(TRIES):
            self._error(best, self.clips)
            executed = self.trials.mean(best, self.clips)[1]
            if executed <= target:
                return best, True, executed, ""
            asked -= 1.1 * (executed - target)
            try:
                best = self._shared(best.name, best.dense_steps, asked)
            except UnreachableError as reason:
                return best, False, executed, str(reason)
        return best, False, executed, "the maps keep more than what is asked of them; ask for less"

    def _to_error(self, best: Choice) -> tuple[Choice, bool, float, str]:
        """The least density whose error, the upper end of its interval, is within the target, by halving."""
        target = self.target.value
        low, high, kept = 0.0, 1.0, None
        asked = FIRST_DENSITY
        for _ in range(TRIES):
            choice = self._near(best, asked)
            self._error(choice, self.clips)
            error = self._upper(choice)
            if error <= target:
                kept, high = (choice, error), asked
            else:
                low = asked
            asked = (low + high) / 2
        if kept is not None:
            return kept[0], True, kept[1], ""
        floor = sum(self.trials.floor(scene).error for scene in self.clips) / len(self.clips)
        advice = (
            f"at the greatest density that was tried the error is {error:.3g}, and another kernel, all pairs computed, "
            f"is off by {floor:.3g}; allow more error, or more dense steps"
        )
        return choice, False, error, advice

    def _upper(self, choice: Choice) -> float:
        """Upper end of the interval of the mean error: clips that were not seen must keep the target, too."""
        found = spread_of([self.trials.outcome(choice, scene).error for scene in self.clips])
        return found.mean if found.interval is None else found.interval[1]

    def _to_seconds(self, best: Choice) -> tuple[Choice, bool, float, str]:
        """The greatest density whose generation takes no longer, by halving."""
        target = self.target.value
        low, high, kept, asked = 0.0, 1.0, None, FIRST_DENSITY
        fastest = math.inf
        for _ in range(TRIES):
            choice = self._near(best, asked)
            dense, seconds = self.trials.seconds(choice, self.clips[0])
            fastest = min(fastest, seconds)
            if seconds <= target:
                kept, low = (choice, seconds), asked
                self._error(choice, self.clips)
            else:
                high = asked
            asked = (low + high) / 2
        if kept is not None:
            return kept[0], True, kept[1], ""
        advice = (
            f"the fastest that was tried took {fastest:.3g} s, dense {dense:.3g} s; what is not attention takes "
            "the rest (see `vsparse latency`): fewer steps, a smaller video or a faster kernel would have to give"
        )
        return choice, False, seconds, advice

    def _near(self, best: Choice, density: float) -> Choice:
        """The winner at another density, or at the least or greatest that it can have."""
        try:
            return self._shared(best.name, best.dense_steps, density)
        except UnreachableError:
            least = min(min(min(head) for head in heads) for heads in self.tables[best.name].executed)
            exact = exact_steps(best.method, best.dense_steps, self.steps)
            lowest = (exact + (self.steps - exact) * least) / self.steps
            return self._shared(best.name, best.dense_steps, max(density, lowest) + 1e-6)


def _errors(table: Table, layer: int, head: int | None) -> list[float]:
    """Squared output errors over the densities, of a head or of all heads of a layer."""
    heads = table.error[layer] if head is None else [table.error[layer][head]]
    return [sum(column) for column in zip(*heads, strict=True)]
