"""The study as a table and as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vsparse.measure.figures import ACCENT, FAINT, INK, new_figure, save_figure
from vsparse.optional import require
from vsparse.training.study import Row

__all__ = ["closed", "curves", "markdown", "plot", "table"]

HEAD = (
    "method",
    "density",
    "loss",
    "gap closed",
    "colour",
    "shape",
    "direction",
    "coherent",
    "PSNR",
    "SSIM",
    "recall",
    "s/step",
)


_TICKS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0, 1.5, 2.0, 3.0)


def closed(row: Row, rows: Sequence[Row]) -> float | None:
    """Share of the loss gap between the dense model and the training-free sparse one that the fine-tune closed; None
    for rows without a fine-tune, or where no gap was opened.
    """
    dense = next(x.loss for x in rows if x.method == "dense")
    free = [x.loss for x in rows if (x.method, x.asked, x.tuned) == (row.method, row.asked, False)]
    if not row.tuned or not free or free[0] <= dense:
        return None
    return (free[0] - row.loss) / (free[0] - dense)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    found = []
    for row in rows:
        part = closed(row, rows)
        seen = [f"{row.adherence[name]}/{row.clips}" for name in ("color", "shape", "direction", "coherent")]
        figures = [
            "" if row.psnr is None else f"{row.psnr:.1f}",
            "" if row.ssim is None else f"{row.ssim:.3f}",
            "" if row.recall is None else f"{row.recall:.2f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        ]
        name = row.method if row.method == "dense" else f"{row.method} {row.asked:g}"
        told = "" if part is None else f"{100 * part:.0f} %"
        found.append([f"{name}{', tuned' if row.tuned else ''}", f"{row.density:.3f}", f"{row.loss:.4f}", told, *seen])
        found[-1] += figures
    return found


def table(rows: Sequence[Row]) -> Any:
    """For the terminal."""
    made = require("rich.table", "cli").Table()
    for i, name in enumerate(HEAD):
        made.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    for cells in _cells(rows):
        made.add_row(*cells)
    return made


def markdown(rows: Sequence[Row]) -> str:
    """For a document."""
    rule = ["---", *("---:" for _ in HEAD[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (list(HEAD), rule, *_cells(rows))) + "\n"


def plot(path: str | os.PathLike[str], rows: Sequence[Row]) -> Path:
    """Held-out loss of each method: an open mark training-free, a filled one after the fine-tune, dense as a line."""
    names = list(dict.fromkeys((row.method, row.asked) for row in rows if row.method != "dense"))
    width, height = 7.5, 1.3 + 0.34 * len(names)
    figure = new_figure(width, height)
    axis = figure.add_axes((0.2, 0.55 / height, 0.76, 1 - 1.25 / height))
    for row in rows:
        if row.method == "dense":
            axis.axvline(row.loss, color=FAINT, linewidth=1, label="dense")
    for place, (method, asked) in enumerate(names):
        mine = {row.tuned: row.loss for row in rows if (row.method, row.asked) == (method, asked)}
        if len(mine) == 2:
            axis.plot([mine[False], mine[True]], [place, place], color=ACCENT, linewidth=1.2)
        for tuned, loss in mine.items():
            said = None if place else "fine-tuned" if tuned else "training-free"
            fill = ACCENT if tuned else "white"
            axis.plot(loss, place, "o", color=ACCENT, markerfacecolor=fill, markersize=6, label=said)
    axis.set_yticks(range(len(names)), [f"{method} {asked:g}" for method, asked in names])
    axis.invert_yaxis()
    _plain(axis, "loss on held-out clips (logarithmic)")
    axis.set_xscale("log")
    seen = [row.loss for row in rows]
    ticks = [x for x in _TICKS if min(seen) * 0.9 <= x <= max(seen) * 1.1]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, fontsize=7.5, handletextpad=0.4)
    figure.text(0.02, 1 - 0.12 / height, "Sparse, and trained to it", fontsize=12, weight="bold", color=INK, va="top")
    return save_figure(figure, path)


def curves(path: str | os.PathLike[str], runs: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> Path:
    """Held-out loss over steps from scratch: a line for the mean over seeds, a band from the least to the greatest.

    Args:
        runs: Name -> for each seed (step, loss) at the same steps.
    """
    figure = new_figure(7.0, 4.2)
    axis = figure.add_axes((0.1, 0.13, 0.87, 0.72))
    for (name, seeds), color in zip(runs.items(), ("#1b1f24", "#0b5cad", "#c2571a", "#2e7d4f"), strict=False):
        steps = [step for step, _ in seeds[0]]
        values = [[run[i][1] for run in seeds] for i in range(len(steps))]
        axis.fill_between(
            steps, [min(x) for x in values], [max(x) for x in values], color=color, alpha=0.18, linewidth=0
        )
        axis.plot(steps, [sum(x) / len(x) for x in values], color=color, linewidth=1.4, label=name)
    _plain(axis, "training steps")
    axis.set_ylabel("loss on held-out clips", fontsize=9, color=FAINT)
    axis.legend(frameon=False, fontsize=8.5)
    count = len(next(iter(runs.values())))
    title = f"From scratch, equal steps and data: mean and range over {count} seeds"
    figure.text(0.02, 0.97, title, fontsize=11.5, weight="bold", color=INK, va="top")
    return save_figure(figure, path)


def _plain(axis: Any, label: str) -> None:
    axis.set_xlabel(label, fontsize=9, color=FAINT)
    axis.grid(color="#e4e8ec", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=FAINT, length=2)
    for edge in ("top", "right"):
        axis.spines[edge].set_visible(False)
