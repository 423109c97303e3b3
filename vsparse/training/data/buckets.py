"""Buckets: the few sizes that clips are brought to, so that those of one bucket fit into one batch."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Bucket", "check_buckets", "choose_bucket", "fit_frames", "source_frames"]


@dc.dataclass(frozen=True, kw_only=True)
class Bucket:
    """One size of training video, in pixels as the VAE takes them.

    Args:
        frames, height, width: Each at least 1. fps: frames per second; None: as in the clip.

    Raises:
        ValueError: a value out of range.
    """

    frames: int
    height: int
    width: int
    fps: float | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"bucket: {name} must be an integer >= 1, got {value!r}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"bucket: fps must be a finite number > 0 or None, got {self.fps!r}")
        if self.fps is not None:
            object.__setattr__(self, "fps", float(self.fps))  # 16 and 16.0 are written down alike


def check_buckets(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The buckets as a tuple.

    Raises:
        ValueError: there are none, or one stands there twice.
    """
    if not buckets:
        raise ValueError("buckets: at least one is needed, got none")
    if len(set(buckets)) < len(buckets):
        raise ValueError(f"buckets: each may stand there once, got {list(buckets)}")
    return tuple(buckets)


def source_frames(bucket: Bucket, *, fps: float, start: int = 0) -> tuple[int, ...]:
    """Which frames of a clip fill a bucket: those nearest in time, the later of two that are equally near.

    A clip slower than the bucket gives frames more than once; nothing is interpolated.

    Args:
        bucket: The size. fps: of the clip, on average. start: first frame, 0-based.

    Returns:
        ``bucket.frames`` ascending frame numbers, the first of them ``start``.
    """
    ratio = 1.0 if bucket.fps is None else fps / bucket.fps
    return tuple(start + math.floor(i * ratio + 0.5) for i in range(bucket.frames))


def choose_bucket(buckets: Sequence[Bucket], *, frames: int, fps: float, height: int, width: int) -> Bucket | None:
    """The bucket for a clip, among those that it is long enough to fill.

    Closest aspect ratio first (as a factor, so that 2:1 is as far from 1:1 as 1:2 is), then most frames, then closest
    area, then the order of ``buckets``.

    Args:
        buckets: To choose from. frames, fps, height, width: of the clip.

    Returns:
        The bucket; None where the clip is too short for each.
    """

    def distance(bucket: Bucket) -> tuple[float, int, float]:
        aspect = math.log((width / height) / (bucket.width / bucket.height))
        area = math.log((width * height) / (bucket.width * bucket.height))
        return abs(aspect), -bucket.frames, abs(area)

    fillable = [bucket for bucket in buckets if source_frames(bucket, fps=fps)[-1] < frames]
    return min(fillable, key=distance, default=None)


def fit_frames(frames: Tensor, bucket: Bucket) -> Tensor:
    """Scale frames until they cover a bucket (antialiased bilinear) and cut out the middle.

    Args:
        frames: uint8 ``[F, h, w, 3]``. bucket: its height and width are used.

    Returns:
        float32 ``[3, F, H, W]`` in [-1, 1].

    Raises:
        ValueError: frames of another shape or dtype.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3:
        raise ValueError(f"fit_frames: frames must be uint8 [F, h, w, 3], got {frames.dtype} {tuple(frames.shape)}")
    count, height, width, _ = frames.shape
    scale = max(bucket.height / height, bucket.width / width)
    size = max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))
    top, left = (size[0] - bucket.height) // 2, (size[1] - bucket.width) // 2
    video = torch.empty(3, count, bucket.height, bucket.width)
    for i, frame in enumerate(frames):  # one at a time: a clip of large frames in float32 would fill the memory
        image = frame.permute(2, 0, 1)[None].float()
        if size != (height, width):
            image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
        video[:, i] = image[0, :, top : top + bucket.height, left : left + bucket.width]
    return video.div_(127.5).sub_(1.0).clamp_(-1.0, 1.0)
