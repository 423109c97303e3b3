"""Tiny pipelines as training takes them: with a caption, without guidance."""

from __future__ import annotations

from typing import Any

import tiny_pipelines
import tiny_text
import torch
from torch import Tensor

CAPTION = 'two dogs run on a beach, a sign says "open"'
FAMILIES = ("wan", "hunyuan_video", "hunyuan_video15", "cogvideox")
UNGUIDED = {"wan": "guidance_scale", "cogvideox": "guidance_scale"}
MEAN, STD = [0.5, -0.25, 0.0, 0.125], [2.0, 0.5, 1.25, 0.75]


def build(family: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline that takes a caption and does not guide, and its call."""
    pipe, call = tiny_pipelines.PIPELINES[family]()
    if family.startswith("hunyuan"):
        getattr(tiny_text, family)(pipe)
        call = {key: value for key, value in call.items() if "prompt" not in key and "cfg" not in key}
    if family == "hunyuan_video15":
        pipe.guider.disable()
    if family == "wan":
        pipe.vae.register_to_config(latents_mean=MEAN, latents_std=STD)
    if family == "hunyuan_video":
        call |= {"height": 32, "width": 32}
    call.pop("negative_prompt", None)
    if family == "wan":
        call.pop("max_sequence_length")
    unguided = {UNGUIDED[family]: 1.0} if family in UNGUIDED else {}
    return pipe, {**call, **unguided, "prompt": CAPTION, "generator": torch.Generator().manual_seed(0)}


def video(family: str, *, batch: int = 1) -> Tensor:
    """Pixels of noise."""
    frames = 9 if family == "hunyuan_video" else 5
    size = (batch, 3, frames, 32, 32)
    return 2 * torch.rand(size, generator=torch.Generator().manual_seed(7)) - 1
