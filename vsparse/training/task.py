"""Denoising as a task for the loop: noise a batch, let the model predict, weigh the error; and what a teacher adds."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from vsparse.training.draws import Draws
from vsparse.training.objective import Objective

__all__ = ["Denoised", "Denoising", "Sample", "Teacher"]

Forward = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A batch as the task wants it.

    Args:
        latents: ``[B, ...]`` clean, in the transformer's layout. text: features by name, ``[B, ...]``.
        name: What to call it in an error.
    """

    latents: Tensor
    text: Mapping[str, Tensor]
    name: str


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Denoised:
    """One prediction and what it was made from: what a teacher gets to see.

    Args:
        model: As the loop has wrapped it. forward: the host's model call.
        clean, noise, noisy, prediction: ``[B, ...]``. times: noise levels of the objective. timestep: the model's.
        text: Features by name. draws: further private randomness.
    """

    model: nn.Module
    forward: Forward
    clean: Tensor
    noise: Tensor
    noisy: Tensor
    times: Tensor
    timestep: Tensor
    text: Mapping[str, Tensor]
    prediction: Tensor
    draws: Draws


class Teacher(Protocol):
    """A further loss that pulls the sparse model towards a dense one."""

    def watch(self) -> contextlib.AbstractContextManager[None]:
        """Around the prediction: what happens inside the model can be recorded."""

    def loss(self, made: Denoised) -> Tensor:
        """A scalar; its gradient reaches the student alone."""


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Denoising:
    """Predict what the scheduler's objective asks for, from noisy latents and text.

    Args:
        forward: The host's model call (`TrainingHost.forward`). objective: of the scheduler.
        source: Yields the `Sample` of each micro-batch from one step to before another.
        empty: Text features of the empty caption, ``[1, ...]``. empty_captions: share of samples that get them.
        span: Share of the noise to stay in, as `TrainingHost.experts` gives it.
        data: Weight of this loss. teachers: further losses by name, with weights (`vsparse.training.distill`).
        extra: Losses that the method hands out (`Patch.auxiliary_losses`), or None.
    """

    forward: Forward
    objective: Objective
    source: Callable[[int, int], Iterable[Sample]]
    empty: Mapping[str, Tensor]
    empty_captions: float
    span: tuple[float, float] = (0.0, 1.0)
    data: float = 1.0
    teachers: Mapping[str, tuple[float, Teacher]] = dc.field(default_factory=dict)
    extra: Callable[[], Mapping[str, Tensor]] | None = None

    def batches(self, first: int, last: int) -> Iterable[Sample]:
        """Micro-batches of this process."""
        return self.source(first, last)

    def describe(self, batch: Sample) -> str:
        """Its captions or files."""
        return batch.name

    def loss(self, model: nn.Module, batch: Sample, draws: Draws, step: int) -> dict[str, Tensor]:
        """The weighted sum, and its parts."""
        device = next(model.parameters()).device
        clean = batch.latents.to(device, torch.float32)
        text = self._text(batch, draws, device)
        generator = draws.of("times").generator()
        times = self.objective.sample(len(clean), generator=generator, span=self.span).to(device)
        noise = draws.of("noise").normal(clean)
        noisy, timestep = self.objective.noise(clean, noise, times)
        with contextlib.ExitStack() as watched:
            for _, teacher in self.teachers.values():
                watched.enter_context(teacher.watch())
            prediction = self.forward(model, noisy, timestep, text)
        parts = {"data": self.objective.loss(prediction, clean, noise, times).mean()}
        total = self.data * parts["data"]
        extra = list(self.extra().values()) if self.extra is not None else []
        if extra:
            parts["method"] = torch.stack(extra).sum()
            total = total + parts["method"]
        made = Denoised(
            model=model,
            forward=self.forward,
            clean=clean,
            noise=noise,
            noisy=noisy,
            times=times,
            timestep=timestep,
            text=text,
            prediction=prediction,
            draws=draws.of("teacher"),
        )
        for name, (weight, teacher) in self.teachers.items():
            parts[name] = teacher.loss(made)
            total = total + weight * parts[name]
        return {"loss": total, **parts}

    def _text(self, batch: Sample, draws: Draws, device: torch.device) -> dict[str, Tensor]:
        """Text features, those of the empty caption for a drawn share."""
        drawn = draws.of("drop").uniform(len(batch.latents)) < self.empty_captions
        found = {}
        for name, x in batch.text.items():
            dropped = drawn.view(-1, *[1] * (x.ndim - 1))
            found[name] = torch.where(dropped, self.empty[name].to(x.dtype), x).to(device)
        return found
