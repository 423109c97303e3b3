"""The model of a run: loaded, patched, and told what of it learns."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vsparse.measure.pipelines import check_pipeline
from vsparse.methods import Method, get_method
from vsparse.optional import require
from vsparse.parallel.context import ContextParallel
from vsparse.patch import Patch, apply, load
from vsparse.schedule import Schedule
from vsparse.training.draws import Draws
from vsparse.training.ramp import DensityRamp
from vsparse.training.settings import MethodSettings, ModelSettings

__all__ = ["DTYPES", "Student", "load_student", "make_ready"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """A pipeline one of whose transformers learns.

    Args:
        pipe: The pipeline; its encoders are frozen. name: component that learns. transformer: that component.
        patch: Of the transformer, None where the method is "none". added: names of the method's parameters in it.
        low_rank: Whether it learns through LoRA.
    """

    pipe: Any
    name: str
    transformer: nn.Module
    patch: Patch | None
    added: tuple[str, ...]
    low_rank: bool


def load_student(
    model: ModelSettings,
    method: MethodSettings,
    *,
    device: torch.device,
    seed: int,
    parallel: ContextParallel | None = None,
) -> Student:
    """Load a pipeline, patch a transformer and mark what learns: those parameters are float32 and require gradients.

    Args:
        device: Where training will be; the pipeline stays on the CPU. seed: of LoRA's first weights.
        parallel: As of `vsparse.apply`.

    Raises:
        FileNotFoundError, ValueError: no such pipeline, transformer or method; a method that cannot be trained.
    """
    pipe = _load(model, device)
    transformer = getattr(pipe, model.transformer, None)
    if transformer is None:
        raise ValueError(f"model: {model.path} has no {model.transformer}; it has {', '.join(_transformers(pipe))}")
    patch, added = make_ready(transformer, model, method, seed=seed, parallel=parallel)
    return Student(
        pipe=pipe,
        name=model.transformer,
        transformer=transformer,
        patch=patch,
        added=added,
        low_rank=model.train == "lora",
    )


def make_ready(
    transformer: Any,
    model: ModelSettings,
    method: MethodSettings,
    *,
    seed: int,
    parallel: ContextParallel | None = None,
) -> tuple[Patch | None, tuple[str, ...]]:
    """Put LoRA and the method in and mark what learns; the patch, and the names of the method's parameters.

    Raises:
        ValueError: a method that cannot be trained, or nothing to learn.
    """
    transformer.requires_grad_(model.train == "full")
    if model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if model.train == "lora":
        with Draws((seed, "lora")).everything(torch.device("cpu")):
            _add_lora(transformer, model)
    patch = None if method.key == "none" else _patch(transformer, method, parallel)
    mine = [] if patch is None else patch.parameters()
    for parameter in mine:
        parameter.requires_grad_(True)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    ids = {id(parameter) for parameter in mine}
    added = tuple(name for name, parameter in transformer.named_parameters() if id(parameter) in ids)
    if model.train == "method" and not added:
        raise ValueError(f'model: train "method" leaves nothing to learn: {method.key!r} adds no parameters')
    return patch, added


def _load(model: ModelSettings, device: torch.device) -> Any:
    """The pipeline on the CPU; on a GPU whatever is frozen may have half the size."""
    diffusers = require("diffusers", "diffusers")
    require("transformers", "diffusers")
    check_pipeline(model.path)
    frozen = DTYPES[model.frozen] if device.type == "cuda" else torch.float32
    dtypes = {"default": frozen, model.transformer: torch.float32 if model.train == "full" else frozen}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model.path, torch_dtype=dtypes)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"model: {model.path}: no such folder, and not found on the hub ({reason})") from error
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    encoders = [name for name in pipe.components if name.startswith("text_encoder")]
    for name in encoders:
        part = getattr(pipe, name)
        if part is not None:
            part.to(frozen)  # transformers keeps the stored dtype
    return pipe


def _transformers(pipe: Any) -> list[str]:
    return [name for name, part in pipe.components.items() if name.startswith("transformer") and part is not None]


def _add_lora(transformer: Any, model: ModelSettings) -> None:
    peft = require("peft", "lora")
    ends = tuple(f".{target}" for target in model.lora_targets)
    names = [name for name, x in transformer.named_modules() if isinstance(x, nn.Linear) and name.endswith(ends)]
    if not names:
        raise ValueError(f"model: no linear layer of the transformer ends in {', '.join(model.lora_targets)}")
    config = peft.LoraConfig(
        r=model.lora_rank, lora_alpha=model.lora_alpha, target_modules=names, init_lora_weights="gaussian"
    )
    transformer.add_adapter(config)


def _patch(transformer: nn.Module, settings: MethodSettings, parallel: ContextParallel | None) -> Patch:
    """Put the method in, sparse in every training step as far as the ramp allows."""
    method: Method = get_method(settings.key)().replace(**settings.options)
    if "search" in method.exact_phases:
        raise ValueError(
            f"method: {settings.key!r} computes everything in the call that finds its map, and a training step has no "
            "call after it; train with another method, and apply this one to the result"
        )
    schedule = Schedule(dense_layers=settings.dense_layers, ramp=_ramp(method, settings))
    patch = apply(transformer, method, schedule=schedule, parallel=parallel)
    if settings.adapter is not None:
        load(transformer, Path(settings.adapter))
    return patch


def _ramp(method: Method, settings: MethodSettings) -> DensityRamp | None:
    if not settings.dense_steps and not settings.ramp_steps:
        return None
    last = method.call_density()
    assert not isinstance(last, tuple)  # refused with the settings
    return DensityRamp(
        last=last,
        begin=settings.dense_steps,
        steps=settings.ramp_steps,
        stairs=settings.ramp_stairs,
    )
