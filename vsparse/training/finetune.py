"""Fine-tuning from a settings file: the model, its data, the loop, and what is left at the end."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vsparse.host import training_host
from vsparse.measure.video import check_folder
from vsparse.optional import require
from vsparse.training.consistency import ConsistencyDistillation, few_steps
from vsparse.training.data.clips import Problem
from vsparse.training.distill import AttentionDistillation, VelocityDistillation
from vsparse.training.export import export
from vsparse.training.files import clear_partial
from vsparse.training.loop import Trainer, make_accelerator, video_of
from vsparse.training.objective import FlowMatching, Objective, objective_of
from vsparse.training.settings import ObjectiveSettings, Settings
from vsparse.training.source import open_source
from vsparse.training.student import Student, load_student
from vsparse.training.task import Denoising, Teacher
from vsparse.training.teachers import StartWeights
from vsparse.training.validation import Validation, encoders_on

__all__ = ["Told", "finetune"]

RESULT = "result"


class Told:
    """What a run tells while it goes on; this one does not listen."""

    def encoding(self, what: str, done: int, of: int) -> None:
        """So many of the "clips" or "captions" are encoded."""

    def skipped(self, problems: Sequence[Problem]) -> None:
        """Clips that are left out, once."""

    def stepped(self, done: int, figures: Mapping[str, float]) -> None:
        """So many steps are done."""


def finetune(settings: Settings, *, told: Told | None = None) -> Path:
    """Run, or go on with, what a settings file describes; under `accelerate launch` every process calls it.

    Args:
        settings: See `vsparse.training.settings_file.read`. told: hears of progress.

    Returns:
        The folder of the result: ``result`` in the output folder.

    Raises:
        ValueError: settings that do not fit the model or the data, or the output folder belongs to another run.
        NotFiniteError: the loss is NaN; the last checkpoint stays. OSError: the disk is full.
    """
    told = told or Told()
    output = check_folder(settings.output)
    target = output / RESULT
    accelerator = make_accelerator()
    video_of(accelerator, settings.train)  # refuses a number of processes that does not fit
    student = load_student(
        settings.model,
        settings.method,
        device=accelerator.device,
        seed=settings.train.seed,
        parallel=settings.train.parallel,
    )
    side = training_host(student.pipe)
    with encoders_on(student, accelerator.device):
        empty = {name: x.cpu() for name, x in side.encode_text([""]).items()}
    source = open_source(student, side, settings, accelerator, told.encoding)
    told.skipped(source.problems)
    patch = student.patch
    objective = _objective(student, settings.objective)
    kept: list[Trainer] = []
    teachers = _teachers(student, objective, settings, empty, kept)
    task = Denoising(
        forward=side.forward,
        objective=objective,
        span=side.experts[student.name],
        source=source,
        empty=empty,
        empty_captions=settings.data.empty_captions,
        data=settings.distill.data,
        teachers=teachers,
        extra=None if patch is None else patch.auxiliary_losses,
    )
    validation = Validation(
        student=student,
        settings=settings.validation,
        precision=settings.train.precision,
        folder=output / "validation",
        accelerator=accelerator,
    )
    run = Trainer(
        student.transformer,
        task,
        settings=settings.train,
        optimiser=settings.optimiser,
        folder=output,
        identity=_identity(settings, source.samples),
        added=student.added,
        accelerator=accelerator,
        validate=validation if settings.validation.prompts else None,
        progressed=told.stepped,
        logged=_Board(output / "tensorboard") if settings.tensorboard and accelerator.is_main_process else None,
        before_step=None if patch is None else patch.training_step,
    )
    kept.append(run)
    run.run()
    finished = target.exists()
    if accelerator.is_main_process:
        clear_partial(output)
    accelerator.wait_for_everyone()  # all have looked, and nobody clears, once the first one writes
    if not finished:
        with run.average.in_place():
            export(student, target, kind=settings.result, accelerator=accelerator)
    return target


def _objective(student: Student, settings: ObjectiveSettings) -> Objective:
    """The scheduler's objective with the run's options."""
    found = objective_of(student.pipe.scheduler, shift=settings.shift)
    found = dc.replace(found, stratified=settings.stratified)
    if settings.times == "logit_normal":
        if not isinstance(found, FlowMatching):
            raise ValueError('objective: times "logit_normal" is for flow matching; this model takes "uniform"')
        found = dc.replace(found, logit_normal=(settings.mean, settings.std))
    return found


def _teachers(
    student: Student, objective: Objective, settings: Settings, empty: Mapping[str, Tensor], runs: Sequence[Trainer]
) -> dict[str, tuple[float, Teacher]]:
    """The losses that the settings ask for; ``runs`` will hold the run, whose average is a target network."""
    told, patch = settings.distill, student.patch
    found: dict[str, tuple[float, Teacher]] = {}
    start = None
    if told.consistency or (told.velocity and told.teacher == "start"):
        start = StartWeights(student.transformer, patch=patch, copy=told.keep_start)
    if told.velocity:
        assert patch is not None
        chosen = start if told.teacher == "start" else None
        found["velocity"] = (told.velocity, VelocityDistillation(patch, start=chosen))
    if told.attention:
        assert patch is not None
        found["attention"] = (told.attention, AttentionDistillation(patch))
    if told.consistency:
        assert start is not None
        teacher = ConsistencyDistillation(
            objective,
            start,
            few_steps(student.pipe.scheduler, told.segments),
            steps=told.teacher_steps,
            patch=patch,
            guidance=told.guidance,
            empty=empty,
            average=(lambda: runs[0].average.tensors) if settings.train.average else None,
            huber=told.huber,
        )
        found["consistency"] = (told.consistency, teacher)
    return found


class _Board:
    """Lines of the log for TensorBoard; what a resumed run writes again replaces what was there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def __call__(self, done: int, figures: Mapping[str, float]) -> None:
        if self._writer is None:
            require("tensorboard", "train")
            made = require("torch.utils.tensorboard", "train").SummaryWriter
            self._writer = made(str(self._folder), purge_step=done)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, done)
        self._writer.flush()


def _identity(settings: Settings, samples: int) -> dict[str, Any]:
    """What decides the result besides loop and optimiser."""
    told = dc.asdict(settings)
    for name in ("train", "optimiser", "validation", "output", "tensorboard", "result"):
        del told[name]
    for name in type(settings.data).FREE:
        del told["data"][name]
    return {**told, "samples": samples}
