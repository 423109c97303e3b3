"""Generations with choices, each compared with the dense one of the same prompt and seed; none is made twice."""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from vsparse.measure.fidelity.rounds import exact_floor
from vsparse.measure.paired import Clip, clip_of, latent_errors
from vsparse.measure.quality import compare
from vsparse.measure.tune.choice import Choice
from vsparse.measure.tune.ledger import Ledger
from vsparse.methods import Method
from vsparse.patch import apply
from vsparse.schedule import Schedule

__all__ = ["Outcome", "Scene", "Trials"]

ROUNDS = 3  # of generations that are timed


class Scene(NamedTuple):
    """What one clip shows, and the seed of its noise."""

    prompt: str
    seed: int


@dc.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One clip of a choice against the dense clip.

    Args:
        error: ``|x - y| / |y|`` of the latents after the last step. psnr, ssim: of the frames; None when equal.
        density: Executed share of the pairs over the whole generation.
    """

    error: float
    psnr: float | None
    ssim: float
    density: float


class Trials:
    """Clips of a pipeline.

    Args:
        pipe: A pipeline, not patched; it is left as it came. size: what `generate` is asked for beside prompt and seed.
        ledger: Where outcomes are kept. told: hears what is generated.
    """

    def __init__(self, pipe: Any, size: Mapping[str, Any], ledger: Ledger, told: Callable[[str], None]) -> None:
        self.pipe, self.size, self.ledger, self._told = pipe, dict(size), ledger, told
        self._dense: dict[Scene, Clip] = {}

    def dense(self, scene: Scene) -> Clip:
        """The dense clip of a scene.

        Raises:
            ValueError: the pipeline does not tell its latents.
        """
        if scene not in self._dense:
            self._told(f"dense: {scene.prompt}")
            clip = self.make(scene)
            if not clip.latents:
                raise ValueError(f"tune compares latents, and {clip.without_latents}")
            self._dense[scene] = _last(clip)
        return self._dense[scene]

    def again(self, scene: Scene) -> None:
        """Make a dense clip whose calls are watched; it is kept, too."""
        self._dense.pop(scene, None)
        self.dense(scene)

    def outcome(self, choice: Choice, scene: Scene) -> Outcome:
        """One clip of a choice."""
        return Outcome(**self.ledger.get(_name(choice, scene), lambda: self._outcome(*choice.applied(), choice, scene)))

    def floor(self, scene: Scene) -> Outcome:
        """One clip of another exact attention: what this model makes of a different order of additions."""
        by = exact_floor()
        return Outcome(
            **self.ledger.get(f"floor {_scene(scene)}", lambda: self._outcome(by.chooses, by.schedule, None, scene))
        )

    def mean(self, choice: Choice, scenes: Sequence[Scene]) -> tuple[float, float]:
        """Error and executed density of a choice, means over scenes."""
        found = [self.outcome(choice, scene) for scene in scenes]
        return sum(x.error for x in found) / len(found), sum(x.density for x in found) / len(found)

    def seconds(self, choice: Choice, scene: Scene) -> tuple[float, float]:
        """Seconds of one generation, dense and of a choice, medians of some in turn, after one of each to warm up."""
        found = self.ledger.get(f"seconds {_name(choice, scene)}", lambda: self._seconds(choice, scene))
        return found["dense"], found["sparse"]

    def _outcome(self, method: Method, schedule: Schedule, choice: Choice | None, scene: Scene) -> dict[str, Any]:
        dense = self.dense(scene)
        self._told(f"{method.key if choice is None else choice.name}: {scene.prompt}")
        with apply(self.pipe, method, schedule=schedule) as patch:
            clip = _last(self.make(scene))
            density = patch.stats()["density"]
        quality = compare(clip.frames, dense.frames).as_json()
        return {
            "error": latent_errors(clip, dense)[-1],
            "psnr": quality["psnr"],
            "ssim": quality["ssim"],
            "density": density,
        }

    def _seconds(self, choice: Choice, scene: Scene) -> dict[str, float]:
        self._told(f"times of {choice.name}")
        method, schedule = choice.applied()
        taken: dict[str, list[float]] = {"dense": [], "sparse": []}
        for _ in range(1 + ROUNDS):
            taken["dense"].append(self._timed(scene))
            with apply(self.pipe, method, schedule=schedule):
                taken["sparse"].append(self._timed(scene))
        return {name: median(values[1:]) for name, values in taken.items()}

    def _timed(self, scene: Scene) -> float:
        start = time.perf_counter()
        self.make(scene)  # frames and latents arrive on the CPU, so everything is done
        return time.perf_counter() - start

    def make(self, scene: Scene) -> Clip:
        """A clip with whatever is applied just now; it is not kept."""
        return clip_of(self.pipe, {**self.size, "prompt": scene.prompt, "seed": scene.seed})


def _last(clip: Clip) -> Clip:
    """With the latents of the last step only: those of all steps of a large video would fill the memory."""
    return dc.replace(clip, latents=clip.latents[-1:])


def _scene(scene: Scene) -> str:
    return f"{scene.seed} {scene.prompt}"


def _name(choice: Choice, scene: Scene) -> str:
    told = hashlib.sha256(json.dumps(choice.as_json()).encode()).hexdigest()[:16]
    return f"{choice.name} {told} {_scene(scene)}"
