"""Every figure of a latency report, derived from the runs."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vsparse.measure.latency.executed import Executed
from vsparse.measure.latency.intervals import Interval, interval, verdict
from vsparse.measure.latency.model import generation
from vsparse.measure.latency.rates import Rates
from vsparse.measure.latency.rounds import Kind, Run
from vsparse.measure.latency.timeline import CHOOSE, KERNEL, PARTS, REST, SEARCH, SELF_ATTENTION, Span
from vsparse.measure.latency.work import Work

__all__ = ["COST_GOAL", "GAP_GOAL", "Latency", "PhaseRow", "Prediction"]

GAP_GOAL, COST_GOAL = 0.05, 0.03
"""How much of the whole may belong to no part, and how much longer a profiled generation may take."""


@dc.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a part of a generation, predicted and measured."""

    part: str
    seconds: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.seconds / self.measured - 1.0


_KINDS: tuple[Kind, Kind] = ("dense", "sparse")


@dc.dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """Calls of layers in one phase: how many in a generation, and seconds of one call's self-attention by part."""

    phase: str
    calls: int
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of the self-attention of one call."""
        return sum(self.parts.values())


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Latency:
    """A measurement: what was measured, and its runs.

    Args:
        pipeline: Its class. method, schedule: in words. asked: size of the video. device: its name.
        runs: Of all rounds, in order. executed: by a sparse generation. environment: versions and machine.
        work: By kind and part. rates: of the machine; None: nothing is predicted.
    """

    pipeline: str
    method: str
    schedule: str
    asked: Mapping[str, Any]
    device: str
    runs: Sequence[Run]
    executed: Executed
    environment: Mapping[str, Any]
    work: Mapping[str, Mapping[str, Work]] = dc.field(default_factory=dict)
    rates: Rates | None = None

    def of(self, kind: Kind, *, profiled: bool) -> list[Run]:
        """The runs of one kind, one for each round."""
        return [run for run in self.runs if run.kind == kind and (run.spans is not None) == profiled]

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len(self.of("dense", profiled=False))

    # ---- whole generations -----------------------------------------------------------------------------------------

    def seconds(self, kind: Kind) -> Interval:
        """Of a generation without profiling."""
        return interval([run.seconds for run in self.of(kind, profiled=False)])

    def spread(self, kind: Kind) -> float:
        """Slowest less fastest generation without profiling, as a share of the median."""
        taken = [run.seconds for run in self.of(kind, profiled=False)]
        return (max(taken) - min(taken)) / self.seconds(kind).median

    def peak(self, kind: Kind) -> int | None:
        """Most bytes of GPU memory in a generation without profiling; None on a CPU."""
        return max((run.peak for run in self.of(kind, profiled=False) if run.peak is not None), default=None)

    @property
    def speed(self) -> Interval:
        """Dense over sparse, round by round."""
        return interval(self._ratios(self.of("dense", profiled=False), self.of("sparse", profiled=False)))

    @property
    def floor(self) -> Interval | None:
        """A dense generation over that of the round before: what the same work differs by; None for one round."""
        dense = self.of("dense", profiled=False)
        return interval(self._ratios(dense[1:], dense[:-1])) if len(dense) > 1 else None

    @property
    def verdict(self) -> str:
        """Whether there is a speed-up, in words."""
        return verdict(self.speed)

    @staticmethod
    def _ratios(above: Sequence[Run], below: Sequence[Run]) -> list[float]:
        return [a.seconds / b.seconds for a, b in zip(above, below, strict=True)]

    # ---- how good the profile is -----------------------------------------------------------------------------------

    def gap(self, kind: Kind) -> Interval:
        """Share of a profiled generation, by the clock around it, that no named part claims."""
        return interval([1.0 - _named(run) / run.seconds for run in self.of(kind, profiled=True)])

    def cost(self, kind: Kind) -> Interval:
        """How much longer a profiled generation took than the plain one of its round, as a share."""
        ratios = self._ratios(self.of(kind, profiled=True), self.of(kind, profiled=False))
        return interval([ratio - 1.0 for ratio in ratios])

    # ---- parts -----------------------------------------------------------------------------------------------------

    def typical(self, kind: Kind) -> Run:
        """The profiled run of median length, the shorter of two: its parts add up."""
        runs = sorted(self.of(kind, profiled=True), key=lambda run: run.seconds)
        return runs[(len(runs) - 1) // 2]

    def parts(self, kind: Kind) -> dict[str, float]:
        """Seconds by part in the typical run; `REST` fills them up to the clock around it."""
        return _parts(self.typical(kind))

    def part(self, kind: Kind, part: str) -> Interval:
        """Seconds of a part over all profiled runs."""
        return interval([_parts(run)[part] for run in self.of(kind, profiled=True)])

    def layers(self, kind: Kind) -> dict[int, dict[str, float]]:
        """Seconds by layer and part in the typical run."""
        found: dict[int, dict[str, float]] = {}
        for span, seconds in _spans(self.typical(kind)):
            if span.layer is not None:
                mine = found.setdefault(span.layer, {})
                mine[span.part] = mine.get(span.part, 0.0) + seconds
        return dict(sorted(found.items()))

    def steps(self, kind: Kind) -> list[float]:
        """Seconds inside the layers by denoising step in the typical run."""
        found: dict[int, float] = {}
        for span, seconds in _spans(self.typical(kind)):
            if span.layer is not None:
                found[span.step] = found.get(span.step, 0.0) + seconds
        return [found.get(step, 0.0) for step in range(max(found, default=-1) + 1)]

    def phases(self, kind: Kind) -> list[PhaseRow]:
        """One call of a layer by phase, in the typical run; the calls are those of `Executed`."""
        found: dict[str, dict[str, float]] = {}
        for span, seconds in _spans(self.typical(kind)):
            if span.part in SELF_ATTENTION and span.layer is not None:
                mine = found.setdefault(span.phase, {})
                mine[span.part] = mine.get(span.part, 0.0) + seconds
        calls = self.executed.stats["calls"]
        everything = {"dense": sum(calls.values())} if kind == "dense" else calls
        return [
            PhaseRow(phase=phase, calls=everything[phase], parts={x: s / everything[phase] for x, s in parts.items()})
            for phase, parts in found.items()
            if everything.get(phase)
        ]

    # ---- bounds ----------------------------------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Executed share of token pairs over all calls, dense ones included."""
        return float(self.executed.stats["density"])

    @property
    def attention_share(self) -> float:
        """Share of the attention kernel in a dense generation."""
        return self.parts("dense")[KERNEL] / self.typical("dense").seconds

    @property
    def amdahl(self) -> float:
        """Speed-up if the kernel's time fell with the executed density and nothing was added."""
        return 1.0 / (1.0 - self.attention_share * (1.0 - self.density))

    @property
    def limit(self) -> float:
        """Speed-up if the kernel took no time."""
        share = self.attention_share
        return 1.0 / (1.0 - share) if share < 1.0 else math.inf

    # ---- predictions -----------------------------------------------------------------------------------------------

    def predictions(self, kind: Kind) -> list[Prediction]:
        """Of each part that the cost model knows, and of their sum; none without rates."""
        if self.rates is None or not self.work:
            return []
        seconds = generation(self.work["dense"], self.work["sparse"], self.executed, self.rates)[kind]
        measured = self.parts(kind)
        rows = [
            Prediction(part=x, seconds=seconds[x], measured=measured[x]) for x in PARTS if measured[x] and x in seconds
        ]
        total = Prediction(
            part="sum", seconds=sum(row.seconds for row in rows), measured=sum(row.measured for row in rows)
        )
        return [*rows, total]

    def flops(self, kind: Kind) -> dict[str, float]:
        """FLOPs by part, those of sparse attention included."""
        found = {part: work.flops for part, work in self.work.get(kind, {}).items()}
        if kind == "sparse":
            for part in (KERNEL, SEARCH):
                found[part] = found.get(part, 0.0) + self.executed.flops.get(part, 0.0)
            found[CHOOSE] = self.executed.flops.get(CHOOSE, 0.0)
        return found

    # ---- everything ------------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """All figures, and what they were taken with."""

        def both(figure: Callable[[Kind], Any]) -> dict[str, Any]:
            return {kind: figure(kind) for kind in _KINDS}

        stats, executed = self.executed.stats, self.executed
        return {
            "pipeline": self.pipeline,
            "method": self.method,
            "schedule": self.schedule,
            "asked": dict(self.asked),
            "device": self.device,
            "environment": dict(self.environment),
            "rounds": self.rounds,
            "seconds": both(lambda kind: dc.asdict(self.seconds(kind))),
            "spread": both(self.spread),
            "floor": None if self.floor is None else dc.asdict(self.floor),
            "speed": dc.asdict(self.speed),
            "verdict": self.verdict,
            "unclaimed": {"goal": GAP_GOAL, **both(lambda kind: dc.asdict(self.gap(kind)))},
            "profiling": {"goal": COST_GOAL, **both(lambda kind: dc.asdict(self.cost(kind)))},
            "parts": both(lambda kind: {part: dc.asdict(self.part(kind, part)) for part in PARTS}),
            "typical": both(self.parts),
            "layers": both(self.layers),
            "steps": both(self.steps),
            "phases": both(lambda kind: [{**dc.asdict(row), "seconds": row.seconds} for row in self.phases(kind)]),
            "peak_bytes": both(self.peak),
            "density": self.density,
            "sparse_density": stats["sparse_density"],
            "dense_steps": executed.dense_steps,
            "dense_layers": executed.dense_layers,
            "heads": executed.density,
            "phase_of": executed.phases,
            "calls": stats["calls"],
            "fallbacks": stats["fallbacks"],
            "kernel": stats["kernel"],
            "amdahl": {"at_density": self.amdahl, "limit": _finite(self.limit), "attention": self.attention_share},
            "work": {kind: {x: dc.asdict(y) for x, y in parts.items()} for kind, parts in self.work.items()},
            "flops": both(self.flops),
            "rates": None if self.rates is None else dc.asdict(self.rates),
            "predicted": both(lambda kind: [{**dc.asdict(x), "error": x.error} for x in self.predictions(kind)]),
            "runs": [
                {"kind": run.kind, "profiled": run.spans is not None, "seconds": run.seconds} for run in self.runs
            ],
        }


def _spans(run: Run) -> list[tuple[Span, float]]:
    assert run.spans is not None
    return list(run.spans.items())


def _named(run: Run) -> float:
    """Seconds that a part claims."""
    return sum(seconds for span, seconds in _spans(run) if span.part != REST)


def _parts(run: Run) -> dict[str, float]:
    found = dict.fromkeys(PARTS, 0.0)
    for span, seconds in _spans(run):
        found[span.part] += seconds
    found[REST] = run.seconds - _named(run)
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
