"""How density falls while a model learns to do with less."""

from __future__ import annotations

import dataclasses as dc

__all__ = ["DensityRamp"]


@dc.dataclass(frozen=True, kw_only=True)
class DensityRamp:
    """Training step -> density: everything at first, then down in equal stairs, then the target exactly.

    VSA (arXiv 2505.13389, section 2.4) begins with all blocks, so that the first step is full attention, and lowers
    the number of blocks by a fixed count every few steps.

    Args:
        last: Density at the end. first: at the beginning.
        begin: Steps with ``first``. steps: steps of the way down; 0: the next step has ``last``.
        stairs: How many equal drops the way down has; None: one for each step.

    Raises:
        ValueError: densities outside (0, 1] or rising, negative steps, more stairs than steps.
    """

    last: float
    first: float = 1.0
    begin: int = 0
    steps: int = 0
    stairs: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.last <= self.first <= 1.0:
            raise ValueError(f"ramp: 0 < last <= first <= 1 must hold, got last={self.last!r}, first={self.first!r}")
        for name in ("begin", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"ramp: {name} must be an integer >= 0, got {value!r}")
        if self.stairs is not None and not 1 <= self.stairs <= max(1, self.steps):
            raise ValueError(f"ramp: stairs must be in 1 to steps={self.steps}, got {self.stairs!r}")

    def __call__(self, step: int) -> float:
        """Density of a 0-based training step."""
        if step < self.begin:
            return self.first
        if step >= self.begin + self.steps:
            return self.last
        stairs = self.stairs or self.steps
        done = (step - self.begin) * stairs // self.steps
        return self.first + (self.last - self.first) * done / stairs
