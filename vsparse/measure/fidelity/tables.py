"""A comparison as rows, sentences and tables for the terminal."""

from __future__ import annotations

import math
from typing import Any

from vsparse.measure.fidelity.distance import FIGURES
from vsparse.measure.fidelity.result import ALL, SEEN, Fidelity, Run
from vsparse.measure.fidelity.spread import CONFIDENCE, Spread, spread_of
from vsparse.optional import require

__all__ = [
    "CAPTION",
    "CLIP_HEAD",
    "FIGURE_HEAD",
    "RAN_HEAD",
    "clip_rows",
    "figure_rows",
    "figures_table",
    "left_out",
    "missing",
    "ran_rows",
    "ran_table",
    "sentences",
]

NONE = "\u2013"
CAPTION = (
    "floor: dense attention by another exact kernel. PSNR and SSIM: how much the picture changed, not whether it got "
    "worse. temporal consistency: 1, each change from frame to frame is the dense one; 0, none. motion: how large "
    "these changes are. latents: relative error. seen: what a program finds of colour, shape, direction, ground and a "
    "steady object. The interval is Student's, of the mean; it takes the clips for independent, and ends where a "
    "figure can go no further."
)
RAN_HEAD = ("", "clips", "executed density", "dense steps", "dense layers", "recall", "seen, of 5")
FIGURE_HEAD = ("", "mean", f"{CONFIDENCE:.0%} interval", "sd", "least", "most", "clips")
CLIP_HEAD = ("", "PSNR, dB", "worst frame", "SSIM", "temporal", "motion", "LPIPS", "latents", "seen", "density")


def _number(value: float | None, form: str) -> str:
    if value is None:
        return NONE
    return "equal" if math.isinf(value) else f"{value:{form}}"


def ran_rows(found: Fidelity) -> list[list[str]]:
    """What every run executed, in the order of `RAN_HEAD`."""
    lines = []
    for run in [found.runs[0], *found.others]:
        seen = found.spread(run, SEEN)
        cells = [run.name, str(len(found.outcomes(run)))]
        if run.kind == "dense":
            # Of videos on disk nobody knows it.
            known = any(found.density(one) is not None for one in found.others)
            cells += ["1", "all", "all", "1"] if known else [NONE] * 4
        else:
            cells += [_number(found.density(run), ".3f"), *_dense(found, run), _number(run.recall, ".3f")]
        lines.append([*cells, NONE if seen is None else f"{seen.mean:.2f}"])
    return lines


def _dense(found: Fidelity, run: Run) -> list[str]:
    """Dense steps and layers; a range where clips differ."""
    ran = [one.ran for one in found.outcomes(run) if one.ran is not None and one.ran.steps]
    if not ran:
        return [NONE, NONE]
    cells = []
    for counts, whole in (
        ([one.dense_steps for one in ran], ran[0].steps),
        ([one.dense_layers for one in ran], ran[0].layers),
    ):
        low, high = min(counts), max(counts)
        cells.append(f"{low} of {whole}" if low == high else f"{low} to {high} of {whole}")
    return cells


def missing(found: Fidelity) -> list[str]:
    """Figures that no clip has, and why."""
    said = []
    for name, figure in FIGURES.items():
        if not any(found.values(run, name) for run in found.others):
            said.append(f"{figure.label}: not measured: {'; '.join(found.why(name)) or 'no clip was compared'}.")
    return said


def figure_rows(found: Fidelity) -> list[list[str]]:
    """The paired table in the order of `FIGURE_HEAD`: under each figure the floor, then every method."""
    lines = []
    for name, figure in ALL.items():
        mine = []
        for run in [*(found.runs[:1] if name == SEEN else ()), *found.others]:
            spread = found.spread(run, name)
            if spread is not None:
                mine.append([f"  {run.name}", *_cells(spread, figure.form)])
        if mine or name != SEEN:
            label = figure.label if mine else f"{figure.label}: not measured"
            lines += [[label, *[""] * (len(FIGURE_HEAD) - 1)], *mine]
    return lines


def _cells(spread: Spread, form: str) -> list[str]:
    between = spread.why_no_interval
    if spread.interval is not None:
        low, high = (f"{x:{form}}" for x in spread.interval)
        between = f"{low} to {high}"
    count = f"{spread.count}, {spread.endless} equal" if spread.endless else str(spread.count)
    return [*(_number(x, form) for x in (spread.mean,)), between, _number(spread.sd, form),
            _number(spread.low, form), _number(spread.high, form), count]  # fmt: skip


def clip_rows(found: Fidelity) -> list[list[str]]:
    """Every clip of every run, in the order of `CLIP_HEAD`, clips one after the other."""
    lines = []
    names = ("psnr", "worst_psnr", "ssim", "temporal", "motion", "lpips", "latents")
    for clip in found.clips:
        lines.append([clip.name, *[""] * (len(CLIP_HEAD) - 1)])
        for run in [found.runs[0], *found.others]:
            one = run.outcomes.get(clip.name)
            if one is None:
                continue
            figures = [None if one.distance is None else getattr(one.distance, name) for name in names]
            cells = [_number(value, FIGURES[name].form) for name, value in zip(names, figures, strict=True)]
            seen = NONE if one.seen is None else str(one.seen.right)
            lines.append([f"  {run.name}", *cells, seen, NONE if one.ran is None else f"{one.ran.density:.3f}"])
    return lines


def sentences(found: Fidelity) -> list[str]:
    """What follows from the figures: each method, the floor, what is missing."""
    said = [_verdict(found, run) for run in found.others if run.kind == "sparse"]
    floor = found.floor
    if floor is not None:
        spread = found.spread(floor, "psnr")
        assert spread is not None
        said.append(
            f"Floor: exact attention by another kernel lies {_level(spread)} from dense. What is no further away than "
            "that says nothing about sparsity."
        )
    else:
        why = next((run.without["run"] for run in found.others if "run" in run.without), "none was given")
        said.append(f"No floor: {why}. How far exact attention alone would lie from dense is not known.")
    said += [
        f"{run.name}: no attention recall: {run.without['recall']}." for run in found.others if "recall" in run.without
    ]
    if len(found.clips) == 1:
        said.append("One clip: no interval, and no spread from clip to clip is known.")
    return [*said, *found.notes]


def _level(spread: Spread) -> str:
    if spread.endless == spread.count:
        return "0 (equal to the bit)"
    equal = f", {spread.endless} of {spread.count} clips equal to the bit" if spread.endless else ""
    return f"{spread.mean:.1f} dB PSNR{equal}"


def _verdict(found: Fidelity, run: Run) -> str:
    spread, beyond = found.spread(run, "psnr"), found.beyond_floor(run)
    assert spread is not None
    density = found.density(run)
    steps, layers = _dense(found, run)
    at = "" if density is None else f" at density {density:.3f} ({steps} steps and {layers} layers dense)"
    about = spread.why_no_interval or f"{CONFIDENCE:.0%} interval of the mean {{0}} to {{1}}"
    if spread.interval is not None:
        about = about.format(*(f"{x:.1f}" for x in spread.interval))
    worst = "" if spread.count == 1 else f", worst clip {_number(spread.low, '.1f')} dB"
    said = f"{run.name}{at}: {_level(spread)} against dense, {about}{worst}"
    return f"{said}{_against(beyond)}."


def _against(beyond: list[float]) -> str:
    """Whether a method lies further from dense than the floor does, from dB by clip."""
    if not beyond:
        return ""
    if not all(math.isfinite(x) for x in beyond):
        further = sum(x > 0 for x in beyond)
        return f"; further away than the floor in {further} of {len(beyond)} clips, some of them equal to dense"
    spread = spread_of(beyond)
    if spread.interval is None:
        return f"; {spread.mean:.1f} dB further away than the floor" if spread.mean > 0 else "; not beyond the floor"
    low, high = spread.interval
    if low <= 0.0:
        return f"; no difference from the floor can be told ({low:.1f} to {high:.1f} dB further away)"
    return f"; clip by clip {spread.mean:.1f} dB further away than the floor in the mean ({low:.1f} to {high:.1f})"


def left_out(found: Fidelity) -> list[str]:
    """Files that are in no figure, with the reason."""
    return [f"left out: {path}: {why}" for path, why in found.lost.items()]


def ran_table(found: Fidelity) -> Any:
    """`ran_rows`."""
    table = _table(found.source, RAN_HEAD)
    for row in ran_rows(found):
        table.add_row(*row)
    table.caption = "density: executed share of the token pairs over all calls, forced blocks and dense calls included"
    return table


def figures_table(found: Fidelity) -> Any:
    """`figure_rows`."""
    table = _table("Against the dense clip of the same prompt and seed", FIGURE_HEAD)
    for row in figure_rows(found):
        table.add_row(*row, style="bold" if not any(row[1:]) else "")
    table.caption = "\n".join([*missing(found), CAPTION])
    return table


def _table(title: str, head: tuple[str, ...]) -> Any:
    table = require("rich.table", "cli").Table(title=title, title_justify="left", caption_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table
