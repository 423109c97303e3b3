"""The plots of a quality report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vsparse.measure.fidelity.distance import FIGURES
from vsparse.measure.fidelity.result import Fidelity, Run
from vsparse.measure.figures import FAINT, INK, axis_at, new_figure
from vsparse.optional import require

__all__ = ["COLORS", "clips", "colors", "latents"]

FLOOR = "#7c8794"
COLORS = ("#0b5cad", "#c8500a", "#17803d", "#8a3ab9", "#b3123f", "#0f8b8d", "#8c6d1f", "#d6439a")
_SHOWN = ("psnr", "ssim", "temporal")
_WIDTH = 9.6


def colors(found: Fidelity) -> Mapping[str, str]:
    """Run -> its colour in every plot."""
    methods = [run.name for run in found.others if run.kind == "sparse"]
    own = {name: COLORS[i % len(COLORS)] for i, name in enumerate(methods)}
    return {**{run.name: FLOOR for run in found.others if run.kind == "floor"}, **own}


def clips(found: Fidelity) -> Any:
    """A dot for each clip, the mean, and its interval: PSNR, SSIM and temporal consistency, run by run."""
    runs = [run for run in found.others if run.outcomes]
    tall = 0.3 + 0.42 * len(runs)
    figure = new_figure(_WIDTH, tall + 1.0)
    left, gap = 1.35, 0.3
    wide = (_WIDTH - left - 0.2 - gap * (len(_SHOWN) - 1)) / len(_SHOWN)
    for i, name in enumerate(_SHOWN):
        axis = axis_at(figure, (left + i * (wide + gap), 0.62, wide, tall), grid="x")
        for y, run in enumerate(runs):
            _row(axis, y, found, run, name)
        axis.set_ylim(len(runs) - 0.5, -0.5)
        axis.set_yticks(range(len(runs)), [run.name for run in runs] if not i else [""] * len(runs))
        axis.tick_params(axis="y", labelsize=9.5, colors=INK, length=0)
        axis.xaxis.set_major_locator(require("matplotlib.ticker", "cli").MaxNLocator(nbins=5))
        axis.set_xlabel(FIGURES[name].label, fontsize=9, color=FAINT)
    return figure


def _row(axis: Any, y: int, found: Fidelity, run: Run, name: str) -> None:
    values = [x for x in found.values(run, name).values() if math.isfinite(x)]
    color, spread = colors(found)[run.name], found.spread(run, name)
    axis.plot(values, [y] * len(values), "o", color=color, markersize=5, alpha=0.45, markeredgewidth=0)
    if spread is None or not math.isfinite(spread.mean):
        return
    axis.plot([spread.mean] * 2, [y - 0.26, y + 0.26], color=color, linewidth=2.2)
    if spread.interval is not None:
        axis.plot(spread.interval, [y, y], color=color, linewidth=1.2)


def latents(found: Fidelity) -> Any:
    """Relative error of the latents by denoising step: the mean, and from the least to the most clip."""
    figure = new_figure(_WIDTH, 3.0)
    axis = axis_at(figure, (0.85, 0.55, _WIDTH - 2.6, 2.2))
    for run in found.others:
        steps, color = found.latents(run), colors(found)[run.name]
        if not steps:
            continue
        # A step that is equal has no place on a logarithmic axis.
        means, lows, highs = ([getattr(x, name) or math.nan for x in steps] for name in ("mean", "low", "high"))
        axis.fill_between(range(len(steps)), lows, highs, color=color, alpha=0.15, linewidth=0)
        axis.plot(range(len(steps)), means, color=color, marker="o", markersize=3.5, linewidth=1.5, label=run.name)
    axis.set_yscale("log")
    axis.set_xlabel("denoising step", fontsize=9, color=FAINT)
    axis.set_ylabel("relative error of the latents", fontsize=9, color=FAINT)
    axis.xaxis.set_major_locator(require("matplotlib.ticker", "cli").MaxNLocator(integer=True))
    handles, labels = axis.get_legend_handles_labels()
    place = ((_WIDTH - 1.65) / _WIDTH, 2.85 / 3.0)
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=place, frameon=False, fontsize=9)
    return figure
