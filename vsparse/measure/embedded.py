"""The tiny pipeline that comes with vsparse: a trained, stock WanPipeline for the demo and for looking at real maps."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

from vsparse.measure.pipelines import load_pipeline
from vsparse.optional import require

__all__ = ["EMBEDDED", "Clip", "embedded_path", "embedded_pipeline", "opened"]


@dc.dataclass(frozen=True, kw_only=True)
class Clip:
    """What a pipeline is asked for: size in pixels, frames, denoising steps, guidance."""

    height: int
    width: int
    frames: int
    steps: int
    guidance: float


EMBEDDED = Clip(height=128, width=128, frames=9, steps=12, guidance=1.5)
"""The size that the embedded model was trained for: 5 x 16 x 16 = 1 280 tokens."""


def embedded_path() -> Path:
    """Folder of the embedded checkpoint, in the form that diffusers loads."""
    return Path(__file__).resolve().parents[1] / "assets" / "tiny_wan"


def embedded_pipeline() -> Any:
    """The embedded `WanPipeline`, on the CPU in float32, loaded by diffusers without the hub.

    Raises:
        ImportError: diffusers is not installed. FileNotFoundError: this installation lacks the checkpoint.
    """
    path = embedded_path()
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"the embedded checkpoint is missing from this installation: {path}")
    diffusers = require("diffusers", "diffusers")
    require("transformers", "diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(path), local_files_only=True)
    pipe.text_encoder.float()  # transformers keeps the stored bfloat16, diffusers casts to float32
    return pipe


def opened(
    model: str | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    offload: bool = False,
    steps: int | None = None,
) -> tuple[Any, dict[str, Any]]:
    """A pipeline, silent, and the size of video that it is asked for where nothing else is said.

    Args:
        model: As of `load_pipeline`; None: the embedded pipeline, on the CPU. dtype, device, offload: as there.
        steps: Denoising steps of the embedded one; None: `EMBEDDED`'s.

    Raises:
        ValueError, FileNotFoundError, ImportError: as of `load_pipeline`; one of these for the embedded pipeline.
    """
    if model is None:
        if dtype is not None or device is not None or offload:
            raise ValueError(
                "--dtype, --device and --offload go with a MODEL; the embedded pipeline runs in float32 on the CPU"
            )
        clip = EMBEDDED if steps is None else dc.replace(EMBEDDED, steps=steps)
        pipe, size = embedded_pipeline(), dc.asdict(clip)
    else:
        pipe, size = load_pipeline(model, dtype=dtype, device=device, offload=offload), {}
    pipe.set_progress_bar_config(disable=True)
    return pipe, size
