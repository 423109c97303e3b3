"""The embedded model as a place to train in: clips drawn and encoded, the loss on held-out ones, videos judged."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vsparse.host import training_host
from vsparse.measure.adherence import Adherence, adherence
from vsparse.measure.embedded import EMBEDDED, Clip, embedded_pipeline
from vsparse.measure.pipelines import generate
from vsparse.measure.shapes import Scene, draw, held_out, scenes, training_scenes
from vsparse.patch import Patch
from vsparse.training.draws import Draws
from vsparse.training.objective import Objective, objective_of
from vsparse.training.task import Denoising, Sample

__all__ = ["Playground", "encode_clips"]

TRAINING, HELD_OUT = 10, 11  # seeds of the clips; the checkpoint was trained on others
BATCH = 8


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Playground:
    """A fresh copy of the embedded pipeline with clips to train on and clips that nothing was trained on.

    Args:
        pipe: The pipeline, dense. latents, numbers: training clips ``[N, C, T, h, w]`` and the scene of each.
        held_latents, held_numbers: of scenes that training never sees. text: features of every scene's prompt by name.
        empty: of the empty caption.
    """

    pipe: Any
    latents: Tensor
    numbers: Tensor
    held_latents: Tensor
    held_numbers: Tensor
    text: dict[str, Tensor]
    empty: dict[str, Tensor]

    @staticmethod
    def open(*, clips: int = 960, held: int = 48, told: Callable[[int, int], None] | None = None) -> Playground:
        """Draw and encode the clips; told of each batch: how many clips are done, of how many."""
        pipe = embedded_pipeline()
        pipe.set_progress_bar_config(disable=True)
        side, known = training_host(pipe), list(scenes())
        mine = [training_scenes()[i % len(training_scenes())] for i in range(clips)]
        others = [held_out()[i % len(held_out())] for i in range(held)]
        rows = [side.encode_text([scene.prompt]) for scene in known]
        return Playground(
            pipe=pipe,
            latents=encode_clips(side, mine, seed=TRAINING, told=told),
            numbers=torch.tensor([known.index(scene) for scene in mine]),
            held_latents=encode_clips(side, others, seed=HELD_OUT),
            held_numbers=torch.tensor([known.index(scene) for scene in others]),
            text={name: torch.cat([row[name] for row in rows]) for name in rows[0]},
            empty=side.encode_text([""]),
        )

    def renewed(self) -> Playground:
        """The same clips with the pipeline as it ships."""
        pipe = embedded_pipeline()
        pipe.set_progress_bar_config(disable=True)
        return dc.replace(self, pipe=pipe)

    @property
    def objective(self) -> Objective:
        """Of the pipeline's scheduler, times spread over each batch."""
        return dc.replace(objective_of(self.pipe.scheduler), stratified=True)

    def task(self, *, seed: int, batch: int = BATCH, empty_captions: float = 0.1) -> Denoising:
        """Denoising of training clips in an order that follows from the seed."""

        def source(first: int, last: int) -> Iterator[Sample]:
            for step in range(first, last):
                chosen = torch.randint(len(self.latents), (batch,), generator=Draws((seed, "order", step)).generator())
                yield self._sample(self.latents[chosen], self.numbers[chosen], f"clips {chosen.tolist()}")

        return Denoising(
            forward=training_host(self.pipe).forward,
            objective=self.objective,
            source=source,
            empty=self.empty,
            empty_captions=empty_captions,
        )

    def _sample(self, latents: Tensor, numbers: Tensor, name: str) -> Sample:
        return Sample(latents=latents, text={key: x[numbers] for key, x in self.text.items()}, name=name)

    @torch.no_grad()
    def held_out_loss(self, patch: Patch | None = None) -> float:
        """Mean loss over the held-out clips, each at noise and a time that are the same in every call.

        Args:
            patch: Of the pipeline's transformer, if it has one. A method whose search computes everything searches each
                batch in one call and is measured in the next, which reuses the map.
        """
        task, model = dc.replace(self.task(seed=0), empty_captions=0.0), self.pipe.transformer
        training, losses = model.training, []
        model.eval()
        for i, first in enumerate(range(0, len(self.held_latents), BATCH)):
            part = slice(first, first + BATCH)
            sample = self._sample(self.held_latents[part], self.held_numbers[part], "held out")
            once = functools.partial(task.loss, model, sample, Draws(("held out", i)), 0)
            losses.append(float((once() if patch is None else _sparse(patch, once))["data"]))
        model.train(training)
        return sum(losses) / len(losses)

    def videos(self, wanted: Sequence[Scene], *, clip: Clip = EMBEDDED, seed: int = 0) -> list[Tensor]:
        """One video of each scene's prompt, frames ``[F, H, W, 3]``."""
        self.pipe.transformer.eval()
        asked = dc.asdict(clip)
        return [generate(self.pipe, prompt=x.prompt, seed=seed + i, **asked) for i, x in enumerate(wanted)]

    @staticmethod
    def judged(videos: Sequence[Tensor], wanted: Sequence[Scene]) -> list[Adherence]:
        """Whether each video shows its scene."""
        return [adherence(frames, scene) for frames, scene in zip(videos, wanted, strict=True)]


def _sparse(patch: Patch, once: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A call that is sparse: the only one, or the one after a search."""
    if "search" not in patch.plan.method.exact_phases:
        return once()
    with patch.generation(2):
        with patch.step(0):
            once()
        with patch.step(1):
            return once()


def encode_clips(
    side: Any, wanted: Sequence[Scene], *, seed: int, told: Callable[[int, int], None] | None = None
) -> Tensor:
    """Latents of drawn clips of some scenes, float32."""
    found = []
    for first in range(0, len(wanted), BATCH):
        part = wanted[first : first + BATCH]
        pixels = draw(part, seed=seed, first=first, size=EMBEDDED.height, frames=EMBEDDED.frames)
        found.append(side.encode_video(pixels))
        if told is not None:
            told(min(first + BATCH, len(wanted)), len(wanted))
    return torch.cat(found)
