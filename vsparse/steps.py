"""Where a forward stands: denoising step, CFG branch, generation, training step."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Iterator
from typing import Protocol

__all__ = ["StepSource", "Tracker", "Where"]


@dc.dataclass(frozen=True, kw_only=True)
class Where:
    """Where a forward stands in a generation.

    Args:
        step: 0-based denoising step, or None. steps: how many, or None. branch: name of the CFG branch, or None.
        generation: Any object that changes with the run of the denoising loop, or None when nothing tells.
        advancing: False when the step source never moved (a scheduler nobody steps).
    """

    step: int | None = None
    steps: int | None = None
    branch: str | None = None
    generation: object = None
    advancing: bool = True


class StepSource(Protocol):
    """Tells where a forward stands, from what the host knows; made by the host adapter."""

    def where(self, root: str) -> Where:
        """Where the next forward of a root stands."""
        ...


class Tracker:
    """Steps, branches and generations of one patch, shared by its roots."""

    def __init__(self, source: StepSource | None) -> None:
        self.source = source
        self.training_step: int | None = None
        self.suspended = False
        self._explicit: Where | None = None
        self._steps: int | None = None
        self._generation = 0

    @contextlib.contextmanager
    def generation(self, num_steps: int) -> Iterator[None]:
        """One run of a custom denoising loop of ``num_steps`` steps."""
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"generation: num_steps must be an integer >= 1, got {num_steps!r}")
        if self._steps is not None:
            raise RuntimeError("generation: a generation is already open; close it first")
        self._steps, self._generation = num_steps, self._generation + 1
        try:
            yield
        finally:
            self._steps = None

    @contextlib.contextmanager
    def step(self, i: int, *, branch: str = "cond") -> Iterator[None]:
        """One step of a custom loop; inside it, each model call belongs to ``branch``."""
        if self._steps is None:
            raise RuntimeError("step: open `with patch.generation(num_steps)` around the loop first")
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self._steps:
            raise ValueError(f"step: i must be an integer in [0, num_steps={self._steps}), got {i!r}")
        before, self._explicit = (
            self._explicit,
            Where(step=i, steps=self._steps, branch=branch, generation=("explicit", self._generation)),
        )
        try:
            yield
        finally:
            self._explicit = before

    @contextlib.contextmanager
    def suspend(self) -> Iterator[None]:
        """Inside it every site runs dense and nothing is remembered."""
        before, self.suspended = self.suspended, True
        try:
            yield
        finally:
            self.suspended = before

    def where(self, root: str) -> Where:
        """Where the next forward of a root stands: what the user said, else what the host knows."""
        if self._explicit is not None:
            return self._explicit
        return self.source.where(root) if self.source is not None else Where()

    def __deepcopy__(self, memo: dict[int, object]) -> Tracker:
        """A copied model is driven by someone else."""
        return Tracker(None)
