"""How far a video lies from a reference: PSNR and SSIM, as torchmetrics defines them."""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from torch import Tensor

from vsparse.optional import require

__all__ = ["Quality", "check_frames", "compare"]

SSIM_WINDOW = 11


@dc.dataclass(frozen=True, kw_only=True)
class Quality:
    """Distance of a video from a reference of the same prompt and seed.

    These say how much the *picture* changed, not whether it got worse: a sparse run may give another, equally good
    video. Two exact attention kernels already differ after many steps, so read them next to that floor, and only
    compare figures of the same model, size, steps and prompt.

    Args:
        psnr: Peak signal-to-noise ratio in dB of the whole clip (one mean squared error over all frames); infinite
            when both are equal to the bit.
        ssim: Structural similarity, mean over the frames; 1 when equal.
        worst_psnr, worst_ssim: Of the worst frame.
    """

    psnr: float
    ssim: float
    worst_psnr: float
    worst_ssim: float

    @property
    def identical(self) -> bool:
        """Whether the videos are equal to the bit."""
        return math.isinf(self.psnr)

    def as_json(self) -> dict[str, float | bool | None]:
        """Figures for a JSON report; an infinite PSNR, which JSON cannot hold, becomes None."""
        values = {name: value if math.isfinite(value) else None for name, value in dc.asdict(self).items()}
        return {**values, "identical": self.identical}


def check_frames(name: str, frames: Tensor) -> None:
    """Refuse anything but float frames ``[F, H, W, 3]`` in [0, 1]."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.dtype.is_floating_point or frames.shape[0] < 1:
        raise ValueError(f"{name} must be float frames [F, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    low, high = (float(x) for x in torch.aminmax(frames))
    if not (low >= -1e-6 and high <= 1.0 + 1e-6):
        raise ValueError(f"{name} must lie in [0, 1] and hold no NaN, got values from {low} to {high}")


def compare(video: Tensor, reference: Tensor) -> Quality:
    """PSNR and SSIM of a video against a reference.

    Args:
        video, reference: Float frames ``[F, H, W, 3]`` in [0, 1], at least 11 pixels high and wide (SSIM's Gaussian
            window; sigma 1.5, constants 0.01 and 0.03).

    Raises:
        ValueError: shapes, dtypes or ranges do not fit. ImportError: torchmetrics is not installed.
    """
    check_frames("video", video)
    check_frames("reference", reference)
    if video.shape != reference.shape:
        raise ValueError(f"video {tuple(video.shape)} and reference {tuple(reference.shape)} must have one shape")
    if min(video.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs at least {SSIM_WINDOW} pixels in height and width, got {tuple(video.shape)}")
    image = require("torchmetrics.functional.image", "cli")
    ours, theirs = (x.detach().to("cpu", torch.float64).movedim(-1, 1).contiguous() for x in (video, reference))
    options = {"data_range": 1.0}
    frames = [float(image.peak_signal_noise_ratio(a, b, **options)) for a, b in zip(ours, theirs, strict=True)]
    similar = image.structural_similarity_index_measure(ours, theirs, reduction="none", **options)
    return Quality(
        psnr=float(image.peak_signal_noise_ratio(ours, theirs, **options)),
        ssim=float(similar.mean()),
        worst_psnr=min(frames),
        worst_ssim=float(similar.min()),
    )
