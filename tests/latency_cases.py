"""A clock that ticks, and a latency measurement whose timings are known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from vsparse.measure.latency.executed import Executed
from vsparse.measure.latency.figures import Latency
from vsparse.measure.latency.rates import Rates
from vsparse.measure.latency.rounds import Run
from vsparse.measure.latency.timeline import CHOOSE, KERNEL, PROJECT, REST, SEARCH, VAE, Span
from vsparse.measure.latency.work import Work
from vsparse.parallel.rates import Rate


class Ticks:
    """A clock whose every mark comes one second after the last."""

    def __init__(self) -> None:
        self.time = 0.0

    def mark(self) -> float:
        self.time += 1.0
        return self.time

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return [b - a for a, b in itertools.pairwise(marks)]

    def now(self) -> float:
        return self.mark()


RATES = Rates(
    device="abacus",
    dtype="float32",
    date="2026-01-01T00:00:00",
    products=Rate(flops=100.0, origin="made"),
    dense=Rate(flops=50.0, origin="made"),
    sparse=Rate(flops=200.0, overhead=0.25, origin="made"),
    memory=10.0,
    call=0.5,
)
WORK = {
    "dense": {
        KERNEL: Work(attention=300.0, touched=30.0, calls=2.0),
        PROJECT: Work(products=40.0, moved=5.0, touched=20.0, calls=1.0),
        REST: Work(moved=99.0),
    },
    "sparse": {
        KERNEL: Work(attention=100.0, touched=20.0, calls=2.0),
        CHOOSE: Work(products=7.0, moved=1.0, touched=2.0, calls=1.0),
        PROJECT: Work(products=40.0, moved=5.0, touched=20.0, calls=1.0),
    },
}


def run(kind: Any, seconds: float, **parts: float) -> Run:
    """A profiled run where parts are given, by step 0 of layer 0; ``rest`` is what the timeline itself left over."""
    if not parts:
        return Run(kind=kind, seconds=seconds)
    phase = "dense" if kind == "dense" else "reuse"
    named = {"kernel": KERNEL, "choose": CHOOSE, "project": PROJECT, "vae": VAE, "rest": REST}
    inner = (KERNEL, CHOOSE, PROJECT)
    spans = {
        Span(named[x], 0 if named[x] in inner else None, phase if named[x] in inner else "", 0): s
        for x, s in parts.items()
    }
    return Run(kind=kind, seconds=seconds, spans=spans)


def known(rounds: int = 3) -> Latency:
    """Dense takes 10, 11 and 12 s, sparse half of it; profiling costs a tenth."""
    runs = []
    for i in range(rounds):
        dense = 10.0 + i
        runs += [run("dense", dense), run("sparse", dense / 2)]
        runs.append(run("dense", 1.1 * dense, kernel=6.0 + i, project=1.0, vae=2.0, rest=0.5))
        runs.append(run("sparse", 0.55 * dense, kernel=1.5, choose=0.5, project=1.0, vae=2.0, rest=0.25))
    executed = Executed(
        density=[[[1.0, 1.0], [1.0, 1.0]], [[0.25, 0.5], [1.0, 1.0]]],
        phases=[["dense", "dense"], ["reuse", "dense"]],
        stats={
            "density": 0.5,
            "sparse_density": 0.375,
            "calls": {"dense": 3, "reuse": 1},
            "fallbacks": {},
            "kernel": "cpu",
        },
        flops={KERNEL: 400.0, CHOOSE: 50.0, SEARCH: 0.0},
    )
    return Latency(
        pipeline="Pipe", method="Some()", schedule="Schedule()", asked={"steps": 2}, device="abacus",
        runs=runs, executed=executed, work=WORK, rates=RATES, environment={"python": "3", "packages": {"torch": "2"}},
    )  # fmt: skip
