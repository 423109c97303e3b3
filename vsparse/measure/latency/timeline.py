"""A timeline of marks: from each to the next the time belongs to one part, so the parts add up to the whole."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, Protocol

import torch

__all__ = [
    "BLOCK",
    "CHOOSE",
    "COMBINE",
    "COMMUNICATE",
    "CROSS",
    "FEED",
    "KERNEL",
    "PACK",
    "PARTS",
    "PROJECT",
    "REST",
    "SCHEDULER",
    "SEARCH",
    "SELF_ATTENTION",
    "TEXT",
    "TRANSFORMER",
    "VAE",
    "Clock",
    "CpuClock",
    "CudaClock",
    "Span",
    "Timeline",
    "clock_of",
]

TEXT, VAE, SCHEDULER, TRANSFORMER = "text encoder", "VAE", "scheduler", "embeddings and output"
PROJECT, CHOOSE, SEARCH, PACK = "projections", "choose the map", "exact search", "pack and unpack"
KERNEL, COMBINE, COMMUNICATE = "attention kernel", "combine", "communication"
CROSS, FEED, BLOCK, REST = "cross-attention", "feed-forward", "norms and residuals", "rest"

SELF_ATTENTION = (KERNEL, CHOOSE, SEARCH, PACK, COMBINE, COMMUNICATE, PROJECT)
"""What makes up the self-attention of a layer."""

PARTS = (*SELF_ATTENTION, CROSS, FEED, BLOCK, TRANSFORMER, TEXT, VAE, SCHEDULER, REST)
"""All parts. `REST` is what no other part claims: guidance, latents, Python between the models."""


class Span(NamedTuple):
    """What a stretch of time belongs to. ``layer``: of the transformer, None outside of its layers; ``phase``: of that
    layer in this call; ``step``: how often the scheduler had stepped before.
    """

    part: str
    layer: int | None
    phase: str
    step: int


class Clock(Protocol):
    """Takes marks without waiting for the device, and tells later how far they are apart."""

    def mark(self) -> Any:
        """Now."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Between each mark and the next; may wait for the device."""

    def now(self) -> float:
        """Seconds, once everything is done that was asked for."""


class CpuClock:
    """The wall clock: what the CPU computes is done when the call returns."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """Between each mark and the next."""
        return [b - a for a, b in itertools.pairwise(marks)]

    def now(self) -> float:
        """Now."""
        return time.perf_counter()


class CudaClock:
    """Events in the current stream of a GPU: recording one is a launch, nothing waits.

    Time in which the GPU waits for the CPU belongs to the part in which it waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """An event that the GPU passes when it gets there."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Between each event and the next; waits for the last one."""
        if marks:
            marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]

    def now(self) -> float:
        """The wall clock after the device has finished."""
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def clock_of(device: torch.device) -> Clock:
    """The clock of a device.

    Raises:
        NotImplementedError: neither a CPU nor an NVIDIA GPU.
    """
    if device.type == "cpu":
        return CpuClock()
    if device.type == "cuda":
        return CudaClock(device)
    raise NotImplementedError(f"latency: times are taken on a CPU or an NVIDIA GPU, not on {device.type!r}")


class Timeline:
    """Marks of one run, in the thread that made it.

    Parts are entered and left like brackets; the time inside a part that no inner part claims is its own. Outside of
    all of them it is `REST`.

    Attributes:
        layer, phase, step: What marks are labelled with from now on.
    """

    def __init__(self, clock: Clock) -> None:
        self.layer: int | None = None
        self.phase, self.step = "", 0
        self._clock, self._thread = clock, threading.get_ident()
        self._open = [Span(REST, None, "", 0)]
        self._spans: list[Span] = [self._open[0]]
        self._marks = [clock.mark()]
        self._seconds: dict[Span, float] | None = None

    @property
    def here(self) -> bool:
        """Whether it still runs, and this is its thread."""
        return self._seconds is None and threading.get_ident() == self._thread

    @property
    def part(self) -> str:
        """The innermost open part."""
        return self._open[-1].part

    def enter(self, part: str) -> None:
        """From now on time belongs to a part."""
        if self.here:
            self._open.append(Span(part, self.layer, self.phase, self.step))
            self._note()

    def leave(self) -> None:
        """From now on time belongs to the part around it again."""
        if self.here:
            assert len(self._open) > 1, "a part was left that was not entered"
            self._open.pop()
            self._note()

    def _note(self) -> None:
        self._marks.append(self._clock.mark())
        self._spans.append(self._open[-1])

    def timed(self, function: Callable[..., Any], part: str, *, inside: Sequence[str] = ()) -> Callable[..., Any]:
        """A function whose calls are a part; ``inside``: only where one of these is the innermost part."""

        @wraps(function)
        def _timed(*args: Any, **options: Any) -> Any:
            if not self.here or (inside and self.part not in inside):
                return function(*args, **options)
            self.enter(part)
            try:
                return function(*args, **options)
            finally:
                self.leave()

        return _timed

    def end(self) -> dict[Span, float]:
        """Seconds of every span, those that came again added up; the run is over."""
        if self._seconds is None:
            self._marks.append(self._clock.mark())
            found: dict[Span, float] = {}
            for span, seconds in zip(self._spans, self._clock.seconds(self._marks), strict=True):
                found[span] = found.get(span, 0.0) + seconds
            self._seconds = found
        return self._seconds
