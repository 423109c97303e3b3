"""The tiny pipeline that comes with vsparse: a trained, stock WanPipeline for the demo and for looking at real maps."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

from vsparse.optional import require

__all__ = ["EMBEDDED", "Clip", "embedded_path", "embedded_pipeline"]


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
