"""One generation as a value, with the latents of each denoising step, and how far it strays from another one."""

from __future__ import annotations

import dataclasses as dc
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vsparse.measure.pipelines import generate

__all__ = ["Clip", "clip_of", "latent_errors"]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """What a pipeline made of one prompt and one seed.

    Args:
        frames: Float32 `[F, H, W, 3]` in [0, 1], on the CPU.
        latents: What the pipeline held at the end of each denoising step, float32 on the CPU, in its own shape; empty
            where it tells none.
        without_latents: Why there are none, in words; "" where there are some.
    """

    frames: Tensor
    latents: tuple[Tensor, ...] = ()
    without_latents: str = ""


def clip_of(pipe: Any, asked: Mapping[str, Any], *, stepped: Callable[[], None] | None = None) -> Clip:
    """Generate one clip.

    Args:
        pipe: A diffusers video pipeline, patched or not. asked: the arguments of `generate`, such as prompt, seed,
            height, width, frames, steps. stepped: called at the end of each denoising step.

    Returns:
        Frames and latents. A pipeline that does not tell its latents gives none, and the reason.

    Raises:
        ValueError, ImportError: as of `generate`.
    """
    held: list[Tensor] = []

    def keep(latents: Tensor) -> None:
        # Copied at once: some schedulers and pipelines go on in the same memory.
        held.append(latents.detach().to("cpu", torch.float32, copy=True))

    frames = generate(pipe, **asked, stepped=stepped, given_latents=keep)
    name = type(pipe).__name__
    reason = ""
    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        reason = f"{name} takes no callback_on_step_end, so its latents cannot be seen"
    elif not held:
        reason = f"{name} told no latents at the end of its steps"
    return Clip(frames=frames, latents=tuple(held), without_latents=reason)


def latent_errors(clip: Clip, reference: Clip) -> list[float]:
    """How far the latents of a clip lie from those of a reference after each denoising step.

    Of step s: `||x_s - y_s|| / ||y_s||`, x the clip's latents, y the reference's, the Euclidean norm over all numbers
    of the step, in float64. 0: equal; infinite where the reference is zero and the clip is not.

    Args:
        clip, reference: Two clips of one prompt, seed, size and number of steps.

    Raises:
        ValueError: one of them has no latents, or they do not have the same steps and shapes.
    """
    for name, one in (("clip", clip), ("reference", reference)):
        if not one.latents:
            raise ValueError(f"the {name} has no latents: {one.without_latents or 'none were given'}")
    ours, theirs = ([tuple(x.shape) for x in one.latents] for one in (clip, reference))
    if ours != theirs:
        raise ValueError(
            f"clip and reference must have the same steps and shapes of latents, got {len(ours)} steps of {ours[0]} "
            f"and {len(theirs)} steps of {theirs[0]}"
        )
    return [_relative(x.double(), y.double()) for x, y in zip(clip.latents, reference.latents, strict=True)]


def _relative(x: Tensor, y: Tensor) -> float:
    error, size = float((x - y).norm()), float(y.norm())
    return error / size if size else (math.inf if error else 0.0)
