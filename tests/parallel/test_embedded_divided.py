"""The pipeline that comes along, its video shared between processes: the same latents, and the command that does it."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rows
import torch
from processes import Get
from torch import Tensor

import vsparse
from vsparse.measure.embedded import EMBEDDED, embedded_path, embedded_pipeline
from vsparse.parallel.context import parse

CLIP = dc.replace(EMBEDDED, height=64, width=64, frames=5, steps=3)
PROMPT = "a red circle moving right on a dark background"
OPTIONS = {"density": 0.3, "tile": (1, 4, 4), "block": 16}


def _latents(pipe: Any, dtype: torch.dtype, method: str | None, setting: str | None) -> Tensor:
    """What the model predicts in each call of the denoising loop, and the latents that the loop leaves.

    The method chooses its maps anew in every run; the loop itself rounds to float32 between the calls.
    """
    pipe.to(dtype)
    noise = torch.Generator().manual_seed(0)
    call = {
        "prompt_embeds": torch.randn(1, 16, pipe.transformer.config.text_dim, generator=noise).to(dtype),
        "negative_prompt_embeds": torch.zeros(1, 16, pipe.transformer.config.text_dim, dtype=dtype),
        "height": CLIP.height, "width": CLIP.width, "num_frames": CLIP.frames, "num_inference_steps": CLIP.steps,
        "guidance_scale": CLIP.guidance, "output_type": "latent", "generator": torch.Generator().manual_seed(1),
    }  # fmt: skip
    predicted: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        if method is not None:
            parallel = None if setting is None else parse(setting)
            rows.randomise(stack.enter_context(vsparse.apply(pipe, method, parallel=parallel, **OPTIONS)))
        hook = pipe.transformer.register_forward_hook(lambda _, __, output: predicted.append(output[0]))
        stack.callback(hook.remove)
        latents = pipe(**call).frames
    assert len(predicted) == 2 * CLIP.steps
    assert all(x.dtype == dtype for x in predicted)
    return torch.stack([*predicted, latents.to(dtype)])


def _compared(method: str, settings: list[str]) -> dict[str, tuple[float, float]]:
    """The worst distance from one process in units of what float32 makes of the stock pipeline; and dB in float32."""
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    stock = {dtype: _latents(pipe, dtype, None, None).double() for dtype in (torch.float64, torch.float32)}
    allowed = float((stock[torch.float32] - stock[torch.float64]).abs().max())
    assert allowed > 0
    alone = {dtype: _latents(pipe, dtype, method, None) for dtype in (torch.float64, torch.float32)}
    assert float((alone[torch.float64] - stock[torch.float64]).abs().max()) > 1e3 * allowed, "the method drops nothing"
    found = {}
    for setting in settings:
        exact = float((_latents(pipe, torch.float64, method, setting) - alone[torch.float64]).abs().max())
        free = (_latents(pipe, torch.float32, method, setting) - alone[torch.float32]).double()
        peak = float(alone[torch.float32].max() - alone[torch.float32].min())
        found[setting] = exact / allowed, float(10 * torch.log10(peak**2 / free.square().mean()))
    return found


@pytest.mark.slow
def test_the_same_video(pool: Get) -> None:
    """On two and on four processes."""
    found = pool().run(_compared, "vsa", ["ulysses=2", "ring=4"])
    print(found)  # noqa: T201 (of float32, where maps may differ, only a figure is wanted)
    for one in found:
        assert all(ratio <= 1 for ratio, _ in one.values()), f"(float64 gap, float32 PSNR in dB): {found}"


def _generate(target: Path, *before: str) -> subprocess.CompletedProcess[str]:
    size = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "2"]
    command = [
        *before, "-m", "vsparse", "generate", str(embedded_path()), "-p", PROMPT, "-m", "vsa", "-s", "tile=(1,4,4)",
        "-s", "block=16", *size, "--output", str(target), "--context-parallel", "ulysses=2",
    ]  # fmt: skip
    variables = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = _generate(tmp_path / "a.mp4", sys.executable, *start)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert [done.stdout.count(part) for part in ("attention layers", "wrote ", "density over all calls")] == [
        1,
        1,
        1,
    ], done.stdout


def test_the_command_alone_says_what_to_start(tmp_path: Path) -> None:
    done = _generate(tmp_path / "a.mp4", sys.executable)
    assert done.returncode == 2
    assert "takes 2 processes, not 1; start with torchrun --nproc-per-node 2 -m vsparse" in " ".join(
        done.stderr.split()
    )
    assert not list(tmp_path.iterdir())
