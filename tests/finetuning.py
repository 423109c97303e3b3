"""Fine-tuning runs on a tiny pipeline and a handful of clips, here and in the processes of a pool."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny_pipelines
import torch

from vsparse.measure.shapes import draw, training_scenes
from vsparse.measure.video import write_video
from vsparse.training.data.clips import Problem
from vsparse.training.finetune import Told, finetune
from vsparse.training.settings import Settings
from vsparse.training.settings_file import read
from vsparse.training.task import Denoising

VSA = 'key = "vsa"\noptions = {density = 0.5, tile = [1, 4, 4], block = 16}'


def lay(folder: Path) -> Path:
    """A pipeline on disk and five clips of two sizes beside it, one of them broken."""
    pipe, _ = tiny_pipelines.wan()
    pipe.save_pretrained(folder / "model")
    (folder / "videos").mkdir()
    scenes = training_scenes()[::29][:5]
    for i, scene in enumerate(scenes):
        size = 32 if i < 3 else 48
        clip = draw([scene], seed=i, size=size)[0].movedim(0, -1) * 0.5 + 0.5
        write_video(folder / "videos" / f"{i}.mp4", clip)
        (folder / "videos" / f"{i}.txt").write_text(scene.prompt)
    (folder / "videos" / "4.mp4").write_bytes(b"no video")
    return folder


def settings(ground: Path, output: Path, text: str = "", **replace: str) -> Settings:
    """A run of four steps, read from a file as a user would give it; sections can be replaced."""
    sections = {
        "model": f'path = "{ground / "model"}"\ngradient_checkpointing = false',
        "data": f'source = "{ground / "videos"}"\nbatch = 2\nworkers = 0\ncache = "{ground / "cache"}"',
        "train": 'steps = 4\nprecision = "fp32"\nsave_every = 2\nlog_every = 1\naverage = 0.9',
        "method": VSA,
        "optimiser": "learning_rate = 1e-3\nmethod_learning_rate = 1e-2",
        **replace,
    }
    buckets = [f"[[data.buckets]]\nframes = 5\nheight = {n}\nwidth = {n}\n" for n in (32, 48)]
    path = output.with_suffix(".toml")
    parts = [f'output = "{output}"', text, *(f"[{name}]\n{body}" for name, body in sections.items()), *buckets]
    path.write_text("\n".join(parts))
    return read(path)


class Ear(Told):
    """Keeps what it is told; ``stop``: the run is cut off after so many steps."""

    def __init__(self, stop: int | None = None) -> None:
        self.problems: list[Problem] = []
        self.figures: list[dict[str, float]] = []
        self._stop = stop

    def skipped(self, problems: Any) -> None:
        self.problems += problems

    def stepped(self, done: int, figures: Any) -> None:
        self.figures.append(dict(figures))
        if done == self._stop:
            raise KeyboardInterrupt


# ---- in a process of a pool ----------------------------------------------------------------------------------------

_WATCHED: list[tuple[str, list[str]]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
        event == "open" and isinstance(args[1], str) and any(x in args[1] for x in "wax+")
    )
    if changes and _WATCHED:
        path, (folder, found) = str(args[0]), _WATCHED[-1]
        if path.startswith(f"{folder}/") and "/.probe-" not in path:  # whether it can be written to, each may try
            found.append(f"{event} {path}")


@contextlib.contextmanager
def writes(folder: Path) -> Iterator[list[str]]:
    """What this process makes, moves and removes in a folder."""
    if not getattr(sys, "_vsparse_audited", False):  # a hook cannot be taken away
        sys.addaudithook(_audit)
        sys._vsparse_audited = True  # type: ignore[attr-defined]
    _WATCHED.append((str(folder), []))
    try:
        yield _WATCHED[-1][1]
    finally:
        _WATCHED.pop()


def join() -> None:
    """Tell accelerate of the processes of the pool, as a launcher would."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="localhost")


def run(path: str, stop: int | None = None, joined: bool = True) -> dict[str, Any]:
    """A run of a settings file: its ``figures``, the ``batches`` of this process, what it ``wrote``; ``refused``: why
    it was, or None."""
    if joined:
        join()
    batches: list[str] = []
    real = Denoising.loss

    def heard(task: Denoising, model: Any, batch: Any, *rest: Any) -> Any:
        batches.append(batch.name)
        return real(task, model, batch, *rest)

    chosen, ear, refused = read(Path(path)), Ear(stop), None
    Denoising.loss = heard  # type: ignore[method-assign]
    try:
        with writes(Path(chosen.output)) as wrote, contextlib.suppress(KeyboardInterrupt):
            finetune(chosen, told=ear)
    except ValueError as error:
        refused = str(error)
    finally:
        Denoising.loss = real  # type: ignore[method-assign]
    figures = [{name: value for name, value in row.items() if name != "seconds"} for row in ear.figures]
    return {"figures": figures, "batches": batches, "wrote": wrote, "refused": refused}
