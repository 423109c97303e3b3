"""Efficient-vDiT's recipe: fewer steps by consistency distillation, a searched mask, attention distilled under it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vsparse.measure.calibrate import by_layer, recording
from vsparse.methods.attention_tile import AttentionTile, search_global_frames
from vsparse.optional import require
from vsparse.patch import Patch, apply
from vsparse.training.consistency import ConsistencyDistillation, few_steps
from vsparse.training.distill import AttentionDistillation
from vsparse.training.loop import Trainer, TrainSettings
from vsparse.training.optimisers import OptimiserSettings
from vsparse.training.task import Denoising, Teacher
from vsparse.training.teachers import StartWeights

__all__ = ["EfficientVDiT", "efficient_vdit"]


@dc.dataclass(frozen=True, kw_only=True)
class EfficientVDiT:
    """The recipe's choices.

    Args:
        steps: Of the distilled model's sampling, which is the number of segments.
        bound: Greatest relative error of a layer's attention under its mask (`search_global_frames`).
        first: Which distillation comes first; the mask is searched right before that of the attention.
        guidance: Scale that the consistency teacher is guided with, as of `ConsistencyDistillation`.
        samples: Attention inputs that each layer keeps for the search; each is three times its hidden states.
        block: As of `AttentionTile`.

    Raises:
        ValueError: a value out of range.
    """

    steps: int
    bound: float
    first: Literal["consistency", "attention"] = "consistency"
    guidance: float = 1.0
    samples: int = 8
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("steps", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"efficient_vdit: {name} must be at least 1, got {getattr(self, name)!r}")
        if not self.bound > 0.0:
            raise ValueError(f"efficient_vdit: bound must be positive, got {self.bound!r}")
        if self.first not in ("consistency", "attention"):
            raise ValueError(f"efficient_vdit: first must be 'consistency' or 'attention', got {self.first!r}")


def efficient_vdit(
    pipe: Any,
    task: Denoising,
    recipe: EfficientVDiT,
    *,
    calibrate: Callable[[], object],
    consistency: TrainSettings,
    attention: TrainSettings,
    optimiser: OptimiserSettings,
    folder: Path,
    copy: Literal["cpu", "device"] | None = None,
    transformer: str = "transformer",
    identity: Mapping[str, Any] | None = None,
    accelerator: Any = None,
) -> Patch:
    """Run the three stages on a pipeline's transformer.

    Args:
        pipe: A pipeline, not patched, with the weights to begin with; what of its transformer requires gradients
            learns. task: data, forward and objective; its own loss has no weight here.
        recipe: What is chosen. calibrate: runs the pipeline on calibration prompts; after the consistency distillation
            they should take ``recipe.steps`` steps.
        consistency, attention: Length and care of the two distillations; with ``consistency.average`` the averaged
            weights are the target network. optimiser: of both.
        folder: Checkpoints and logs, in ``consistency`` and ``attention``. An interrupted run goes on there when it is
            called again with a freshly loaded pipeline, provided that ``calibrate`` does the same again.
        copy: As of `StartWeights`: the consistency teacher is the model that ``pipe`` brings, in either order.
        transformer: Its name in the pipeline. identity, accelerator: as of `Trainer`.

    Returns:
        The "attention_tile" patch of the transformer.

    Raises:
        ValueError: as of the parts.

    Source: Efficient-vDiT (arXiv 2502.06155). Published: the three stages, that consistency distillation works within
    segments of the path (after arXiv 2403.06807), that the search takes the sparsest mask of a layer whose error stays
    below a bound, that distillation matches attention outputs, and that the two may change places. Not known to us, and
    chosen here: all settings, the distances, the norm of the bound, and that a stage's loss is its own alone.
    """
    model: nn.Module = getattr(pipe, transformer)
    start = StartWeights(model, copy=copy)
    known = {"recipe": dc.asdict(recipe), **(identity or {})}
    averaged: dict[str, Tensor] = {}

    def train(loss: str, teacher: Teacher, settings: TrainSettings, more: Mapping[str, Any]) -> None:
        trainer = Trainer(
            model,
            dc.replace(task, data=0.0, teachers={loss: (1.0, teacher)}),
            settings=settings,
            optimiser=optimiser,
            folder=folder / loss,
            identity={**known, **more},
            accelerator=accelerator,
        )
        averaged.update(trainer.average.tensors)
        trainer.run()

    def fewer_steps(patch: Patch | None) -> None:
        teacher = ConsistencyDistillation(
            task.objective,
            start,
            few_steps(pipe.scheduler, recipe.steps),
            patch=patch,
            guidance=recipe.guidance,
            empty=task.empty,
            average=lambda: averaged,
        )
        train("consistency", teacher, consistency, {})

    def less_attention() -> Patch:
        model.eval()
        frames = _search(model, recipe, calibrate)
        patch = apply(model, AttentionTile(global_frames=frames, block=recipe.block))
        train("attention", AttentionDistillation(patch), attention, {"global_frames": frames})
        averaged.clear()
        return patch

    if recipe.first == "consistency":
        fewer_steps(None)
        patch = less_attention()
    else:
        patch = less_attention()
        fewer_steps(patch)
    model.eval()
    return patch


def _search(model: nn.Module, recipe: EfficientVDiT, calibrate: Callable[[], object]) -> tuple[int, ...]:
    """Global frames of each layer; every process takes what the first one has found."""
    with recording(model, most=recipe.samples) as recorded:
        calibrate()
    found = search_global_frames(by_layer(recorded), bound=recipe.bound, block=recipe.block)
    told: list[tuple[int, ...]] = require("accelerate.utils", "diffusers").broadcast_object_list([found])
    return told[0]
