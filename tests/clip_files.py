"""Small videos whose frames can be told apart, and ways to break them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from torch import Tensor

from vsparse.measure.video import write_video

FIRST, STEP = 16, 8  # frame k is an even grey of FIRST + STEP * k; further apart than any codec errs
MOST = (255 - FIRST) // STEP


def write_numbered(path: Path, frames: int, *, height: int = 16, width: int = 16, fps: int = 8) -> Path:
    """Write a video whose frame k shows the number k."""
    assert frames <= MOST
    levels = (FIRST + STEP * torch.arange(frames)) / 255
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, levels[:, None, None, None].expand(-1, height, width, 3), fps=fps)


def numbers(video: Tensor) -> list[int]:
    """Which frames a decoded video shows: uint8 ``[F, h, w, 3]``, or float ``[3, F, H, W]`` in [-1, 1]."""
    levels = video.float().mean((1, 2, 3)) if video.dtype == torch.uint8 else (video.mean((0, 2, 3)) + 1) * 127.5
    return [round((float(level) - FIRST) / STEP) for level in levels]


def ffmpeg(*arguments: str | Path) -> None:
    """Run the ffmpeg that imageio brings."""
    import imageio_ffmpeg

    program = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([program, "-y", "-loglevel", "error", *map(str, arguments)], check=True)


def damage(path: Path, target: Path) -> Path:
    """Copy a video with zeros over the last third of its pictures; its header stays whole."""
    content = bytearray(path.read_bytes())
    pictures = content.index(b"mdat")
    end = content.index(b"moov") if content.index(b"moov") > pictures else len(content)
    start = pictures + (end - pictures) * 2 // 3
    content[start : end - 8] = bytes(end - 8 - start)
    target.write_bytes(content)
    return target
