"""Loading a diffusers pipeline and asking it for one video."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsparse.measure.video import check_output
from vsparse.optional import require

__all__ = ["check_pipeline", "generate", "load_pipeline", "outputs", "placed"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def outputs(path: str | os.PathLike[str], count: int) -> list[Path]:
    """The files of ``count`` videos, checked to be writable: the path itself, or numbered from 1.

    Raises:
        ValueError: one of them could not be written.
    """
    target = check_output(path, ".mp4")
    if count == 1:
        return [target]
    return [check_output(target.with_stem(f"{target.stem}-{i}"), ".mp4") for i in range(1, count + 1)]


def load_pipeline(model: str, *, dtype: str | None = None, device: str | None = None, offload: bool = False) -> Any:
    """A diffusers pipeline from a folder or the hub, on its device.

    Args:
        model: Folder or hub name. dtype: "float32", "bfloat16" or "float16"; None: bfloat16 on CUDA, else float32.
        device: As torch spells it; None: CUDA where there is one. offload: keep idle parts in CPU memory.

    Raises:
        ValueError: an unknown dtype or device. FileNotFoundError: no such pipeline. ImportError: diffusers is missing.
    """
    diffusers = require("diffusers", "diffusers")
    require("transformers", "diffusers")
    target, chosen = placed(dtype, device)
    if offload and target.type == "cpu":
        raise ValueError("offload keeps idle parts in CPU memory while a GPU computes; here the CPU computes")
    check_pipeline(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipe = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=chosen)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{model}: no such folder, and not found on the hub ({reason})") from error
    if offload:
        pipe.enable_model_cpu_offload(device=target)
        return pipe
    return pipe.to(target)


def placed(dtype: str | None, device: str | None) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype that are meant, as of `load_pipeline`."""
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    target = _device(device)
    return target, _DTYPES[dtype] if dtype else torch.bfloat16 if target.type == "cuda" else torch.float32


def check_pipeline(model: str) -> None:
    """Refuse a folder that holds no diffusers pipeline; a name of the hub passes.

    Raises:
        ValueError: a folder without ``model_index.json``.
    """
    if Path(model).exists() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{model}: no model_index.json in there, so it is no diffusers pipeline")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is none that torch knows, such as cpu or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch sees no NVIDIA GPU here")
    return device


def generate(
    pipe: Any,
    *,
    prompt: str,
    seed: int,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    image: str | os.PathLike[str] | None = None,
    stepped: Callable[[], None] | None = None,
    given_latents: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """One video of a pipeline.

    Args:
        pipe: A diffusers video pipeline. prompt, negative_prompt: texts.
        seed: Of the noise, drawn on the CPU, so that it is the same on every device.
        height, width: Pixels. frames, steps, guidance: of the video; None: the pipeline's own default.
        image: File of the first frame, for image-to-video pipelines.
        stepped: Called at the end of each denoising step. given_latents: Called then with the latents, as the pipeline
            holds them, where it tells them.

    Returns:
        Float32 frames ``[F, H, W, 3]`` in [0, 1], on the CPU.

    Raises:
        ValueError: the pipeline has no such argument, or needs one that was not given. ImportError: some pipelines
            cannot read a prompt without ftfy.
    """
    asked: dict[str, Any] = {
        "prompt": prompt,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative_prompt,
        "image": None if image is None else require("diffusers.utils", "diffusers").load_image(os.fspath(image)),
    }
    accepted = inspect.signature(type(pipe).__call__).parameters
    given = {name: value for name, value in asked.items() if value is not None}
    unknown = [name for name in given if name not in accepted]
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    missing = [x.name for x in accepted.values() if x.default is x.empty and x.name not in (*given, "self")]
    if missing:
        raise ValueError(f"{type(pipe).__name__} makes no video without: {', '.join(missing)}")
    if (stepped is not None or given_latents is not None) and "callback_on_step_end" in accepted:
        given["callback_on_step_end"] = _at_step_end(stepped, given_latents)
    try:
        output = pipe(generator=torch.Generator("cpu").manual_seed(seed), output_type="np", **given)
    except NameError as error:
        if error.name != "ftfy":
            raise
        raise ImportError(f"{type(pipe).__name__} of this diffusers needs ftfy: pip install ftfy") from error
    return torch.as_tensor(output.frames[0]).float().clamp(0, 1)


def _at_step_end(
    stepped: Callable[[], None] | None, given_latents: Callable[[Tensor], None] | None
) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    def at_step_end(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if stepped is not None:
            stepped()
        if given_latents is not None and "latents" in values:
            given_latents(values["latents"])
        return values

    return at_step_end
