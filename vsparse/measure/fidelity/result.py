"""Every figure of a comparison, derived from what was measured clip by clip."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vsparse.measure.adherence import Adherence, summary
from vsparse.measure.fidelity.distance import FIGURES, Distance, Figure
from vsparse.measure.fidelity.spread import Spread, spread_of
from vsparse.measure.fidelity.vbench import Wanted

__all__ = ["ALL", "SEEN", "Fidelity", "Kind", "Outcome", "Ran", "Run"]

Kind = Literal["dense", "floor", "sparse"]
SEEN = "seen"
"""The figure that is judged without the dense clip: how many of five properties a program finds."""
ALL: Mapping[str, Figure] = {**FIGURES, SEEN: Figure(label="seen, of 5", form=".2f", least=0, most=5)}
"""All figures, in the order of the tables."""


@dc.dataclass(frozen=True, kw_only=True)
class Ran:
    """What one generation executed.

    Args:
        density: Share of the token pairs over all calls, forced blocks and dense calls included.
        steps, dense_steps, layers, dense_layers: How many there were, and how many of them computed every pair; 0
            steps where no step was told apart.
        heads: Density, `[steps][layers][heads]`. tokens: of one call; 0 where no call was sparse.
    """

    density: float
    steps: int
    dense_steps: int
    layers: int
    dense_layers: int
    heads: Sequence[Sequence[Sequence[float]]]
    tokens: int


@dc.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run on one clip: its distance from dense, what a program sees in it, what it executed; None where there is
    no such thing.
    """

    distance: Distance | None = None
    seen: Adherence | None = None
    ran: Ran | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "distance": None if self.distance is None else self.distance.as_json(),
            "seen": None if self.seen is None else dc.asdict(self.seen),
            "ran": None if self.ran is None else dc.asdict(self.ran),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Outcome:
        """What `as_json` told."""
        seen = told["seen"]
        return cls(
            distance=None if told["distance"] is None else Distance.from_json(told["distance"]),
            seen=None if seen is None else Adherence(**{**seen, "seen": tuple(seen["seen"])}),
            ran=None if told["ran"] is None else Ran(**told["ran"]),
        )


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One way to make the clips.

    Args:
        name: Also of its folder. kind: "dense": what the others are compared with. "floor": exact as well, by another
            kernel. "sparse": a method.
        words: Method and schedule. outcomes: by name of the clip.
        recall: Share of the exact softmax on the kept keys; None where it was not measured.
        without: What is missing -> why, in words; "run": it could not run at all. videos: files by name of the clip.
    """

    name: str
    kind: Kind
    words: str
    outcomes: Mapping[str, Outcome]
    recall: float | None = None
    without: Mapping[str, str] = dc.field(default_factory=dict)
    videos: Mapping[str, Path] = dc.field(default_factory=dict)


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Fidelity:
    """A comparison.

    Args:
        source: The pipeline, or the folders. asked: size of the video. clips: in order. runs: the dense one first.
        lost: File -> why it is in no figure. notes: sentences that belong to every reading of the figures.
        environment: versions and machine.
    """

    source: str
    asked: Mapping[str, Any]
    clips: Sequence[Wanted]
    runs: Sequence[Run]
    lost: Mapping[str, str] = dc.field(default_factory=dict)
    notes: Sequence[str] = ()
    environment: Mapping[str, Any] = dc.field(default_factory=dict)

    def __post_init__(self) -> None:
        assert [run.kind for run in self.runs].count("dense") == 1
        assert self.runs[0].kind == "dense"

    @property
    def others(self) -> list[Run]:
        """The runs that are compared, floors first."""
        return sorted(self.runs[1:], key=lambda run: run.kind != "floor")

    @property
    def floor(self) -> Run | None:
        """The floor, where it has run."""
        return next((run for run in self.others if run.kind == "floor" and run.outcomes), None)

    def outcomes(self, run: Run) -> list[Outcome]:
        """Of a run, in the order of the clips."""
        return [run.outcomes[clip.name] for clip in self.clips if clip.name in run.outcomes]

    def values(self, run: Run, figure: str) -> dict[str, float]:
        """Clip -> a figure of `FIGURES`, or `SEEN`; without the clips that have none."""
        found = {}
        for clip in self.clips:
            one = run.outcomes.get(clip.name)
            of = None if one is None else one.seen if figure == SEEN else one.distance
            value = None if of is None else getattr(of, "right" if figure == SEEN else figure)
            if value is not None:
                found[clip.name] = float(value)
        return found

    def spread(self, run: Run, figure: str) -> Spread | None:
        """Over the clips; None where no clip has the figure. The interval ends where the figure can go no further."""
        values = list(self.values(run, figure).values())
        if not values:
            return None
        found, known = spread_of(values), ALL[figure]
        if found.interval is None:
            return found
        low, high = found.interval
        return dc.replace(found, interval=(max(low, known.least), min(high, known.most)))

    def why(self, figure: str) -> list[str]:
        """Reasons why clips lack a figure, each once."""
        given = (one.distance.without for run in self.others for one in self.outcomes(run) if one.distance is not None)
        return list(dict.fromkeys(without[figure] for without in given if figure in without))

    def latents(self, run: Run) -> list[Spread]:
        """Relative error of the latents, step by step."""
        many = [one.distance.steps for one in self.outcomes(run) if one.distance is not None and one.distance.steps]
        return [spread_of(step) for step in zip(*many, strict=True)]

    def density(self, run: Run) -> float | None:
        """Executed, mean over the clips; None where it is not known."""
        found = [one.ran.density for one in self.outcomes(run) if one.ran is not None]
        return math.fsum(found) / len(found) if found else None

    def heads(self, run: Run) -> list[list[list[float]]]:
        """Executed density `[steps][layers][heads]`, mean over the clips."""
        many = [one.ran.heads for one in self.outcomes(run) if one.ran is not None]
        return [
            [[math.fsum(x) / len(x) for x in zip(*layer, strict=True)] for layer in zip(*step, strict=True)]
            for step in zip(*many, strict=True)
        ]

    def adherence(self, run: Run) -> dict[str, int]:
        """Property -> clips that show it, of ``clips``; empty where no program can judge the prompts."""
        seen = [one.seen for one in self.outcomes(run) if one.seen is not None]
        return summary(seen) if seen else {}

    def beyond_floor(self, run: Run) -> list[float]:
        """How many dB further than the floor each clip of a run lies from dense; no clip without a floor.

        The floor's PSNR less the run's: 0 where both are equal to dense, infinite where only the floor is, negatively
        so where only the run is.
        """
        if self.floor is None:
            return []
        ours, floor = (self.values(one, "psnr") for one in (run, self.floor))
        pairs = [(floor[name], ours[name]) for name in ours if name in floor]
        return [0.0 if math.isinf(a) and math.isinf(b) else a - b for a, b in pairs]

    def as_json(self) -> dict[str, Any]:
        """All figures, what they were taken with, and what each clip gave."""
        return {
            "source": self.source,
            "asked": dict(self.asked),
            "notes": list(self.notes),
            "lost": dict(self.lost),
            "runs": [self._run_json(run) for run in self.runs],
            "clips": [
                {
                    **dc.asdict(clip),
                    "runs": {
                        run.name: _brief(run.outcomes[clip.name]) for run in self.runs if clip.name in run.outcomes
                    },
                }
                for clip in self.clips
            ],
            "environment": dict(self.environment),
        }

    def _run_json(self, run: Run) -> dict[str, Any]:
        first = next((one.ran for one in self.outcomes(run) if one.ran is not None), None)
        beyond = self.beyond_floor(run) if run.kind == "sparse" else []
        return {
            "name": run.name,
            "kind": run.kind,
            "method": run.words,
            "density": self.density(run),
            "dense_steps": None if first is None else [first.dense_steps, first.steps],
            "dense_layers": None if first is None else [first.dense_layers, first.layers],
            "recall": run.recall,
            "without": dict(run.without),
            "adherence": self.adherence(run),
            "figures": {name: _spread_json(self.spread(run, name)) for name in ALL},
            "latents": [_spread_json(one) for one in self.latents(run)],
            "beyond_floor_db": [f"{x:+}" if math.isinf(x) else x for x in beyond],
            "heads": self.heads(run),
        }


def _spread_json(found: Spread | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {name: "inf" if value == math.inf else value for name, value in dc.asdict(found).items()}


def _brief(one: Outcome) -> dict[str, Any]:
    """An outcome without the density of each head, which stands with the run."""
    told = one.as_json()
    if told["ran"] is not None:
        del told["ran"]["heads"]
    return told
