"""What ``vsparse quality`` does: load, measure, write."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vsparse.measure.embedded import opened
from vsparse.measure.fidelity.page import page
from vsparse.measure.fidelity.result import Fidelity
from vsparse.measure.fidelity.rounds import Subject, Told, exact_floor, measured
from vsparse.measure.fidelity.sheets import sheets
from vsparse.measure.fidelity.vbench import read_prompts, strays, wanted_clips
from vsparse.measure.recall_report import as_rows, write_text
from vsparse.measure.shapes import held_out

__all__ = ["SCENES", "prompts_of", "quality_of", "write"]

SCENES = (0, 7, 9, 14, 16, 23)
"""Held-out scenes that the embedded pipeline is asked for: each colour once, each shape twice, all four directions,
three on each ground."""
_FPS, _FPS_EMBEDDED = 16, 6


def prompts_of(model: str | None, prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts that are meant.

    Args:
        model: As of `quality_of`. prompts: as typed; empty: those of the file. file: as of `read_prompts`; None, and
            nothing typed: held-out scenes, for the embedded pipeline.

    Raises:
        ValueError: both are given, or none for a pipeline that has no prompts of its own; as of `read_prompts`.
    """
    if prompts and file is not None:
        raise ValueError("give --prompt or --prompts, not both")
    if file is not None:
        return read_prompts(file)
    if prompts:
        return list(prompts)
    if model is not None:
        raise ValueError("give --prompt TEXT, repeatable, or --prompts FILE: only the embedded pipeline has its own")
    return [held_out()[i].prompt for i in SCENES]


def quality_of(
    model: str | None,
    subjects: Sequence[Subject],
    prompts: Sequence[str],
    size: Mapping[str, Any],
    *,
    folder: Path,
    seeds: int = 1,
    first: int = 0,
    fps: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    offload: bool = False,
    told: Told = lambda *_: None,
) -> Fidelity:
    """Load a pipeline and compare methods in it with dense.

    Args:
        model: As of `load_pipeline`; None: the embedded one, on the CPU. subjects: methods; the floor is added.
        prompts, seeds, first: as of `wanted_clips`. size: as of `generate`; None: the pipeline's own.
        folder: for videos and figures. fps: of the videos; None: 16, or 6 of the embedded pipeline.
        dtype, device, offload: as of `load_pipeline`. told: as of `measured`.

    Raises:
        ValueError, NotImplementedError, FileNotFoundError, ImportError: as of `opened`, `wanted_clips` and
            `measured`.
    """
    wanted = wanted_clips(prompts, seeds=seeds, first=first)
    asked = {name: value for name, value in size.items() if value is not None}
    told("loading", 0, 0)
    pipe, usual = opened(model, dtype=dtype, device=device, offload=offload)
    source = "the embedded pipeline" if model is None else f"{type(pipe).__name__} of {model}"
    found = measured(
        pipe,
        [exact_floor(), *subjects],
        wanted,
        {**usual, **asked},
        folder=folder,
        source=source,
        fps=fps or (_FPS if model is not None else _FPS_EMBEDDED),
        told=told,
    )
    others = strays(folder, [run.name for run in found.runs], [clip.name for clip in found.clips])
    lost = dict.fromkeys(others, "left by a run with other clips or methods; VBench would judge it as well")
    return dc.replace(found, lost={**found.lost, **lost})


def write(folder: Path, found: Fidelity) -> list[Path]:
    """Write ``report.json``, ``report.html`` and contact sheets into a folder; each file is whole or not there."""
    drawn = sheets(folder, found)
    written = {folder / "report.json": as_rows(found.as_json()), folder / "report.html": page(found, drawn)}
    for path, text in written.items():
        write_text(path, text)
    return [*written, *drawn.values()]
