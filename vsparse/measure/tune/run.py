"""What ``vsparse tune`` does: candidates, clips, search, verification, files."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vsparse.measure.demo import device_words, environment
from vsparse.measure.recall_report import as_json, write_text
from vsparse.measure.shapes import held_out, training_scenes
from vsparse.measure.tune.ledger import Ledger
from vsparse.measure.tune.page import page
from vsparse.measure.tune.result import Result, model_of
from vsparse.measure.tune.search import DENSE_STEPS, Search, Target
from vsparse.measure.tune.trials import Scene, Trials
from vsparse.measure.tune.verify import verify
from vsparse.methods import Method, get_method
from vsparse.profile import Size

__all__ = ["LEDGER", "candidates", "embedded_clips", "split", "tune", "write"]

LEDGER = "search.json"
UNSEEN_SEEDS = 100

_USUAL: Mapping[str, Mapping[str, Any]] = {
    "adaspa": {"head_adaptive": False},
    "sparge": {"select": "density"},
    "draft": {},
    "jenga": {"mass": 0.01},  # its other budget would hide the density
}
# The grid of 5 x 16 x 16 then has 80 blocks, enough to choose among.
_SMALL: Mapping[str, Mapping[str, Any]] = {
    "adaspa": {"block": 16},
    "sparge": {"block": 16},
    "draft": {"tile": (1, 4, 4), "block": 16},
    "jenga": {"block": 16},
}


def candidates(keys: Sequence[str], options: Mapping[str, Any], *, small: bool = False) -> dict[str, Method]:
    """The methods to choose among.

    Args:
        keys: Registry keys; none: adaspa, sparge, draft and jenga, whose maps are found without training.
        options: Fields of all of them. small: options that suit the grid of the embedded model.

    Raises:
        ValueError: an unknown key or field, or a method that takes no density for each head.
    """
    if options and not keys:
        raise ValueError("--set goes with --method: the usual candidates have options of their own")
    found = {}
    for key in keys or _USUAL:
        method = get_method(key)()
        usual = {**_USUAL.get(key, {}), **(_SMALL.get(key, {}) if small else {}), **options}
        method = method.replace(**usual)
        try:
            several = method.replace(density=(0.5, 0.5)).call_density()
        except (TypeError, ValueError):
            several = None
        if several != (0.5, 0.5):
            raise ValueError(
                f"tune shares out densities among heads, and {key} takes none for each head; "
                f"{', '.join(_USUAL)}, vsa and sla do"
            )
        found[key] = method
    return found


def embedded_clips(calibration: int, unseen: int) -> tuple[list[Scene], list[Scene]]:
    """Scenes of the embedded model: some that it was trained with, and others that it was not."""

    def some(scenes: Sequence[Any], count: int, seed: int) -> list[Scene]:
        if not 1 <= count <= len(scenes):
            raise ValueError(f"tune: clips must be from 1 to {len(scenes)}, got {count}")
        return [Scene(scenes[i * len(scenes) // count].prompt, seed + i) for i in range(count)]

    return some(training_scenes(), calibration, 0), some(held_out(), unseen, UNSEEN_SEEDS)


def split(prompts: Sequence[str], unseen: Sequence[str]) -> tuple[list[Scene], list[Scene]]:
    """Scenes to calibrate with and to verify with, of different prompts and seeds.

    Args:
        prompts: At least one. unseen: others; none: every second one of ``prompts`` is kept back.

    Raises:
        ValueError: too few, or a prompt in both.
    """
    seen, kept = (list(prompts), list(unseen)) if unseen else (list(prompts[::2]), list(prompts[1::2]))
    if not seen or not kept:
        raise ValueError("tune needs prompts to search with and others to verify with: give at least two")
    if both := sorted({*seen} & {*kept}):
        raise ValueError(f"tune: a prompt to verify with must not be searched with: {both[0]!r}")
    scenes = [Scene(prompt, i) for i, prompt in enumerate(seen)]
    return scenes, [Scene(prompt, UNSEEN_SEEDS + i) for i, prompt in enumerate(kept)]


def tune(
    pipe: Any,
    methods: Mapping[str, Method],
    target: Target,
    clips: tuple[Sequence[Scene], Sequence[Scene]],
    size: Mapping[str, Any],
    folder: Path,
    *,
    dense_steps: Sequence[float] = DENSE_STEPS,
    told: Callable[[str], None] = lambda _: None,
) -> Result:
    """Find the settings that meet a target with least error, and verify them.

    Args:
        pipe: A pipeline, not patched; it is left as it came. methods: candidates by name.
        clips: To search with, and to verify with. size: ``height``, ``width``, ``frames``, ``steps``, ``guidance``.
        folder: For the ledger: a search that was stopped goes on from it; another target uses what it holds.
        dense_steps: Shares of dense steps to try. told: hears what is done.

    Raises:
        ValueError: as of `Search`, `Ledger` and `vsparse.apply`; a size that is not whole.
    """
    missing = [name for name in ("height", "width", "frames", "steps") if size.get(name) is None]
    if missing:
        raise ValueError(f"tune: a profile is for one size of video; give {', '.join(f'--{name}' for name in missing)}")
    model, where = model_of(pipe), environment()
    calibration, unseen = clips
    name = device_words(torch.device(pipe.device), where)
    settings = {
        "model": dc.asdict(model),
        "size": dict(size),
        "device": name,
        "packages": where["packages"],
        "candidates": {key: str(method) for key, method in methods.items()},
        "dense_steps": list(dense_steps),
        "calibration": [list(scene) for scene in calibration],
    }
    trials = Trials(pipe, size, Ledger(folder / LEDGER, settings), told)
    found = Search(trials, methods, calibration, target, dense_steps=dense_steps, told=told).run()
    verified = verify(trials, found.choice, target, unseen)
    return Result(
        found=found,
        verified=verified,
        model=model,
        size=Size(**{name: size[name] for name in ("height", "width", "frames", "steps")}),
        guidance=size.get("guidance"),
        calibration=calibration,
        target=target,
        device=name,
        environment=where,
    )


def write(result: Result, folder: Path, profile: Path) -> list[Path]:
    """The profile, the page and the figures."""
    written = [result.profile(profile.stem).write(profile)]
    for name, text in (("report.html", page(result)), ("report.json", as_json(result.as_json()))):
        write_text(folder / name, text)
        written.append(folder / name)
    return written
