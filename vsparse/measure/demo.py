"""The demo: one prompt, one seed, one stock pipeline; dense first, then with every method, and how far each strays."""

from __future__ import annotations

import dataclasses as dc
import datetime
import importlib.metadata
import json
import os
import platform
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsparse.measure.adherence import Adherence, adherence
from vsparse.measure.embedded import Clip
from vsparse.measure.pipelines import generate
from vsparse.measure.quality import Quality, compare
from vsparse.measure.shapes import Scene, parse
from vsparse.measure.sheet import SheetRow, contact_sheet
from vsparse.measure.video import check_folder, write_video
from vsparse.methods import get_method, list_methods
from vsparse.patch import apply

__all__ = ["FLOORS", "Run", "Trial", "device_words", "environment", "run_demo", "trials"]

FPS = 6
ENLARGE = 2


@dc.dataclass(frozen=True, kw_only=True)
class Trial:
    """One thing to try: a method with options, and the name of its row."""

    name: str
    method: str
    options: Mapping[str, Any] = dc.field(default_factory=dict)


# Both compute every pair: what they differ by is what exact arithmetic in another order does to this video.
FLOORS = (
    Trial(name="floor: dense", method="dense"),
    Trial(name="floor: vsa, all blocks", method="vsa", options={"density": 1.0, "tile": (1, 8, 8)}),
)

# Options that suit the embedded model's 5 x 16 x 16 grid; a method without an entry runs with its defaults.
_TRIALS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "vsa": ({"density": 0.5, "tile": (1, 8, 8)}, {"density": 0.25, "tile": (1, 8, 8)}),
    "adaspa": ({"density": 0.25},),
    "vmoba": ({"frames": 1, "patch": (4, 4), "cube": (5, 4, 4), "top_k": (2, 4, 4)},),
    "sta": ({"tile": (1, 4, 4), "block": 16, "window": (3, 3, 3)},),
    "radial": ({"least": 16, "block": 16},),
    "svg": ({"density": 0.3, "block": 16, "sink_frames": 0},),
    "svg2": ({"mass": 0.7, "query_clusters": 20, "key_clusters": 60, "first_iterations": 10},),
    "attention_tile": ({"global_frames": 2, "block": 16},),
    "sla": ({"density": 0.25, "block": 16},),
    "sparge": ({"mass": 0.7, "block": 16},),
    "xattention": ({"mass": 0.7, "stride": 4, "block": 16},),
    "draft": ({"density": 0.25, "tile": (1, 4, 4), "block": 16},),
    "jenga": ({"density": 0.25, "block": 16},),
    "nabla": ({"mass": 0.7, "tile": (1, 4, 4), "block": 16, "window": (3, 1, 1)},),
    "pattern": ({"pattern": "Window(size=(3, 9, 9))", "tile": (1, 4, 4), "block": 16},),
}


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What came of one trial; the first run of a demo is the dense reference, which has no statistics.

    ``shows``: what a program sees in the clip, where the prompt is one that it can judge.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    frames: Tensor
    seconds: float
    stats: Mapping[str, Any] | None = None
    quality: Quality | None = None
    video: Path | None = None
    shows: Adherence | None = None

    @property
    def density(self) -> float:
        """Executed share of valid token pairs over all calls, dense ones included."""
        return 1.0 if self.stats is None else float(self.stats["density"])


def trials(methods: Sequence[str] | None = None) -> list[Trial]:
    """What the demo tries: every registered method that leaves pairs out as it stands, or those named, with options.

    Raises:
        ValueError: a method that does not exist.
    """
    keys = [key for key, kind in list_methods().items() if kind.chooses] if methods is None else list(methods)
    found = []
    for key in keys:
        get_method(key)
        for options in _TRIALS.get(key, ({},)):
            told = [f"{name}={value:g}" for name, value in options.items() if isinstance(value, float)]
            found.append(Trial(name=", ".join([key, *told]), method=key, options=options))
    return found


def run_demo(
    pipe: Any,
    clip: Clip,
    out: str | os.PathLike[str],
    *,
    prompt: str,
    seed: int,
    wanted: Sequence[Trial],
    began: Callable[[str], None],
    stepped: Callable[[], None],
) -> list[Run]:
    """Generate dense, then each trial, with one prompt and seed; write the videos, the contact sheet, ``report.json``.

    Args:
        pipe: The stock pipeline; it is left as it came. clip: size and steps. out: folder.
        wanted: What to try besides dense. began: told the name of each run. stepped: told of each denoising step.

    Returns:
        The runs, dense first.
    """
    folder, scene = check_folder(out), _scene(prompt)

    def once(steps: int, progress: Callable[[], None] | None) -> tuple[Tensor, float]:
        start = time.perf_counter()
        asked = dc.asdict(dc.replace(clip, steps=steps))
        return generate(pipe, prompt=prompt, seed=seed, stepped=progress, **asked), time.perf_counter() - start

    began("warm-up")
    once(1, None)
    began("dense")
    frames, seconds = once(clip.steps, stepped)
    runs = [Run(name="dense", method="", options={}, frames=frames, seconds=seconds)]
    for trial in wanted:
        began(trial.name)
        with apply(pipe, trial.method, **trial.options) as patch:
            frames, seconds = once(clip.steps, stepped)
            stats = patch.stats()
        runs.append(
            Run(
                name=trial.name,
                method=trial.method,
                options=trial.options,
                frames=frames,
                seconds=seconds,
                stats=stats,
                quality=compare(frames, runs[0].frames),
            )
        )
    began("writing")
    for i, run in enumerate(runs):
        video = write_video(folder / _file(run), run.frames, fps=FPS, enlarge=ENLARGE)
        shows = None if scene is None else adherence(run.frames, scene)
        runs[i] = dc.replace(run, video=video, shows=shows)
    rows = [SheetRow(name=run.name, facts=facts(run, clip), frames=run.frames) for run in runs]
    title = f"\u201c{prompt}\u201d, seed {seed}: dense and sparse"
    contact_sheet(folder / "sheet.png", rows, title=title, note=_note(clip), columns=5)
    _write_report(folder / "report.json", pipe, clip, prompt, seed, runs)
    return runs


def facts(run: Run, clip: Clip) -> list[str]:
    """Lines about a run for its row of the contact sheet."""
    seconds = f"{run.seconds:.1f} s"
    seen = [] if run.shows is None else [f"seen: {in_words(run.shows)}"]
    if run.quality is None:
        return ["the stock pipeline", seconds, *seen]
    lines = [f"density {run.density:.3f}, {_dense_steps(run, clip)}", seconds]
    same = "equal to the bit"
    lines.append(same if run.quality.identical else f"PSNR {run.quality.psnr:.1f} dB, SSIM {run.quality.ssim:.3f}")
    lines += seen
    told = [f"{name}={value}" for name, value in run.options.items() if f"{name}={value}" not in run.name]
    trained = ["a trained method, untrained here"] if get_method(run.method).paper.trained else []
    return [*lines, *textwrap.wrap(", ".join(told), 40), *(trained if run.density < 1 else [])]


def in_words(shows: Adherence) -> str:
    """What a program sees in a clip, e.g. "red circle, right, dark, steady"."""
    color, shape, direction, background = shows.seen
    return f"{color} {shape}, {direction}, {background}, {'steady' if shows.coherent else 'unsteady'}"


def _scene(prompt: str) -> Scene | None:
    """The scene of a prompt that the embedded model was trained on; None for other sentences."""
    try:
        return parse(prompt)
    except ValueError:
        return None


def _dense_steps(run: Run, clip: Clip) -> str:
    """How many denoising steps computed everything; the first search of a stateful method is exact, too."""
    calls: Mapping[str, int] = {} if run.stats is None else run.stats["calls"]
    exact = sum(calls.get(phase, 0) for phase in get_method(run.method).exact_phases)
    return f"{round(clip.steps * exact / max(1, sum(calls.values())))} of {clip.steps} steps dense"


def _file(run: Run) -> str:
    plain = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in run.name)
    return "-".join(part for part in plain.split("-") if part) + ".mp4"


def _note(clip: Clip) -> str:
    return (
        f"{clip.frames} frames of {clip.width} \u00d7 {clip.height} pixels, {clip.steps} denoising steps. Density is "
        "the executed share of query-key token pairs, dense steps included. PSNR and SSIM are against the first row: "
        "how much the video changed, not whether it got worse; seen is what a program measures in the clip. Times are "
        "of this tiny model and say nothing about a large one."
    )


def environment() -> dict[str, Any]:
    """What the figures were taken with."""
    packages = {}
    for name in ("torch", "diffusers", "transformers", "triton", "vsparse"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": packages,
    }


def device_words(device: torch.device, where: Mapping[str, Any]) -> str:
    """What computes, in words; ``where``: of `environment`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{where['cpu']}, {where['threads']} threads"


def _cpu() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _write_report(path: Path, pipe: Any, clip: Clip, prompt: str, seed: int, runs: Sequence[Run]) -> None:
    rows = [
        {
            "name": run.name,
            "method": run.method or None,
            "options": dict(run.options),
            "seconds": round(run.seconds, 3),
            "quality": None if run.quality is None else run.quality.as_json(),
            "shows": None if run.shows is None else dc.asdict(run.shows),
            "stats": run.stats,
            "video": run.video.name if run.video is not None else None,
        }
        for run in runs
    ]
    report = {
        "pipeline": type(pipe).__name__,
        "prompt": prompt,
        "seed": seed,
        "clip": dc.asdict(clip),
        "environment": environment(),
        "runs": rows,
    }
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, path)
