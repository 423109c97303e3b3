"""How far one clip lies from its dense twin, in every figure that needs no judge."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vsparse.measure.adherence import Adherence, adherence
from vsparse.measure.fidelity.perceptual import lpips, missing
from vsparse.measure.paired import Clip, latent_errors
from vsparse.measure.quality import check_frames, compare
from vsparse.measure.shapes import Scene, parse

__all__ = ["FIGURES", "Distance", "Figure", "consistency", "distance", "scene_of", "seen_in"]


@dc.dataclass(frozen=True, kw_only=True)
class Figure:
    """How a figure is named and printed, and the least and the most that it can be."""

    label: str
    form: str
    least: float = -math.inf
    most: float = math.inf


FIGURES: Mapping[str, Figure] = {
    "psnr": Figure(label="PSNR, dB", form=".1f"),
    "worst_psnr": Figure(label="PSNR, worst frame", form=".1f"),
    "ssim": Figure(label="SSIM", form=".4f", least=-1, most=1),
    "worst_ssim": Figure(label="SSIM, worst frame", form=".4f", least=-1, most=1),
    "temporal": Figure(label="temporal consistency", form=".4f", least=-1, most=1),
    "motion": Figure(label="motion, times dense", form=".3f", least=0),
    "lpips": Figure(label="LPIPS", form=".4f", least=0),
    "latents": Figure(label="latents, last step", form=".3g", least=0),
}
"""Every figure against the dense clip, in the order of the tables."""


@dc.dataclass(frozen=True, kw_only=True)
class Distance:
    """A clip against its dense twin of the same prompt and seed.

    Args:
        psnr, ssim, worst_psnr, worst_ssim: As of `vsparse.measure.quality.Quality`.
        temporal: `consistency`; None for one frame.
        motion: ``||d|| / ||r||`` with d and r as there: 1, as much change from frame to frame as in the dense clip;
            more where it flickers, less where it freezes. None for one frame, or where the dense clip never changes.
        lpips: Mean over the frames; None where its weights are not there.
        steps: Relative error of the latents after each denoising step, as of `latent_errors`; empty where none is.
        without: Figure -> why it is None, in words.
    """

    psnr: float
    ssim: float
    worst_psnr: float
    worst_ssim: float
    temporal: float | None
    motion: float | None
    lpips: float | None
    steps: tuple[float, ...]
    without: Mapping[str, str]

    @property
    def latents(self) -> float | None:
        """Error after the last step."""
        return self.steps[-1] if self.steps else None

    def as_json(self) -> dict[str, Any]:
        """Plain values; infinity, which JSON has no number for, as "inf"."""
        told = {name: "inf" if value == math.inf else value for name, value in dc.asdict(self).items()}
        return {**told, "steps": ["inf" if x == math.inf else x for x in self.steps], "without": dict(self.without)}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Distance:
        """What `as_json` told."""
        values: dict[str, Any] = {name: math.inf if value == "inf" else value for name, value in told.items()}
        values["steps"] = tuple(float(x) for x in told["steps"])
        return cls(**values)


def distance(clip: Clip, reference: Clip) -> Distance:
    """Measure a clip against the dense one.

    Raises:
        ValueError: frames of different shapes, or as of `vsparse.measure.quality.compare`. ImportError: torchmetrics is
            not installed.
    """
    quality = compare(clip.frames, reference.frames)
    without: dict[str, str] = {}
    temporal, motion = consistency(clip.frames, reference.frames)
    if temporal is None:
        without["temporal"] = without["motion"] = "one frame: nothing changes from frame to frame"
    elif motion is None:
        without["motion"] = "the dense clip never changes from frame to frame"
    perceived = None
    if why := missing(clip.frames):
        without["lpips"] = why
    else:
        perceived = lpips(clip.frames, reference.frames)
    steps: list[float] = []
    if clip.latents and reference.latents:
        steps = latent_errors(clip, reference)
    else:
        without["latents"] = clip.without_latents or reference.without_latents or "no latents were kept"
    return Distance(
        psnr=quality.psnr,
        ssim=quality.ssim,
        worst_psnr=quality.worst_psnr,
        worst_ssim=quality.worst_ssim,
        temporal=temporal,
        motion=motion,
        lpips=perceived,
        steps=tuple(steps),
        without=without,
    )


def consistency(video: Tensor, reference: Tensor) -> tuple[float | None, float | None]:
    """Whether a video changes from frame to frame as the reference does; no network, no optical flow.

    With d and r the differences of consecutive frames of video and reference, over all pixels and colours:

        consistency = 2 <d, r> / (||d||^2 + ||r||^2)        size = ||d|| / ||r||

    Consistency is 1 when every change is the same, 0 when only one of them changes or the changes have nothing in
    common, -1 when they are opposite; what stands still in both does not count. Two videos that never change are 1.

    Args:
        video, reference: Float frames `[F, H, W, 3]` in [0, 1] of one shape.

    Returns:
        Consistency and size. Both are None for one frame; the size is None where the reference never changes.
    """
    check_frames("video", video)
    check_frames("reference", reference)
    if video.shape != reference.shape:
        raise ValueError(f"video {tuple(video.shape)} and reference {tuple(reference.shape)} must have one shape")
    if video.shape[0] < 2:
        return None, None
    d, r = (x.detach().cpu().double().diff(dim=0) for x in (video, reference))
    ours, theirs = float(d.square().sum()), float(r.square().sum())
    if not ours + theirs:
        return 1.0, None
    return 2.0 * float((d * r).sum()) / (ours + theirs), math.sqrt(ours / theirs) if theirs else None


def scene_of(prompt: str) -> Scene | None:
    """The scene that a program can look for in a clip; None for sentences that the embedded model does not know."""
    try:
        return parse(prompt)
    except ValueError:
        return None


def seen_in(frames: Tensor, prompt: str) -> Adherence | None:
    """What a program sees in a clip, where the prompt is one that it can judge and the clip is large enough for it."""
    scene = scene_of(prompt)
    if scene is None or frames.shape[0] < 2 or min(frames.shape[1:3]) < 16:
        return None
    return adherence(frames, scene)
