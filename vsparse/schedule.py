"""When a layer is sparse: denoising steps, layers, searches, training steps."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable, Sequence
from typing import Literal

__all__ = ["Phase", "Schedule"]

Phase = Literal["dense", "search", "refresh", "reuse", "output"]


@dc.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which layers, denoising steps and training steps are sparse, and when a map is searched again.

    Args:
        dense_steps: Share of the denoising steps, from the start, that run dense: ``floor(dense_steps * T)``. 1: all.
        dense_layers: The first n layers of the model run dense, or the indices in a tuple do.
        search_at: Shares f of the denoising steps at which a map is searched, at the 0-based step
            ``max(0, ceil(f * T) - 1)``; between them it is reused, before the first of them steps run dense. The first
            search is exact: it is the last dense step. None: the map is selected anew in every call.
        ramp: Training step -> density, for methods that are trained with falling density. None: the method's density.

    Raises:
        ValueError: a share outside [0, 1], shares that do not increase, a search before the end of the dense steps, a
            negative layer.
    """

    dense_steps: float = 0.0
    dense_layers: int | tuple[int, ...] = 0
    search_at: tuple[float, ...] | None = None
    ramp: Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        if not _shares([self.dense_steps]):
            raise ValueError(f"Schedule: dense_steps must lie in [0, 1], got {self.dense_steps!r}")
        chosen, at = self.dense_layers, self.search_at
        layers = chosen if isinstance(chosen, tuple) else (chosen,)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in layers):
            raise ValueError(f"Schedule: dense_layers must be a count or indices >= 0, got {chosen!r}")
        if at is not None and not (isinstance(at, tuple) and at and _shares(at) and list(at) == sorted(set(at))):
            raise ValueError(f"Schedule: search_at must be increasing shares in [0, 1], got {at!r}")
        if at is not None and at[0] < self.dense_steps:
            raise ValueError(
                f"Schedule: the first search must not lie before the end of the dense steps, got search_at={at!r} "
                f"with dense_steps={self.dense_steps!r}"
            )
        if self.ramp is not None and not callable(self.ramp):
            raise ValueError(f"Schedule: ramp must map a training step to a density, got {self.ramp!r}")

    @property
    def needs_steps(self) -> bool:
        """Whether a phase depends on the denoising step."""
        return self.search_at is not None or 0.0 < self.dense_steps < 1.0

    def dense_layer(self, layer: int) -> bool:
        """Whether a layer always runs dense."""
        chosen = self.dense_layers
        return layer < chosen if isinstance(chosen, int) else layer in chosen

    def searches(self, steps: int) -> tuple[int, ...]:
        """0-based steps at which a map is searched, for ``steps`` denoising steps."""
        return tuple(sorted({max(0, math.ceil(f * steps - 1e-9) - 1) for f in self.search_at or ()}))

    def phase(self, *, step: int | None, steps: int | None, layer: int, filled: bool) -> Phase:
        """The phase of one call.

        Args:
            step: 0-based denoising step. steps: how many there are. Both may be None when ``needs_steps`` is False.
            layer: Layer index in its model.
            filled: Whether the state of that layer and branch holds a map; without one a reuse becomes a search.

        Raises:
            ValueError: the schedule needs the step and it is not known.
        """
        if self.dense_steps >= 1.0 or self.dense_layer(layer):
            return "dense"
        if not self.needs_steps:
            return "search"
        if step is None or steps is None:
            raise ValueError(
                "this schedule depends on the denoising step, and nothing tells it: patch the pipeline instead of the "
                "bare model, or wrap your loop in `with patch.generation(num_steps)` and each model call in "
                '`with patch.step(i, branch="cond")`, or pass schedule=vsparse.Schedule() for no step rule'
            )
        if self.search_at is None:
            return "dense" if step < math.floor(self.dense_steps * steps + 1e-9) else "search"
        searches = self.searches(steps)
        if step < searches[0]:
            return "dense"
        if not filled or step == searches[0]:
            return "search"
        return "refresh" if step in searches else "reuse"


def _shares(values: Sequence[object]) -> bool:
    return all(isinstance(f, int | float) and not isinstance(f, bool) and 0.0 <= f <= 1.0 for f in values)
