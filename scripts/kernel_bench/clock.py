"""Medians of interleaved calls, by device events."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from .inputs import synchronize

WARMUP = 2
LEAST, MOST = 7, 100
DRY = 2  # on a CPU, where times have no meaning
AHEAD = 2_000_000  # clocks for which the device idles before a call, so that the host is ahead of it


class Candidate(NamedTuple):
    """Something to time. ``call`` takes a number that no two calls in a row share, and picks its inputs by it."""

    name: str
    call: Callable[[int], object]


class Timing(NamedTuple):
    """Milliseconds of a call, or why there are none.

    Args:
        ms: Median. best: fastest. spread: between the 10th and the 90th percentile, as a share of the median.
        words: Why it could not be timed; empty when it was.
    """

    ms: float = float("nan")
    best: float = float("nan")
    spread: float = float("nan")
    rounds: int = 0
    words: str = ""

    def json(self) -> dict[str, Any]:
        return {"ms": self.ms, "best_ms": self.best, "spread": self.spread, "rounds": self.rounds}


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """A call's value and "", or None and what went wrong, in one line."""
    try:
        return call(), ""
    except Exception as error:  # noqa: BLE001 - whatever a kernel or a library raises is a finding of this run
        words = " ".join(str(error).split()) or "no message"
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return None, f"{type(error).__name__}: {words[:300]}"


def interleaved(candidates: list[Candidate], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time all candidates in turns for about ``seconds``.

    Every round calls each candidate once, starting with another one each time. A candidate that raises is left out
    with its words.
    """
    found: dict[str, Timing] = {}
    runs: list[Candidate] = []
    for candidate in candidates:
        words = ""
        for number in range(WARMUP):
            _, words = attempt(lambda c=candidate, n=number: (c.call(n), synchronize(device)))
            if words:
                break
        if words:
            found[candidate.name] = Timing(words=words)
        else:
            runs.append(candidate)
    if not runs:
        return found
    begin = time.perf_counter()
    _turn(runs, 0, device)
    synchronize(device)
    once = time.perf_counter() - begin
    rounds = max(LEAST if device.type == "cuda" else DRY, min(MOST, int(seconds / max(once, 1e-6))))
    samples: dict[str, list[Any]] = {run.name: [] for run in runs}
    for number in range(rounds):
        for name, sample in _turn(runs, number, device):
            samples[name].append(sample)
    synchronize(device)
    for name, taken in samples.items():
        times = sorted(x if isinstance(x, float) else float(x[0].elapsed_time(x[1])) for x in taken)
        low, high = times[len(times) // 10], times[-1 - len(times) // 10]
        middle = median(times)
        found[name] = Timing(middle, times[0], (high - low) / max(middle, 1e-9), len(times))
    return found


def _turn(runs: list[Candidate], number: int, device: torch.device) -> list[tuple[str, Any]]:
    """Each candidate once. A sample is milliseconds, or a pair of events to be read after a synchronisation."""
    taken: list[tuple[str, Any]] = []
    for offset in range(len(runs)):
        run, place = runs[(number + offset) % len(runs)], number * len(runs) + offset
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(AHEAD)
            start.record()
            run.call(place)
            stop.record()
            taken.append((run.name, (start, stop)))
        else:
            begin = time.perf_counter()
            run.call(place)
            taken.append((run.name, (time.perf_counter() - begin) * 1e3))
    return taken
