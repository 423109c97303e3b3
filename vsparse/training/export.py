"""What a run leaves: what was trained, or a whole pipeline that diffusers loads with vsparse's part beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vsparse.optional import require
from vsparse.training.files import whole_folder
from vsparse.training.student import Student
from vsparse.wrapping import is_sharded, whole

__all__ = ["ADAPTER", "export"]

ADAPTER = "vsparse"
_OURS = ".vsparse."


def export(student: Student, target: Path, *, kind: Literal["adapter", "pipeline"], accelerator: Any) -> Path:
    """Write the result of a run; every process calls it, and the first one writes.

    Args:
        target: Folder that must not exist yet.
        kind: "adapter": what was trained, to be put onto the pipeline that it was trained on: LoRA weights as diffusers
            stores them, after full training the transformer. "pipeline": the whole pipeline, LoRA merged in. Both hold
            the method's parts in ``vsparse/``, for ``vsparse.load``.

    Raises:
        FileExistsError: the target exists. OSError: the disk is full; nothing is left half written.
    """
    held = student.transformer.state_dict()
    state = whole(held)
    if not accelerator.is_main_process:
        if student.patch is not None and any(map(is_sharded, held.values())):
            student.patch.save(target)  # gathers with the first process, which writes
        accelerator.wait_for_everyone()
        return target
    with whole_folder(target) as scratch:
        if student.patch is not None:
            student.patch.save(scratch / ADAPTER)
        if kind == "pipeline":
            _save_pipeline(student, state, scratch)
        elif student.low_rank:
            _save_lora(student, state, scratch)
        elif any(x.requires_grad for name, x in student.transformer.named_parameters() if _OURS not in name):
            _plain(student, state).save_pretrained(scratch / student.name)
    accelerator.wait_for_everyone()
    return target


def _plain(student: Student, state: Mapping[str, Tensor]) -> Any:
    """The transformer as diffusers would load it: without the patch, LoRA merged in."""
    transformer: Any = student.transformer
    made = type(transformer).from_config(transformer.config)
    mine = {name: x for name, x in state.items() if _OURS not in name}
    if student.low_rank:
        mine = _merged(transformer, mine)
    made.load_state_dict({name: x.to(made.dtype) for name, x in mine.items()})
    return made


def _merged(transformer: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with LoRA's products added to the layers they are around."""
    found = {}
    for name, x in state.items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            module: Any = transformer.get_submodule(layer)
            for adapter in module.active_adapters:
                low, high = (state[f"{layer}.lora_{part}.{adapter}.weight"].double() for part in ("A", "B"))
                x = (x.double() + module.scaling[adapter] * high @ low).to(x.dtype)
        found[name.replace(".base_layer.", ".")] = x
    return found


def _save_lora(student: Student, state: Mapping[str, Tensor], folder: Path) -> None:
    """LoRA weights in the file that the pipeline's ``load_lora_weights`` reads, with their scale."""
    peft = require("peft.utils", "lora")
    model: Any = student.transformer
    layers = peft.get_peft_model_state_dict(model, state_dict=dict(state))
    layers = {name: x.contiguous() for name, x in layers.items() if _OURS not in f".{name}."}
    told = model.peft_config["default"].to_dict()
    told = {name: sorted(x) if isinstance(x, set) else x for name, x in told.items()}
    names = f"{student.name}_lora_layers", f"{student.name}_lora_adapter_metadata"
    type(student.pipe).save_lora_weights(folder, **dict(zip(names, (layers, told), strict=True)))


def _save_pipeline(student: Student, state: Mapping[str, Tensor], folder: Path) -> None:
    """The pipeline with a plain copy of the transformer in its place."""
    pipe = copy.copy(student.pipe)
    pipe.register_modules(**{student.name: _plain(student, state)})
    pipe.save_pretrained(folder)
