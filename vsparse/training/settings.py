"""Everything a fine-tuning run is told, section by section."""

from __future__ import annotations

import dataclasses as dc
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vsparse.methods import get_method
from vsparse.training.data.buckets import Bucket, check_buckets
from vsparse.training.loop import TrainSettings
from vsparse.training.optimisers import OptimiserSettings

__all__ = [
    "DataSettings",
    "DistillSettings",
    "MethodSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "Settings",
    "ValidationSettings",
]


@dc.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model and what of it learns.

    Args:
        path: Folder or hub name of a diffusers pipeline: Wan, HunyuanVideo, HunyuanVideo 1.5, CogVideoX.
        train: "full": every parameter of the transformer; "lora": low-rank adapters (PEFT); "method": only what the
            method has added, such as gates and predictors.
        transformer: Which one of a pipeline with two experts (Wan 2.2): "transformer" (high noise) or "transformer_2".
        lora_rank: Rank of the adapters. lora_alpha: their scale is ``lora_alpha / lora_rank``.
        lora_targets: Ends of the names of the linear layers that get an adapter.
        gradient_checkpointing: Recompute activations in the backward: less memory, about a third more time.
        frozen: Precision in which weights that do not learn are kept; those that learn are float32.
    """

    path: str
    train: Literal["full", "lora", "method"] = "full"
    transformer: Literal["transformer", "transformer_2"] = "transformer"
    lora_rank: int = 32
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    gradient_checkpointing: bool = True
    frozen: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        _choice("model", self, ("train", "transformer", "frozen"))
        _least("model", self, {"lora_rank": 1})
        if not self.path:
            raise ValueError("model: path must name a diffusers pipeline, got an empty text")


@dc.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Videos and captions.

    Args:
        source: A folder of videos with captions (``clip.mp4`` beside ``clip.txt``, or a ``metadata.csv`` or ``.jsonl``
            for all), or such a CSV or JSONL file.
        buckets: Sizes; each clip goes to the one that fits it best, and a batch has one size.
        batch: Clips in a micro-batch of one process, or of the processes that share them (``train.context_parallel``).
        cache: Folder for encoded clips and captions; None: ``cache`` in the output folder.
        streaming: Decode and encode in every step instead, without a cache.
        workers: Processes that read or decode.
        empty_captions: Share of captions that are left out, for guidance.
    """

    source: str
    buckets: tuple[Bucket, ...]
    batch: int = 1
    cache: str | None = None
    streaming: bool = False
    workers: int = 2
    empty_captions: float = 0.1

    FREE = ("workers",)

    def __post_init__(self) -> None:
        _least("data", self, {"batch": 1, "workers": 0})
        check_buckets(self.buckets)
        if not 0.0 <= self.empty_captions <= 1.0:
            raise ValueError(f"data: empty_captions must lie in [0, 1], got {self.empty_captions!r}")
        if self.streaming and self.cache is not None:
            raise ValueError("data: streaming uses no cache; give one of the two")


@dc.dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """The sparse attention that is trained in.

    Args:
        key: Registry name (`vsparse methods`); "none": the model as it is, without vsparse.
        options: Fields of the method, e.g. ``{density = 0.25}``.
        dense_layers: How many layers, from the first, stay dense; or a list of their numbers.
        dense_steps: Training steps with everything computed, before the way down. ramp_steps: steps of the way down
            to the method's density. Both need a method with a ``density``.
        ramp_stairs: Equal drops on the way down; None: one for each step.
        adapter: An adapter to start from (`Patch.save`, or FastWan's gates); None: the method's own start.
    """

    key: str = "vsa"
    options: Mapping[str, Any] = dc.field(default_factory=dict)
    dense_layers: int | tuple[int, ...] = 0
    dense_steps: int = 0
    ramp_steps: int = 0
    ramp_stairs: int | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.key == "none":
            if dc.astuple(self)[1:] != dc.astuple(MethodSettings())[1:]:
                raise ValueError('method: key "none" takes no other setting')
            return
        method = get_method(self.key)().replace(**self.options)
        _least("method", self, {"dense_steps": 0, "ramp_steps": 0})
        if (self.dense_steps or self.ramp_steps) and not hasattr(method, "density"):
            raise ValueError(f"method: {self.key!r} has no density that dense_steps and ramp_steps could lower")
        if (self.dense_steps or self.ramp_steps) and isinstance(method.call_density(), tuple):
            raise ValueError(
                f"method: dense_steps and ramp_steps lead to one density, and {self.key!r} is given one for each head"
            )


@dc.dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """The noise levels that are trained; what is predicted (flow, v, noise) follows from the pipeline's scheduler.

    Args:
        times: "uniform" or "logit_normal" before the scheduler's own shift.
        mean, std: Of the normal numbers of "logit_normal".
        shift: Of flow matching, towards noise; None: the scheduler's own.
        stratified: Spread the levels evenly over each micro-batch.
    """

    times: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float | None = None
    stratified: bool = True

    def __post_init__(self) -> None:
        _choice("objective", self, ("times",))
        if not self.std > 0.0:
            raise ValueError(f"objective: std must be positive, got {self.std!r}")


@dc.dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """What else the sparse model is pulled to: itself, dense. Losses are weighted and added.

    Args:
        data: Weight of the loss on the data.
        velocity: Weight of the squared distance to what the dense model predicts.
        attention: Weight of the mean relative squared distance of each site's output to full attention on its inputs.
        consistency: Weight of multi-step consistency distillation, which makes a model of few steps.
        teacher: Weights of the teacher of ``velocity``: "present", the student's own, or "start", those of the first
            step; ``consistency`` always takes the latter.
        keep_start: Where a copy of the first weights is kept if it takes one: "device" or "cpu"; None: none may be made
            (LoRA and a method's own parameters need none).
        segments: Steps of the model that ``consistency`` makes. teacher_steps: of its teacher, from noise to video.
        guidance: Scale of guidance that ``consistency`` distils into the model; 1: none.
        huber: ``c`` of a pseudo-Huber distance in ``consistency``; None: squared.
    """

    data: float = 1.0
    velocity: float = 0.0
    attention: float = 0.0
    consistency: float = 0.0
    teacher: Literal["present", "start"] = "present"
    keep_start: Literal["device", "cpu"] | None = None
    segments: int = 8
    teacher_steps: int = 50
    guidance: float = 1.0
    huber: float | None = None

    def __post_init__(self) -> None:
        _choice("distill", self, ("teacher",))
        _least("distill", self, {"segments": 1, "teacher_steps": 1})
        weights = {name: getattr(self, name) for name in ("data", "velocity", "attention", "consistency")}
        if any(not value >= 0.0 for value in weights.values()) or not any(weights.values()):
            raise ValueError(f"distill: weights must be >= 0 and one of them positive, got {weights}")


@dc.dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Fixed prompts that are generated during training, densely and sparsely, with one seed each.

    Args:
        prompts: Texts; none: no validation.
        height, width: Pixels. frames, steps, guidance: of the videos; None: the pipeline's own default.
        seed: Of the first prompt's noise; the others follow.
        fps: Of the mp4 files.
    """

    prompts: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    fps: int = 8


@dc.dataclass(frozen=True, kw_only=True)
class Settings:
    """A fine-tuning run.

    Args:
        output: Folder of the run: cache, checkpoints, log, validation videos, result.
        model, data, method, objective, distill, optimiser, train, validation: the sections.
        result: What is left at the end, in ``result`` in the output folder. "adapter": what was trained (LoRA weights,
            or after full training the transformer); "pipeline": the whole pipeline as diffusers loads it, LoRA merged
            in. Both with the method's parts in ``vsparse``, for ``vsparse.load``.
        tensorboard: Also write the log for TensorBoard.
    """

    output: str
    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    method: MethodSettings = dc.field(default_factory=MethodSettings)
    objective: ObjectiveSettings = dc.field(default_factory=ObjectiveSettings)
    distill: DistillSettings = dc.field(default_factory=DistillSettings)
    optimiser: OptimiserSettings = dc.field(default_factory=OptimiserSettings)
    validation: ValidationSettings = dc.field(default_factory=ValidationSettings)
    result: Literal["adapter", "pipeline"] = "adapter"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _choice("settings", self, ("result",))
        if self.model.train == "method" and self.method.key == "none":
            raise ValueError('model: train "method" leaves nothing to learn where method.key is "none"')
        if self.method.key == "none" and (self.distill.velocity or self.distill.attention):
            raise ValueError('distill: velocity and attention need a method, and method.key is "none"')
        if self.train.context_parallel and self.method.key == "none":
            raise ValueError('train: context_parallel needs a method that attends; "dense" is one, "none" is not')
        if self.train.context_parallel and self.distill.attention:
            raise ValueError(
                "distill: attention compares the outputs of layers, of which context_parallel leaves each process a "
                "part; distil velocity, or leave context_parallel out"
            )


def _least(section: str, settings: object, lows: Mapping[str, int]) -> None:
    for name, low in lows.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{section}: {name} must be an integer >= {low}, got {value!r}")


def _choice(section: str, settings: object, names: Sequence[str]) -> None:
    """Literal fields hold one of their words."""
    hints = typing.get_type_hints(type(settings))
    for name in names:
        known, value = typing.get_args(hints[name]), getattr(settings, name)
        if value not in known:
            raise ValueError(f"{section}: {name} must be one of {', '.join(known)}, got {value!r}")
