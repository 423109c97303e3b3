"""Decoding with decord: the frames that a bucket asks for, or a reason in words.

Four habits of decord 0.6 decide how it is used here:

- After a seek it gives other frames of some files, without an error (HEVC with open groups of pictures, MPEG-4 in
  avi, clips that were cut without being encoded anew). Nothing is sought: a clip is decoded from its beginning. Cut
  long videos into clips.
- It reads ahead in a thread of its own, so whether damage behind the last frame asked for is noticed is chance. `probe`
  decodes the whole file, so that it is sound or not; `read_clip` is for files that were probed.
- It puts repeated frames in the place of missing ones; it is told to raise instead. What the codec itself conceals
  within a frame remains unseen.
- It counts frames that are hidden because they lie before the cut. Their times are negative; they are left out.

A reader never outlives a call, so none is alive in a process that forks between two calls.
"""

from __future__ import annotations

import dataclasses as dc
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsparse.optional import require
from vsparse.training.data.buckets import Bucket, choose_bucket, source_frames

__all__ = ["ClipError", "Probe", "bucket_for", "probe", "read_all", "read_clip"]

_NO_REPEATS = 1e-6  # the share of frames put in for missing ones above which decord raises; 0 would let them pass
_NO_VIDEO = "decord cannot open it: cut off, damaged, no video, or of a kind that it does not read (AV1, GIF)"
_UNKNOWN_TIME = -1e9  # seconds; what decord gives for frames without a time lies far below


class ClipError(ValueError):
    """A clip that cannot be used. ``reason`` is the message without the file."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(str(path), reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.reason}"


@dc.dataclass(frozen=True, kw_only=True)
class Probe:
    """What a video file holds.

    Args:
        frames: Frames that are shown, at least 1. fps: on average. height, width: in pixels, as shown (after rotation).
    """

    frames: int
    fps: float
    height: int
    width: int


def probe(path: str | os.PathLike[str]) -> Probe:
    """Decode a video from its beginning to its end and say what it holds.

    Raises:
        ClipError: no such file, no video, no frames, or damaged anywhere. ImportError: decord is missing.
    """
    reader = _Reader(path)
    height = width = 0
    for frame in reader.frames(reader.count):
        height, width, _ = frame.shape
    return Probe(frames=reader.count, fps=reader.fps, height=height, width=width)


def read_clip(path: str | os.PathLike[str], bucket: Bucket, *, start: int) -> Tensor:
    """Decode the frames that fill a bucket, in the size of the file.

    Args:
        path: Of a video that `probe` found sound. bucket: how many frames at what rate. start: first frame, 0-based.

    Returns:
        uint8 ``[F, h, w, 3]``.

    Raises:
        ClipError: no such file, no video, too short, or damaged before the last frame that is needed.
        ValueError: a negative start. ImportError: decord is missing.
    """
    if start < 0:
        raise ValueError(f"read_clip: start must be >= 0, got {start}")
    reader = _Reader(path)
    wanted = source_frames(bucket, fps=reader.fps, start=start)
    if wanted[-1] >= reader.count:
        raise ClipError(path, f"too short: frame {wanted[-1]} is needed, it has {reader.count}")
    found = {i: frame.clone() for i, frame in enumerate(reader.frames(wanted[-1] + 1)) if i in set(wanted)}
    return torch.stack([found[i] for i in wanted])


def read_all(path: str | os.PathLike[str]) -> Tensor:
    """Decode every frame of a video.

    Returns:
        uint8 ``[F, h, w, 3]``, at least one frame.

    Raises:
        ClipError: no such file, no video, no frames, or damaged anywhere. ImportError: decord is missing.
    """
    reader = _Reader(path)
    return torch.stack([frame.clone() for frame in reader.frames(reader.count)])


def bucket_for(path: str | os.PathLike[str], buckets: Sequence[Bucket]) -> tuple[Bucket, Probe]:
    """Probe a clip and choose its bucket.

    Raises:
        ClipError: as `probe` does, or the clip is too short for each bucket.
    """
    probed = probe(path)
    bucket = choose_bucket(buckets, frames=probed.frames, fps=probed.fps, height=probed.height, width=probed.width)
    if bucket is None:
        least = min(source_frames(bucket, fps=probed.fps)[-1] + 1 for bucket in buckets)
        raise ClipError(path, f"too short: {probed.frames} frames, the shortest bucket needs {least}")
    return bucket, probed


class _Reader:
    """An open video: ``count`` frames that are shown, at ``fps`` on average."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._decord = Path(path), require("decord", "train")
        # RuntimeError and AssertionError: what its Python side raises. ValueError: a name that is no UTF-8.
        self._errors = (self._decord.DECORDError, self._decord.DECORDLimitReachedError, RuntimeError, AssertionError)
        if not self.path.is_file():
            raise ClipError(path, "no such file")
        if not self.path.stat().st_size:
            raise ClipError(path, "the file is empty")
        try:
            self._video: Any = self._decord.VideoReader(str(path), num_threads=1, fault_tol=_NO_REPEATS)
            times = self._video.get_frame_timestamp(range(len(self._video)))[:, 0]
            self.fps = float(self._video.get_avg_fps())
        except (*self._errors, ValueError) as error:
            raise ClipError(path, _NO_VIDEO) from error
        self.count = len(self._video) - int(((times < 0) & (times > _UNKNOWN_TIME)).sum())
        if self.count < 1:
            raise ClipError(path, "it has no frame that is shown")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ClipError(path, f"its frame rate is {self.fps}")

    def frames(self, count: int) -> Iterator[Tensor]:
        """The first ``count`` frames, uint8 ``[h, w, 3]``; each is valid until the next is taken."""
        for _ in range(count):
            try:
                with self._decord.bridge.use_torch():
                    frame = self._video.next()
            except (*self._errors, StopIteration) as error:
                # Which frame fails, and with which words of decord, is chance: one reason for all.
                raise ClipError(self.path, "it cannot be decoded to its end: damaged") from error
            # Where rows are padded to a multiple of their width, decord takes the padding for further channels.
            height, width, _ = frame.shape
            yield frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
