"""Does it hold for prompts and seeds that the search has not seen, and is it better than one density for everything?"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Sequence
from typing import Any

from vsparse.measure.fidelity.spread import Spread, spread_of
from vsparse.measure.tune.choice import Choice, uniform
from vsparse.measure.tune.search import Target
from vsparse.measure.tune.trials import Outcome, Scene, Trials

__all__ = ["Row", "Verified", "verify"]

STEP = 1 / 64  # of the density that all heads have


@dc.dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of run on the unseen clips, each against the dense clip of the same prompt and seed.

    Args:
        name: "tuned", "uniform" or "floor". outcomes: of the clips, in their order.
    """

    name: str
    outcomes: tuple[Outcome, ...]

    @property
    def error(self) -> Spread:
        """Relative error of the last latents."""
        return spread_of([x.error for x in self.outcomes])

    @property
    def psnr(self) -> Spread:
        """In dB; infinite where a clip equals the dense one."""
        return spread_of([math.inf if x.psnr is None else x.psnr for x in self.outcomes])

    @property
    def ssim(self) -> Spread:
        """Structural similarity."""
        return spread_of([x.ssim for x in self.outcomes])

    @property
    def density(self) -> float:
        """Executed share of the pairs over the whole generation, mean over clips."""
        return sum(x.density for x in self.outcomes) / len(self.outcomes)


@dc.dataclass(frozen=True, kw_only=True)
class Verified:
    """What the unseen clips say.

    Args:
        clips: They. tuned, uniform, floor: rows; uniform executes at least what tuned does, with one density for all
            layers and heads, and the same method and dense steps. floor: every pair, in another order.
        uniform_density: That one density. seconds: dense and tuned, of one clip.
        met: Whether the target is met here; value: what its quantity came to.
    """

    clips: tuple[Scene, ...]
    tuned: Row
    uniform: Row
    floor: Row
    uniform_density: float
    seconds: tuple[float, float]
    met: bool
    value: float

    @property
    def gain(self) -> Spread:
        """Error of uniform less that of tuned, clip by clip: above 0 where the profile is better."""
        pairs = zip(self.uniform.outcomes, self.tuned.outcomes, strict=True)
        return spread_of([uniform.error - tuned.error for uniform, tuned in pairs])

    @property
    def verdict(self) -> str:
        """Whether densities by layer and head beat one density, in words."""
        gain, clips = self.gain, len(self.clips)
        wins = sum(a.error < b.error for a, b in zip(self.tuned.outcomes, self.uniform.outcomes, strict=True))
        means = f"{self.tuned.error.mean:.4f} against {self.uniform.error.mean:.4f}"
        told = f"error {means}, better on {wins} of {clips} clips"
        if gain.interval is None:
            return f"{told}; one clip tells no interval"
        low, high = gain.interval
        words = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        return f"densities by layer and head are {words} one density: {told}, difference {low:.4f} to {high:.4f}"

    def as_json(self) -> dict[str, Any]:
        """For the report and the profile's provenance."""
        rows = {row.name: [dc.asdict(x) for x in row.outcomes] for row in (self.tuned, self.uniform, self.floor)}
        return {
            "clips": [list(scene) for scene in self.clips],
            "rows": rows,
            "uniform_density": self.uniform_density,
            "seconds": self.seconds,
            "met": self.met,
            "value": self.value,
        }


def verify(trials: Trials, choice: Choice, target: Target, clips: Sequence[Scene]) -> Verified:
    """Run a choice, its uniform counterpart and the floor on clips; take the times of the first one."""
    tuned = _row("tuned", trials, choice, clips)
    even, density = _even(trials, choice, clips)
    seconds = trials.seconds(choice, clips[0])
    value = {"density": tuned.density, "error": tuned.error.mean, "seconds": seconds[1]}
    return Verified(
        clips=tuple(clips),
        tuned=tuned,
        uniform=_row("uniform", trials, even, clips),
        floor=Row(name="floor", outcomes=tuple(trials.floor(scene) for scene in clips)),
        uniform_density=density,
        seconds=seconds,
        met=value[target.kind] <= target.value,
        value=value[target.kind],
    )


def _row(name: str, trials: Trials, choice: Choice, clips: Sequence[Scene]) -> Row:
    return Row(name=name, outcomes=tuple(trials.outcome(choice, scene) for scene in clips))


def _even(trials: Trials, choice: Choice, clips: Sequence[Scene]) -> tuple[Choice, float]:
    """The least single density with which the first clip executes at least as much as the choice does."""
    wanted = trials.outcome(choice, clips[0])
    density = sum(map(sum, choice.densities)) / sum(map(len, choice.densities))
    while trials.outcome(uniform(choice, density), clips[0]).density < wanted.density and density < 1.0:
        density = min(1.0, density + STEP)
    return uniform(choice, density), density
