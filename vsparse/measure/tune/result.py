"""What a search gives: the profile, and everything that the report says."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import Any

from vsparse.fingerprint import digest
from vsparse.host import find_roots
from vsparse.measure.demo import environment
from vsparse.measure.fidelity.spread import Spread
from vsparse.measure.tune.choice import exact_steps
from vsparse.measure.tune.search import Found, Target
from vsparse.measure.tune.trials import Scene
from vsparse.measure.tune.verify import Row, Verified
from vsparse.profile import Model, Profile, Size

__all__ = ["Result", "model_of"]


def model_of(pipe: Any) -> Model:
    """The model of a pipeline as a profile names it; of several, whose shapes are equal, without their weights."""
    host, roots = find_roots(pipe)
    site = roots[0].claims[0].site
    return Model(
        name=type(roots[0].module).__name__,
        layers=len(roots[0].claims),
        heads=site.heads,
        head_dim=site.head_dim,
        weights=digest(host.fingerprint(roots[0].module)) if len(roots) == 1 else None,
    )


@dc.dataclass(frozen=True, kw_only=True)
class Result:
    """A search that is over.

    Args:
        found: By the search. verified: on unseen clips. model: that was tuned. size: of the video. guidance: of the
            pipeline, None: its own. calibration: clips that were searched with. target: what was asked for.
        device: Where it ran. environment: versions and date.
    """

    found: Found
    verified: Verified
    model: Model
    size: Size
    guidance: float | None
    calibration: Sequence[Scene]
    target: Target
    device: str
    environment: Mapping[str, Any] = dc.field(default_factory=environment)

    @property
    def words(self) -> str:
        """The settings in one sentence."""
        choice, steps = self.found.choice, self.size.steps
        dense = exact_steps(choice.method, choice.dense_steps, steps)
        return (
            f"{choice.name} with a density for each layer and head, {dense} of {steps} steps and "
            f"{len(choice.dense_layers)} of {self.model.layers} layers dense"
        )

    @property
    def verdicts(self) -> list[str]:
        """What is to be said, in order."""
        checked, found = self.verified, self.found
        met = "met" if checked.met else "missed"
        said = [
            f"Target: {self.target}. {met.capitalize()} on {len(checked.clips)} clips that the search has not seen: "
            f"{_figure(self.target.kind, checked.value)} (calibration: {_figure(self.target.kind, found.value)}).",
            f"{self.words.capitalize()}; {checked.tuned.density:.3f} of all token pairs computed.",
            f"{checked.verdict.capitalize()}. Share of the pairs that they computed: {checked.tuned.density:.4f} and "
            f"{checked.uniform.density:.4f}.",
            f"The floor, every pair computed in another order: {checked.floor.error.mean:.2g}.",
        ]
        dense, tuned = checked.seconds
        said.append(f"One generation here: dense {dense:.2f} s, tuned {tuned:.2f} s (medians of three in turn).")
        if found.advice:
            said.append(f"The search could not reach the target: {found.advice}.")
        return said

    def profile(self, name: str) -> Profile:
        """As a profile."""
        method, schedule = self.found.choice.applied()
        kind = self.target.kind
        figures = {row.name: _row(row) for row in (self.verified.tuned, self.verified.uniform, self.verified.floor)}
        seconds = self.verified.seconds
        measured: dict[str, Any] = {
            "target": str(self.target),
            "met": self.verified.met,
            kind: _short(self.verified.value),
            "calibration": tuple(f"{scene.seed}: {scene.prompt}" for scene in self.calibration),
            "unseen": tuple(f"{scene.seed}: {scene.prompt}" for scene in self.verified.clips),
            "verdict": self.verified.verdict,
            "uniform_density": _short(self.verified.uniform_density),
            **figures,
        }
        if self.guidance is not None:
            measured["guidance"] = self.guidance
        measured["seconds_dense"], measured["seconds_tuned"] = map(_short, seconds)
        return Profile(
            method=method,
            schedule=schedule,
            model=self.model,
            size=self.size,
            about=f"{self.words}, found by `vsparse tune` for an {self.target}".replace("an at most", "at most"),
            measured=True,
            provenance={
                "source": "vsparse tune",
                "device": self.device,
                "date": self.environment["date"],
                "packages": dict(self.environment["packages"]),
                "measured": measured,
            },
            name=name,
        )

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "target": dc.asdict(self.target),
            "words": self.verdicts,
            "model": dc.asdict(self.model),
            "size": dc.asdict(self.size),
            "choice": {**dc.asdict(self.found.choice), "method": str(self.found.choice.method)},
            "tried": list(self.found.tried),
            "weights": [list(row) for row in self.found.weights],
            "tables": {name: dc.asdict(table) for name, table in self.found.tables.items()},
            "calibration": [list(scene) for scene in self.calibration],
            "verified": self.verified.as_json(),
            "device": self.device,
            "environment": dict(self.environment),
        }


def _short(value: float) -> float:
    """Six digits: what is written down for people."""
    return float(f"{value:.6g}")


def _figure(kind: str, value: float) -> str:
    return {"density": f"{value:.4f}", "error": f"{value:.4f}", "seconds": f"{value:.3g} s"}[kind]


def _row(row: Row) -> dict[str, Any]:
    told: dict[str, Any] = {"density": _short(row.density), "clips": len(row.outcomes)}
    for name, spread in (("error", row.error), ("psnr", row.psnr), ("ssim", row.ssim)):
        told |= _spread(name, spread)
    return told


def _spread(name: str, spread: Spread) -> dict[str, Any]:
    found: dict[str, Any] = {name: _short(spread.mean)}
    if spread.interval is not None:
        found[f"{name}_interval"] = tuple(map(_short, spread.interval))
    return found
