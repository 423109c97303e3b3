"""LPIPS, where its networks lie on this machine; nothing is ever downloaded."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from vsparse.optional import require

__all__ = ["LEAST", "lpips", "missing"]

LEAST = 63
"""Pixels in height and width that are left to AlexNet's last pooling."""
_AT_ONCE = 8  # frames


def missing(frames: Tensor) -> str:
    """Why LPIPS cannot be measured here, in words; "" where it can."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision, whose AlexNet it looks through, is not installed"
    weights = importlib.import_module("torchvision.models").AlexNet_Weights.DEFAULT.url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights
    if not path.is_file():
        return f"the weights of its network are not at {path}, and nothing is downloaded"
    if min(frames.shape[1:3]) < LEAST:
        return f"its network needs {LEAST} pixels in height and width, got {frames.shape[1]} x {frames.shape[2]}"
    return ""


def lpips(video: Tensor, reference: Tensor) -> float:
    """Learned perceptual image patch similarity as torchmetrics has it, AlexNet, mean over the frames; 0: equal.

    Args:
        video, reference: Float frames `[F, H, W, 3]` in [0, 1] for which `missing` says nothing.
    """
    image = require("torchmetrics.functional.image", "cli")
    total = 0.0
    for first in range(0, video.shape[0], _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        ours, theirs = (x[part].detach().cpu().float().movedim(-1, 1).clamp(0, 1) for x in (video, reference))
        found = image.learned_perceptual_image_patch_similarity(
            ours, theirs, net_type="alex", reduction="sum", normalize=True
        )
        total += float(found)
    return total / video.shape[0]
