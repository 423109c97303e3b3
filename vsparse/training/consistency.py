"""Multi-step consistency distillation: a model learns to jump to the end of its segment of the denoising path."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vsparse.patch import Patch
from vsparse.training.objective import FlowMatching, Objective, objective_of
from vsparse.training.task import Denoised
from vsparse.training.teachers import StartWeights, plain, still, teaching, with_weights

__all__ = ["ConsistencyDistillation", "few_steps"]


def few_steps(scheduler: Any, steps: int) -> Tensor:
    """Where a run of few steps calls the model, as borders of segments.

    Args:
        scheduler: As of `objective_of`, and not touched. steps: how many, at least 1.

    Returns:
        ``[steps + 1]`` ascending times of the objective, the clean sample's first. For FlowMatchEuler they are spread
        evenly before the shift, as the pipelines of HunyuanVideo do; the other schedulers choose for themselves.
    """
    twin = copy.deepcopy(scheduler)
    if "FlowMatchEuler" in type(twin).__name__:
        twin.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)])
    else:
        twin.set_timesteps(steps)
    if isinstance(objective_of(scheduler), FlowMatching):
        levels: Tensor = twin.sigmas.double().flip(0)
        return levels
    return torch.cat([twin.timesteps.new_full((1,), -1), twin.timesteps.flip(0)])


class ConsistencyDistillation:
    """Wherever the student starts on a path of the teacher's ODE, it shall arrive at the same end of the segment.

    Borders cut the path from noise to video into segments. From a noisy sample at time t the teacher makes one step
    towards the end s of its segment, to t'. The student's jump from t to s and the target network's jump from t' to s
    shall agree; a jump is one Euler step (DDIM for models that are trained on discrete timesteps) along the prediction.
    Where t' is s already, the teacher's own sample is the target, which ties the chain down. A distilled model is
    sampled in as many such steps as there are segments (UniPC and DPM: with ``solver_order=1``), at guidance 1 if
    ``guidance`` has been distilled into it.

    Args:
        objective: Of the scheduler. start: the teacher's weights, which must not move.
        borders: ``[segments + 1]`` ascending times, the clean sample's first (`few_steps`).
        steps: Of the teacher from pure noise to the video.
        patch: What made the student sparse, None: nothing; the teacher is dense.
        guidance: Scale of classifier-free guidance with which the teacher steps, ``w`` in ``empty + w (text - empty)``;
            other than 1 it costs a second forward. empty: text features of the empty caption, ``[1, ...]``.
        average: Gives the weights of the target network by name, such as those of `Trainer.average`; what is missing
            there is the student's own. None: all are the student's own. Either way it is sparse like the student, and
            has no dropout and no gradient.
        huber: ``c`` of the pseudo-Huber distance ``sqrt(d + c^2) - c``, d a sample's mean squared difference; None: d.

    Raises:
        ValueError: borders that are not such times, a number out of range, or guidance without ``empty``.

    Source: multistep consistency models (arXiv 2403.06807), which Efficient-vDiT (arXiv 2502.06155) builds on; theirs
    add noise in the teacher's step and weigh the loss by time, here neither. Guidance and number of steps as in latent
    consistency models (arXiv 2310.04378), with one fixed scale; pseudo-Huber: arXiv 2310.14189.
    """

    def __init__(
        self,
        objective: Objective,
        start: StartWeights,
        borders: Tensor,
        *,
        steps: int = 50,
        patch: Patch | None = None,
        guidance: float = 1.0,
        empty: Mapping[str, Tensor] | None = None,
        average: Callable[[], Mapping[str, Tensor]] | None = None,
        huber: float | None = None,
    ) -> None:
        clean, noise = objective.at(torch.tensor([0.0, 1.0], dtype=torch.float64)).split(1)
        fits = borders.ndim == 1 and len(borders) > 1 and borders.dtype == clean.dtype
        if not fits or bool((borders.diff() <= 0).any()) or borders[0] != clean:
            raise ValueError(f"borders must be ascending {clean.dtype} times from {clean.item()} on, got {borders}")
        if guidance != 1.0 and empty is None:
            raise ValueError(f"guidance={guidance!r} needs empty, the text features of the empty caption")
        if huber is not None and not huber > 0.0:
            raise ValueError(f"huber must be positive or None, got {huber!r}")
        self.objective, self.start, self.borders, self.patch = objective, start, borders, patch
        self.steps, self.guidance, self.empty = steps, guidance, empty
        self.average, self.huber = average, huber
        if steps < 1 or not bool(self.times(noise)[1] < noise):
            raise ValueError(f"steps must be at least 1 and no more than there are timesteps, got {steps!r}")

    def watch(self) -> contextlib.AbstractContextManager[None]:
        """Nothing inside the student is needed."""
        return contextlib.nullcontext()

    def loss(self, made: Denoised) -> Tensor:
        """Float32 scalar (float64 for a float64 model)."""
        objective, model = self.objective, plain(made.model)
        end, nearer = self.times(made.times)
        with teaching(model, self.patch, self.start) as teacher:
            led = objective.step_to(self._guided(teacher, made), made.noisy, made.times, nearer)
        with still(model):
            target = model if self.average is None else with_weights(model, self.average())
            told = made.forward(target, led, objective.timestep(nearer), made.text)
            wanted = objective.step_to(told, led, nearer, end)
        found = objective.step_to(made.prediction, made.noisy, made.times, end)
        error = (found - wanted).square().flatten(1).mean(1)
        if self.huber is not None:
            error = (error + self.huber**2).sqrt() - self.huber
        return error.mean()

    def times(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Where the segments of some times end, and where the teacher's step leads, both in the objective's times.

        A time on the border of two segments belongs to the less noisy one.
        """
        objective, borders = self.objective, self.borders.to(times.device)
        end = borders[(torch.searchsorted(borders, times) - 1).clamp_min(0)]
        step = objective.at((objective.share(times) - 1 / self.steps).clamp_min(0))
        return end, torch.maximum(step, end)

    def _guided(self, teacher: nn.Module, made: Denoised) -> Tensor:
        """The teacher's prediction, in float32 at least."""
        told = made.forward(teacher, made.noisy, made.timestep, made.text)
        told = told.to(torch.promote_types(told.dtype, torch.float32))
        if self.guidance == 1.0:
            return told
        assert self.empty is not None
        empty = {name: self.empty[name].to(x).expand_as(x) for name, x in made.text.items()}
        without = made.forward(teacher, made.noisy, made.timestep, empty).to(told.dtype)
        return without + self.guidance * (told - without)
