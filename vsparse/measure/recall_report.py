"""What a comparison of methods writes: a rich table, a Markdown table, a plot and a JSON file."""

from __future__ import annotations

import dataclasses as dc
import itertools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vsparse.measure.compare import Point, recall_at
from vsparse.measure.demo import environment
from vsparse.measure.figures import FAINT, INK, new_figure, save_figure
from vsparse.optional import require

__all__ = [
    "LEVELS",
    "as_json",
    "as_rows",
    "markdown",
    "plot",
    "recall_table",
    "record",
    "report",
    "summary",
    "write_text",
]

LEVELS = (0.1, 0.2, 0.5)
"""Densities at which the tables read the lines."""

_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
Sets = Mapping[str, Sequence[Point]]
# Dark to light in turn, told apart by marker and dash as well.
_COLORS = ("#0b5cad", "#c8500a", "#17803d", "#8a3ab9", "#b3123f", "#0f8b8d", "#8c6d1f", "#4a4e57", "#d6439a")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def _lines(sets: Sets) -> list[str]:
    return list(dict.fromkeys(point.line for points in sets.values() for point in points))


def _cells(points: Sequence[Point], line: str) -> list[str]:
    found = [recall_at(points, line, level) for level in LEVELS]
    return ["\u2013" if x is None else f"{x:.2f}" for x in found]


def recall_table(name: str, points: Sequence[Point]) -> Any:
    """All points of a set."""
    table = require("rich.table", "cli").Table(title=name, title_justify="left")
    for column in ("line", "budget", "density", "recall", "random blocks"):
        table.add_column(column, justify="left" if column in ("line", "budget") else "right")
    for line in dict.fromkeys(point.line for point in points):
        for i, point in enumerate([point for point in points if point.line == line]):
            budget = f"{point.field}={point.value}" if point.field else "defaults"
            figures = [f"{x:.3f}" for x in (point.density, point.recall, point.random)]
            table.add_row("" if i else line, budget, *figures)
    return table


def markdown(sets: Sets) -> str:
    """Recall of every line at a few densities, a column for each set and density."""
    names = list(sets)
    head = ["line", *(f"{name}, {level:g}" for name in names for level in LEVELS)]
    rows = [
        [f"`{line}`", *itertools.chain.from_iterable(_cells(sets[name], line) for name in names)]
        for line in _lines(sets)
    ]
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) + "\n"


def plot(path: str | os.PathLike[str], sets: Sets, *, title: str, note: str) -> Path:
    """Write a PNG: recall over density, a panel for each set, a line for each method, random blocks in grey."""
    lines = _lines(sets)
    side, left, gap, foot, head, key = 3.9, 0.65, 0.35, 0.6, 1.15, 1.9
    width, height = left + len(sets) * (side + gap) + key, head + side + foot
    figure = new_figure(width, height)
    for i, (name, points) in enumerate(sets.items()):
        x = left + i * (side + gap)
        axis = figure.add_axes((x / width, foot / height, side / width, side / height))
        chance = sorted((point.random_density, point.random) for point in points)
        axis.plot(*zip(*chance, strict=True), color="#9aa3ad", linewidth=2.2, label="random blocks", zorder=1)
        for number, line in enumerate(lines):
            mine = sorted((point.density, point.recall) for point in points if point.line == line)
            late = number // len(_COLORS)
            style = {"marker": _MARKS[(number + 4 * late) % len(_MARKS)], "linestyle": ("-", (0, (3, 1.5)))[late % 2]}
            color = _COLORS[number % len(_COLORS)]
            axis.plot(*zip(*mine, strict=True), color=color, linewidth=1.3, markersize=4, label=line, zorder=2, **style)
        axis.set_xscale("log")  # what differs lies at low densities
        axis.set_xlim(_TICKS[0], 1.0)
        axis.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axis.minorticks_off()
        axis.set_ylim(0, 1.02)
        axis.set_title(name, fontsize=10, color=INK, loc="left", pad=6)
        axis.set_xlabel("executed density", fontsize=9, color=FAINT)
        axis.grid(color="#e4e8ec", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, colors=FAINT, length=2)
        for edge in ("top", "right"):
            axis.spines[edge].set_visible(False)
        if i:
            axis.set_yticklabels([])
        else:
            axis.set_ylabel("recall of attention mass", fontsize=9, color=FAINT)
            handles, labels = axis.get_legend_handles_labels()
    place = ((width - key) / width, (foot + side) / height)
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=place, frameon=False, fontsize=8.5, labelspacing=0.45
    )
    figure.text(0.15 / width, 1 - 0.16 / height, title, fontsize=13, weight="bold", color=INK, va="top")
    figure.text(0.15 / width, 1 - 0.46 / height, note, fontsize=9, color=FAINT, va="top")
    return save_figure(figure, path)


def report(sets: Sets, command: Sequence[str]) -> dict[str, Any]:
    """Everything as JSON: the points, and what they were taken with."""
    points = {name: [dc.asdict(point) for point in found] for name, found in sets.items()}
    return {"command": shlex.join(command), "environment": environment(), "sets": points}


def summary(sets: Sets, command: Sequence[str]) -> dict[str, Any]:
    """What the documents show: recall of every line at the `LEVELS`, set by set; None where a line does not reach."""
    where = environment()
    found = {
        name: {line: [_rounded(recall_at(points, line, level)) for level in LEVELS] for line in _lines(sets)}
        for name, points in sets.items()
    }
    taken = {"date": where["date"], "torch": where["packages"]["torch"], "system": where["system"]}
    return {"command": shlex.join(command), **taken, "levels": list(LEVELS), "recall": found}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def record(path: Path, name: str, found: Mapping[str, Any]) -> None:
    """Put a section of figures into a JSON file of several."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    write_text(path, as_rows({**known, name: found}))


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then give it its name."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    os.replace(partial, path)


def as_json(value: object) -> str:
    """JSON with a line at the end."""
    return json.dumps(value, indent=1) + "\n"


def as_rows(value: object) -> str:
    """JSON with a line for each row: an object of plain figures, or a list of numbers, is not broken."""
    return _broken(value, "") + "\n"


def _broken(value: object, indent: str) -> str:
    if not isinstance(value, dict | list) or _levels(value) < (3 if isinstance(value, dict) else 2):
        return json.dumps(value)
    deeper = indent + " "
    named = value.items() if isinstance(value, dict) else ((None, x) for x in value)
    parts = [("" if name is None else f"{json.dumps(name)}: ") + _broken(x, deeper) for name, x in named]
    opens, closes = "{}" if isinstance(value, dict) else "[]"
    return f"{opens}\n{deeper}" + f",\n{deeper}".join(parts) + f"\n{indent}{closes}"


def _levels(value: object) -> int:
    """How deep objects and lists stand in each other; 0 for a plain value."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max((_levels(x) for x in (value.values() if isinstance(value, dict) else value)), default=0)
