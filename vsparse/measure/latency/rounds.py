"""Dense and sparse generations in turn, with and without profiling, in one process."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from vsparse.measure.latency.executed import Executed, watching
from vsparse.measure.latency.model import steps_of
from vsparse.measure.latency.profiler import profiled
from vsparse.measure.latency.timeline import Clock, Span, Timeline, clock_of
from vsparse.measure.latency.work import Work, counting
from vsparse.measure.pipelines import generate
from vsparse.methods import Method
from vsparse.parallel.context import ContextParallel
from vsparse.patch import Patch, apply
from vsparse.profile import Profile
from vsparse.schedule import Schedule

__all__ = ["LEAST", "MOST", "Kind", "Run", "orders", "rounds_in", "take_turns"]

Kind = Literal["dense", "sparse"]
LEAST, MOST, SHARED = 3, 25, 6
WARM_STEPS = 1


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One generation.

    Args:
        kind: "dense": the pipeline as it came. "sparse": patched. seconds: by the clock around it.
        spans: Where they went, of a profiled run; else None. peak: bytes of GPU memory, None on a CPU.
    """

    kind: Kind
    seconds: float
    spans: Mapping[Span, float] | None = None
    peak: int | None = None


def orders(number: int) -> list[tuple[Kind, bool]]:
    """The four runs of a round, profiled or not: in four rounds each kind and each way comes first as often."""
    kinds: tuple[Kind, Kind] = ("dense", "sparse") if number % 2 == 0 else ("sparse", "dense")
    ways = (False, True) if number // 2 % 2 == 0 else (True, False)
    return [(kind, way) for kind in kinds for way in ways]


def rounds_in(seconds: float, one: float) -> int:
    """How many rounds fit, `LEAST` at least and `MOST` at most."""
    return max(LEAST, min(MOST, int(seconds / max(one, 1e-9))))


def take_turns(
    pipe: Any,
    method: Method | Profile,
    schedule: Schedule | None,
    asked: Mapping[str, Any],
    *,
    seconds: float,
    rounds: int | None = None,
    began: Callable[[str, int], None] = lambda *_: None,
    clock: Clock | None = None,
    parallel: ContextParallel | None = None,
) -> tuple[list[Run], Executed, dict[str, dict[str, Work]]]:
    """Measure dense against sparse.

    A round is a plain and a profiled generation, dense and sparse, in changing order. Before the sparse ones the
    method is applied and one step is run, so that layouts and static maps are there, as in a second video.

    Args:
        pipe: It is left as it came. method, schedule: as of `vsparse.apply`.
        asked: What `generate` is asked for. seconds: about how long the rounds may take. rounds: exactly so many.
        began: told what runs next, and how many rounds there will be (0: not known yet). clock: for tests.
        parallel: Processes that share each video, dense ones, too; all of them call this. They make ``rounds``, or
            `SHARED`, as their clocks differ. What is told is of this process.

    Returns:
        The runs in order, what a sparse generation executed, and the work of both kinds by part.

    Raises:
        ValueError, NotImplementedError: as of `vsparse.apply` and `profiled`.
    """
    device = torch.device(pipe.device)
    clock = clock or clock_of(device)

    def once(kind: Kind, way: bool, patch: Patch | None) -> Run:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if parallel is not None:
            dist.barrier()
        start = clock.now()
        spans = None
        if way:
            timeline = Timeline(clock)
            with profiled(pipe, timeline, patch):
                generate(pipe, **asked)
            spans = timeline.end()
        else:
            generate(pipe, **asked)
        taken = clock.now() - start
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Run(kind=kind, seconds=taken, spans=spans, peak=peak)

    def patched(kind: Kind) -> contextlib.AbstractContextManager[Patch | None]:
        if kind == "dense" and parallel is None:
            return contextlib.nullcontext()
        return (
            apply(pipe, method, schedule=schedule, parallel=parallel)
            if kind == "sparse"
            else apply(pipe, "dense", parallel=parallel)
        )

    warm = {**asked, "steps": WARM_STEPS, "stepped": None}
    began("warm-up", 0)
    with patched("dense") as current:
        generate(pipe, **warm)
        with counting(pipe, current) as dense:
            generate(pipe, **warm)
    began("densities", 0)
    steps = asked.get("steps") or 1
    with apply(pipe, method, schedule=schedule, parallel=parallel) as patch:
        with watching(pipe, patch, steps) as watcher, counting(pipe, patch) as sparse:
            generate(pipe, **asked)
        executed = watcher.executed()
    work = {"dense": steps_of(dense, len(executed.density)), "sparse": sparse}
    runs: list[Run] = []
    rounds = SHARED if rounds is None and parallel is not None else rounds
    number, count, started = 0, rounds or 0, time.perf_counter()
    while number < (count or 1):
        if rounds is None and number >= LEAST and time.perf_counter() - started > seconds:
            break  # the machine has become slower than it was in the first round
        begin = time.perf_counter()
        order = orders(number)
        for kind in dict.fromkeys(kind for kind, _ in order):
            with patched(kind) as current:
                if current is not None:
                    generate(pipe, **warm)
                for way in [way for one, way in order if one == kind]:
                    began(f"{kind}, profiled" if way else kind, count)
                    runs.append(once(kind, way, current))
        number += 1
        count = count or rounds_in(seconds, time.perf_counter() - begin)
    return runs, executed, work
