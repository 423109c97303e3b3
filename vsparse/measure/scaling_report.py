"""The picture of docs/scaling.md."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vsparse.measure.figures import ACCENT, FAINT, INK, new_figure, save_figure

__all__ = ["plot"]

_STYLES = {
    "chosen": {"color": ACCENT, "marker": "o", "linewidth": 2.2, "markersize": 5, "zorder": 4},
    "ulysses": {"color": "#c8500a", "marker": "s", "linewidth": 1.3, "markersize": 4, "zorder": 3},
    "ring": {"color": "#17803d", "marker": "^", "linewidth": 1.3, "markersize": 4.5, "zorder": 2},
    "gather": {"color": "#8a3ab9", "marker": "D", "linewidth": 1.3, "markersize": 3.5, "zorder": 2},
}
_LINE = "nabla"


def plot(path: str | os.PathLike[str], report: Mapping[str, Any]) -> Path:
    """Write a PNG: predicted speed-up over GPUs for each model and link, and the balance of heads before and after.

    Args:
        path: Of the PNG. report: what ``scripts/plan_parallel.py`` writes.
    """
    models = list(dict.fromkeys(row["model"] for row in report["cases"]))
    links = list(report["cases"][0]["predicted"])
    width, side, left, gap = 11.2, 2.55, 0.75, 0.45
    wide = (width - left - 0.25 - (len(models) - 1) * gap) / len(models)
    head, between, foot, low = 0.95, 0.75, 0.6, 2.2
    height = head + len(links) * (side + between) + 0.1 + low + foot
    figure = new_figure(width, height)
    top = height - head
    for j, link in enumerate(links):
        for i, model in enumerate(models):
            bottom = top - side - j * (side + between)
            place = ((left + i * (wide + gap)) / width, bottom / height, wide / width, side / height)
            axis = figure.add_axes(place)
            row = next(x for x in report["cases"] if x["model"] == model and x["line"] == _LINE)
            _speedups(axis, row["predicted"][link])
            axis.set_title(f"{model}: {link}", fontsize=10, color=INK, loc="left", pad=6)
            if i:
                axis.set_yticklabels([])
            else:
                axis.set_ylabel("speed-up of attention", fontsize=9, color=FAINT)
            if not i and not j:
                axis.legend(loc="upper left", frameon=False, fontsize=8.5, labelspacing=0.35)
    _balance(figure, report["balance"]["rows"], (left, foot, width - left - 0.25, low), (width, height))
    title = "One attention over several GPUs: predicted, not measured"
    note = (
        f"Speed-up of one layer's attention over one GPU with the same map ({_LINE} on data made from a seed). Links "
        "and rates by data sheet, declared in the text."
    )
    figure.text(0.15 / width, 1 - 0.14 / height, title, fontsize=13, weight="bold", color=INK, va="top")
    figure.text(0.15 / width, 1 - 0.43 / height, note, fontsize=9, color=FAINT, va="top")
    return save_figure(figure, path)


def _speedups(axis: Any, found: Mapping[str, Any]) -> None:
    gpus = [int(count) for count in found]
    lines = {"chosen": [row["speedup"] for row in found.values()]}
    lines |= {how: [row["pure"][how] for row in found.values()] for how in ("ulysses", "ring", "gather")}
    axis.plot(gpus, gpus, color="#9aa3ad", linewidth=1.0, linestyle=(0, (4, 3)), label="ideal", zorder=1)
    for name, values in lines.items():
        known = [(count, value) for count, value in zip(gpus, values, strict=True) if value is not None]
        axis.plot(*zip(*known, strict=True), label=name if name == "chosen" else f"{name} alone", **_STYLES[name])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(gpus, [str(count) for count in gpus])
    axis.set_yticks(gpus, [str(count) for count in gpus])
    axis.set_ylim(0.8, gpus[-1] * 1.25)
    axis.minorticks_off()
    axis.set_xlabel("GPUs", fontsize=9, color=FAINT)
    _plain(axis)


def _balance(
    figure: Any, rows: list[dict[str, Any]], box: tuple[float, float, float, float], size: tuple[float, float]
) -> None:
    """Bars of slowest over mean, worst of the draws: in order, balanced, and the floor of whole heads."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    left, bottom, across, high = box
    wide = (across - 0.45) / len(sources)
    for i, source in enumerate(sources):
        place = ((left + i * (wide + 0.45)) / size[0], bottom / size[1], wide / size[0], high / size[1])
        axis = figure.add_axes(place)
        mine = [row for row in rows if row["source"] == source]
        at = [n + n // 3 * 0.6 for n in range(len(mine))]
        for shift, name, color in ((-0.2, "naive", "#c3cad2"), (0.2, "equal", ACCENT)):
            values = [row[name][0] - 1 for row in mine]
            label = {"naive": "heads in order", "equal": "balanced"}[name]
            axis.bar([x + shift for x in at], values, 0.38, bottom=1.0, color=color, label=label, zorder=2)
        floors = [row["least"][0] for row in mine]
        axis.hlines(floors, [x - 0.42 for x in at], [x + 0.42 for x in at], color=INK, linewidth=1.2, zorder=3)
        axis.plot([], [], color=INK, linewidth=1.2, label="least for whole heads")
        axis.axhline(1.10, color="#b3123f", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1, label="1.10")
        axis.set_xticks(at, [f"{row['processes']}" for row in mine])
        for n in range(0, len(mine), 3):
            axis.text(at[n + 1], -0.11, f"{mine[n]['heads']} heads", transform=axis.get_xaxis_transform(),
                      fontsize=8.5, color=INK, ha="center", va="top")  # fmt: skip
        what = "the embedded model's heads" if source == "recorded" else "heads of random loads, 1 to 5"
        axis.set_title(f"Slowest over mean on 2, 4, 8 GPUs: {what}", fontsize=10, color=INK, loc="left", pad=6)
        axis.set_ylim(1.0, max(row["naive"][0] for row in rows) * 1.05)
        _plain(axis)
        axis.tick_params(axis="x", length=0)
        if i:
            axis.set_yticklabels([])
            axis.legend(loc="upper right", frameon=False, fontsize=8.5, labelspacing=0.35)


def _plain(axis: Any) -> None:
    axis.grid(color="#e4e8ec", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=FAINT, length=2)
    for edge in ("top", "right"):
        axis.spines[edge].set_visible(False)
