"""The loop: steps that can be repeated to the bit, whenever and wherever the run was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from vsparse.measure.video import check_folder
from vsparse.optional import require
from vsparse.parallel.context import ContextParallel, parse
from vsparse.patch import patch_of
from vsparse.training import checkpoints
from vsparse.training.average import Average
from vsparse.training.diagnosis import NotFiniteError, first_not_finite
from vsparse.training.draws import Draws
from vsparse.training.files import append_line, clear_partial, whole_file
from vsparse.training.optimisers import OptimiserSettings, make_optimisers, set_rates
from vsparse.training.spread import spread

__all__ = ["Task", "TrainSettings", "Trainer", "make_accelerator", "video_of"]

LOG = "log.jsonl"
VALIDATION = "validation/"


@dc.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long and how carefully to train.

    Args:
        steps: Optimiser steps. accumulate: micro-batches for each of them.
        seed: Of everything random in the run; two runs with equal settings are equal (on a GPU as far as its kernels
            repeat themselves).
        precision: "bf16": weights and optimiser in float32, matrix products in bfloat16; "fp32": everything in float32.
        clip_norm: Greatest norm of the gradient; larger ones are scaled down. 0: never.
        average: Decay of a moving average of the weights, e.g. 0.999; it rises to that in the first steps. 0: none.
        save_every: Steps between checkpoints; the last step is always saved. keep: how many checkpoints stay.
        shard: Spread weights, gradients and optimiser over the processes (FSDP2) instead of having all of them
            everywhere (DDP). Also where `accelerate launch` asks for FSDP.
        context_parallel: Processes that share each video, by heads ("ulysses=2"), by tokens ("ring=2", "gather=2") or
            both ("ulysses=2,ring=2"); further ones hold other videos. Empty: none.
        log_every: Steps between lines of the log. validate_every: steps between validations, 0: only at the end.

    Raises:
        ValueError: a value out of range.
    """

    steps: int
    accumulate: int = 1
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    clip_norm: float = 1.0
    average: float = 0.0
    shard: bool = False
    context_parallel: str = ""
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    validate_every: int = 0

    FREE: ClassVar[tuple[str, ...]] = ("save_every", "keep", "log_every", "validate_every")
    """Fields that decide nothing about the result: a resumed run may have other ones."""

    def __post_init__(self) -> None:
        lows = {"steps": 1, "accumulate": 1, "seed": 0, "save_every": 1, "keep": 1, "log_every": 1, "validate_every": 0}
        for name, low in lows.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"train: {name} must be an integer >= {low}, got {value!r}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"train: precision must be bf16 or fp32, got {self.precision!r}")
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"train: average must lie in [0, 1), got {self.average!r}")
        if not self.clip_norm >= 0.0:
            raise ValueError(f"train: clip_norm must be >= 0, got {self.clip_norm!r}")
        if self.context_parallel:
            parse(self.context_parallel)

    @property
    def parallel(self) -> ContextParallel:
        """How videos are shared; the wrapper of the model averages gradients over all processes."""
        found = parse(self.context_parallel) if self.context_parallel else ContextParallel()
        return dc.replace(found, gradients="mean")


def video_of(accelerator: Any, settings: TrainSettings) -> tuple[int, int]:
    """Which of the videos of a step this process works on, and how many there are at once.

    Raises:
        ValueError: as many processes as do not make whole groups.
    """
    each = settings.parallel.size
    if accelerator.num_processes % each:
        raise ValueError(
            f"train: context_parallel={settings.context_parallel!r} takes groups of {each} processes, and there are "
            f"{accelerator.num_processes}"
        )
    return accelerator.process_index // each, accelerator.num_processes // each


def _check_sharing(model: nn.Module, settings: TrainSettings) -> None:
    """Refuse a model whose videos are shared otherwise than its batches are."""
    patch = patch_of(model)
    found = ContextParallel() if patch is None else patch.parallel
    if (found.size, found.size > 1 and found.gradients) != (settings.parallel.size, found.size > 1 and "mean"):
        raise ValueError(
            f"train: context_parallel={settings.context_parallel!r}, but videos are shared by {found}, gradients="
            f"{found.gradients!r}, in the model; vsparse.apply(..., parallel=settings.parallel) shares them alike"
        )


def make_accelerator() -> Any:
    """accelerate's handle on this process and the others, of `accelerate launch` or torchrun; on CPUs, too.

    Precision is the loop's own affair: weights stay as they are, and `torch.autocast` stands around each loss.
    """
    kind = require("accelerate", "diffusers").Accelerator
    return kind(mixed_precision="no", cpu=not torch.accelerator.is_available())


class Task(Protocol):
    """What is trained: where batches come from and what is minimised."""

    def batches(self, first: int, last: int) -> Iterable[Any]:
        """Micro-batches of this process for the steps from ``first`` to before ``last``, in order."""

    def loss(self, model: nn.Module, batch: Any, draws: Draws, step: int) -> Mapping[str, Tensor]:
        """Scalars of one micro-batch; "loss" is minimised, the others are logged."""

    def describe(self, batch: Any) -> str:
        """Names a batch in an error."""


class Trainer:
    """Trains one model on one task.

    Args:
        model: The model with whatever has been put into it; parameters that require gradients learn.
        task: Batches and loss. settings, optimiser: how. folder: where checkpoints and the log go.
        identity: What else decides the result (data, method); checkpoints keep it, and a resumed run compares it.
        added: Names of parameters that the method has added. accelerator: of accelerate; None: one for this process.
        validate: Called with the step and the averaged weights in place; returns figures for the log.
        progressed: Told after each step: how many are done, figures. before_step: told of each 0-based step.
        logged: Told of each line of the log, in the first process.

    Raises:
        ValueError: nothing learns, the folder cannot be written, or the model's videos are shared otherwise than
            ``settings.context_parallel`` says.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        settings: TrainSettings,
        optimiser: OptimiserSettings,
        folder: Path,
        identity: Mapping[str, Any],
        added: Iterable[str] = (),
        accelerator: Any = None,
        validate: Callable[[int], Mapping[str, float]] | None = None,
        progressed: Callable[[int, Mapping[str, float]], None] | None = None,
        before_step: Callable[[int], None] | None = None,
        logged: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.task, self.settings, self.folder = task, settings, check_folder(folder)
        self.accelerator = accelerator or make_accelerator()
        self.validate, self.progressed, self.before_step, self.logged = validate, progressed, before_step, logged
        self._rates = optimiser
        _check_sharing(model, settings)
        self.plain = model
        self.model, self._held = spread(model, self.accelerator, shard=settings.shard)
        self.optimisers = make_optimisers(model.named_parameters(), optimiser, added=tuple(added))
        self.average = Average(self.plain, settings.average)
        self.identity = _plain({"train": _decisive(settings), "optimiser": dc.asdict(optimiser), **identity})
        self._spent = 0.0

    # ---- the run --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from the newest checkpoint in the folder, or from the beginning, to the last step.

        Raises:
            ValueError: the checkpoint belongs to another run. NotFiniteError: loss or gradient is NaN or infinite.
            OSError: a checkpoint could not be written.
        """
        patch = patch_of(self.plain)
        with contextlib.nullcontext() if patch is None else patch.telling():
            self._run()

    def _run(self) -> None:
        settings = self.settings
        first = self._resume()
        missed = bool(first) and self._validates(first) and not self._validated(first)
        self.accelerator.wait_for_everyone()  # all have looked before the first one writes it
        if missed:
            self._validate(first)
        draws = Draws((settings.seed,))
        batches = iter(self.task.batches(first, settings.steps))
        since = time.perf_counter()
        for step in range(first, settings.steps):
            micro = [next(batches) for _ in range(settings.accumulate)]
            figures = self._step(step, micro, draws.of(step))
            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps:
                now = time.perf_counter()
                figures["seconds"], since = (now - since) / min(settings.log_every, done - first), now
                self._log(done, figures)
            if self.progressed is not None:
                self.progressed(done, figures)
            if done % settings.save_every == 0 or done == settings.steps:
                self._save(done)
            if self._validates(done):
                self._validate(done)

    def _validates(self, done: int) -> bool:
        every = self.settings.validate_every
        return self.validate is not None and (done == self.settings.steps or (every > 0 and done % every == 0))

    def _validated(self, done: int) -> bool:
        """Whether the log has the validation after a step: a run may be killed between saving and validating."""
        path = self.folder / LOG
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return any(row["step"] == done and any(name.startswith(VALIDATION) for name in row) for row in rows)

    def _step(self, step: int, micro: list[Any], draws: Draws) -> dict[str, float]:
        """One optimiser step."""
        settings, accelerator = self.settings, self.accelerator
        self.model.train()
        set_rates(self.optimisers, self._rates.factor(step, settings.steps))
        if self.before_step is not None:
            self.before_step(step)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(micro):
            with self._held() if i + 1 < len(micro) else contextlib.nullcontext():
                losses = self._losses(batch, self._of_batch(draws, i), step)
                (losses["loss"] / len(micro)).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach().float() / len(micro)
        learning = [x for x in self.model.parameters() if x.requires_grad]
        norm: Any = nn.utils.clip_grad_norm_(learning, settings.clip_norm or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        figures = {name: float(accelerator.reduce(x, "mean")) for name, x in sums.items()}
        figures |= {"gradient_norm": float(norm), "rate": self._rates.factor(step, settings.steps)}
        if not math.isfinite(figures["loss"]) or not math.isfinite(figures["gradient_norm"]):
            self._stop(step, micro, draws, figures)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.average.update(step)
        return figures

    def _of_batch(self, draws: Draws, micro: int) -> Draws:
        """Draws of one micro-batch by its number in the step, over all processes: as one process would draw them that
        accumulates all. (The 0 says nothing; the embedded checkpoint was drawn with it.)
        """
        video, videos = video_of(self.accelerator, self.settings)
        return draws.of(micro * videos + video, 0)

    def _losses(self, batch: Any, draws: Draws, step: int) -> Mapping[str, Tensor]:
        device = self.accelerator.device
        with (
            draws.of("everything").everything(device),
            torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"),
        ):
            return self.task.loss(self.model, batch, draws, step)

    def _stop(self, step: int, micro: list[Any], draws: Draws, figures: Mapping[str, float]) -> None:
        """Repeat the step to find where it went wrong, and say so; nothing has been changed by it yet."""
        named = [(name, x) for name, x in self.plain.named_parameters() if x.grad is not None]
        gradients = [name for name, x in named if not bool(x.grad.isfinite().all())]  # type: ignore[union-attr]
        where = None
        for i, batch in enumerate(micro):
            again = functools.partial(self._losses, batch, self._of_batch(draws, i), step)
            where = where or first_not_finite(self.plain, again)
        kept = checkpoints.latest(self.folder)
        raise NotFiniteError(
            f"step {step + 1}: loss {figures['loss']}, norm of the gradient {figures['gradient_norm']}. "
            + (f"First values that are not finite: {where}. " if where else "Every layer's output is finite. ")
            + (f"Gradients that are not finite: {', '.join(gradients[:4])}. " if gradients else "")
            + f"Batch: {'; '.join(self.task.describe(batch) for batch in micro)}. "
            + (f"The last good checkpoint is {kept.path}." if kept else "There is no checkpoint yet.")
        )

    # ---- what stays -----------------------------------------------------------------------------------------------

    def _state(self) -> checkpoints.State:
        return checkpoints.State(model=self.plain, optimisers=self.optimisers, average=self.average.tensors)

    def _save(self, done: int) -> None:
        checkpoints.write(self.folder, self._state(), step=done, settings=self.identity, accelerator=self.accelerator)
        if self.accelerator.is_main_process:
            checkpoints.rotate(self.folder, self.settings.keep)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Steps that are done already."""
        found = checkpoints.latest(self.folder)
        if found is not None:
            checkpoints.restore(found, self._state(), settings=self.identity, accelerator=self.accelerator)
        done = found.step if found is not None else 0
        if self.accelerator.is_main_process:
            clear_partial(self.folder)
            _cut_log(self.folder / LOG, done)
        self.accelerator.wait_for_everyone()
        return done

    def _log(self, done: int, figures: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            append_line(self.folder / LOG, json.dumps({"step": done, **figures}))
            if self.logged is not None:
                self.logged(done, figures)

    def _validate(self, done: int) -> None:
        assert self.validate is not None
        training = self.model.training
        self.model.eval()
        with self.average.in_place(), torch.no_grad():
            figures = self.validate(done)
        self.model.train(training)
        self._log(done, {f"{VALIDATION}{name}": value for name, value in figures.items()})


def _cut_log(path: Path, done: int) -> None:
    """Drop lines of steps after the checkpoint: they will be written again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if _step_of(line) <= done]
    with whole_file(path) as scratch:
        scratch.write_text("".join(f"{line}\n" for line in lines))


def _step_of(line: str) -> float:
    """Step of a line of the log; a line that a kill has torn counts as after everything."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _decisive(settings: TrainSettings) -> dict[str, Any]:
    return {name: value for name, value in dc.asdict(settings).items() if name not in TrainSettings.FREE}


def _plain(values: Any) -> Any:
    """As JSON gives it back, so that settings compare equal after a round trip."""
    return json.loads(json.dumps(values))
