"""Videos on disk: whole or not at all, and refused before any work when they could not be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from vsparse.measure.quality import check_frames
from vsparse.optional import require

__all__ = ["check_folder", "check_output", "read_video", "write_video"]


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Make a folder (and its parents) and prove that files can be written there.

    Raises:
        ValueError: they cannot; the message says why.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"cannot write into {str(path)!r}: it is a file, not a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-"):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into the folder {str(path)!r}: {error.strerror or error}") from error
    return path


def check_output(path: str | os.PathLike[str], suffix: str) -> Path:
    """Refuse an output file that could not be written; call it before the work that would be lost.

    Args:
        path: File to be written; missing parent folders are made. suffix: what it must end in, such as ".mp4".

    Raises:
        ValueError: another suffix, a folder, or a place where nothing can be written.
    """
    target = Path(path)
    if target.suffix.lower() != suffix:
        raise ValueError(f"the output must end in {suffix}, got {str(target)!r}")
    if target.is_dir():
        raise ValueError(f"the output {str(target)!r} is a folder")
    check_folder(target.parent)
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError(f"the output {str(target)!r} exists and is read-only")
    return target


def write_video(path: str | os.PathLike[str], frames: Tensor, *, fps: int = 8, enlarge: int = 1) -> Path:
    """Write an mp4 (H.264, yuv420p) under a temporary name, read it back, then give it its name.

    Args:
        path: Ends in ".mp4". An existing file is replaced only by a whole one.
        frames: Float ``[F, H, W, 3]`` in [0, 1]; height and width times ``enlarge`` must be even.
        fps: Frames per second, at least 1.
        enlarge: Whole factor by which every pixel is repeated, so that tiny videos can be watched.

    Returns:
        The path.

    Raises:
        ValueError: the frames or a number do not fit. RuntimeError: what was written does not read back.
        ImportError: imageio is not installed.
    """
    target = check_output(path, ".mp4")
    check_frames("frames", frames)
    for name, value in (("fps", fps), ("enlarge", enlarge)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    height, width = (n * enlarge for n in frames.shape[1:3])
    if height % 2 or width % 2:
        raise ValueError(f"an mp4 needs even sizes, got {height} x {width} pixels")
    imageio = require("imageio.v3", "cli")
    pixels = (frames.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=".mp4")
    os.close(handle)
    try:
        # macro_block_size=1: the plugin would otherwise rescale to multiples of 16. quality: 0 (worst) to 10.
        options = {"codec": "libx264", "pixelformat": "yuv420p", "quality": 9, "macro_block_size": 1}
        imageio.imwrite(partial, pixels.numpy(), plugin="FFMPEG", fps=fps, **options)
        back = read_video(partial)
        if back.shape != pixels.shape:
            raise RuntimeError(f"{target.name}: wrote frames {tuple(pixels.shape)}, read back {tuple(back.shape)}")
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def read_video(path: str | os.PathLike[str]) -> Tensor:
    """Frames of a video, float32 ``[F, H, W, 3]`` in [0, 1].

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not a video that ffmpeg can read.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no such video: {str(source)!r}")
    imageio = require("imageio.v3", "cli")
    try:
        pixels = imageio.imread(source, plugin="FFMPEG")
    except (OSError, RuntimeError, ValueError, IndexError, StopIteration) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read {str(source)!r} as a video: {reason}") from error
    return torch.from_numpy(pixels).float() / 255
