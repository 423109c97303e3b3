"""A search as one HTML page that needs nothing else, and as tables for the terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from vsparse.measure.figures import FAINT, INK, as_uri, axis_at, density_map, new_figure
from vsparse.measure.page import document, environment_rows, paragraph, picture, rows
from vsparse.measure.tune.choice import exact_steps
from vsparse.measure.tune.result import Result
from vsparse.measure.tune.search import PROBE_AT
from vsparse.measure.tune.verify import Row
from vsparse.optional import require

__all__ = ["page", "tried_table", "verified_table"]

_WIDTH = 9.0
_TRIED = ("method", "steps dense", "layers dense", "density", "error", "predicted", "clips")
_CHECKED = ("unseen clips", "density", "error", "interval", "PSNR, dB", "SSIM")


def verified_rows(found: Result) -> list[list[str]]:
    """Tuned, uniform and floor."""
    checked = found.verified
    names = {
        "tuned": "tuned, by layer and head",
        "uniform": f"one density, {checked.uniform_density:.3f}",
        "floor": "floor: every pair, in another order",
    }
    return [_checked(names[row.name], row) for row in (checked.tuned, checked.uniform, checked.floor)]


def _checked(name: str, row: Row) -> list[str]:
    error, psnr = row.error, row.psnr
    low_high = "" if error.interval is None else f"{error.interval[0]:.4f} to {error.interval[1]:.4f}"
    decibel = "equal" if math.isinf(psnr.mean) else f"{psnr.mean:.1f}"
    return [name, f"{row.density:.4f}", f"{error.mean:.4f}", low_high, decibel, f"{row.ssim.mean:.4f}"]


def tried_rows(found: Result) -> list[list[str]]:
    """Everything that was compared, the least error first."""
    ordered = sorted(found.found.tried, key=lambda row: (-row["clips"], row["error"]))
    return [
        [
            row["name"],
            f"{row['dense_steps']} of {found.size.steps}",
            str(row["dense_layers"]),
            f"{row['density']:.4f}",
            f"{row['error']:.4f}",
            "" if row["predicted"] is None else f"{row['predicted']:.4f}",
            str(row["clips"]),
        ]
        for row in ordered
    ]


def verified_table(found: Result) -> Any:
    """For the terminal."""
    return _table("Against the dense clips of the same prompts and seeds", _CHECKED, verified_rows(found))


def tried_table(found: Result) -> Any:
    """For the terminal."""
    return _table("What was tried", _TRIED, tried_rows(found))


def _table(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> Any:
    table = require("rich.table", "cli").Table(title=title, title_justify="left")
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left")
    for row in body:
        table.add_row(*row)
    return table


def page(found: Result) -> str:
    """The page."""
    choice, checked = found.found.choice, found.verified
    said = found.verdicts
    asked = f"{found.size}; {found.model}; {found.device}"
    parts = [
        f"<h1>Tuned: {html.escape(choice.name)} for {html.escape(found.model.name)}</h1>",
        paragraph(asked),
        paragraph(said[0], kind="lead" if checked.met else "missed", name="verdict"),
        *(paragraph(words) for words in said[1:]),
        "<h2>Clips that the search has not seen</h2>",
        rows(list(_CHECKED), verified_rows(found)),
        paragraph(
            "Error: distance of the latents after the last step from those of dense attention, relative to their size, "
            "same prompt and seed; its interval covers the mean with 95 % (Student's t over the clips)."
        ),
        picture(as_uri(_clips(found)), "Each clip: the profile against one density for everything.", name="clips"),
        "<h2>Densities</h2>",
        picture(as_uri(_densities(found)), "What each layer and head is given in a sparse step.", name="densities"),
        "<h2>Why</h2>",
        picture(
            as_uri(_weights(found)),
            "What an error of a head's output does to the model's answer (weight), and how large that error is at a "
            "density of a quarter: heads high on the right are given more.",
            name="weights",
        ),
        "<h2>What was tried</h2>",
        rows(list(_TRIED), tried_rows(found)),
        paragraph(
            f"Calibration clips: {'; '.join(f'{x.prompt} (seed {x.seed})' for x in found.calibration)}. Densities are "
            "of whole generations, dense steps and layers included."
        ),
        "<h2>Environment</h2>",
        rows(["", ""], environment_rows(found.environment), kind="words"),
    ]
    return document(f"Tuned: {found.model.name}", parts)


def _clips(found: Result) -> Any:
    """Errors of each unseen clip."""
    checked = found.verified
    figure = new_figure(_WIDTH, 2.6)
    axis = axis_at(figure, (0.75, 0.55, _WIDTH - 0.95, 1.75))
    count = len(checked.clips)
    for row, color, mark, words in (
        (checked.uniform, "#7c8794", "o", "one density"),
        (checked.tuned, "#0b5cad", "s", "by layer and head"),
    ):
        errors = [x.error for x in row.outcomes]
        axis.plot(range(count), errors, color=color, marker=mark, markersize=5, linestyle="none", label=words)
        axis.axhline(row.error.mean, color=color, linewidth=1, linestyle=(0, (4, 2)))
    axis.set_ylim(bottom=0)
    axis.set_xlim(-0.5, count - 0.5)
    axis.set_xticks(range(count), [str(i + 1) for i in range(count)])
    axis.set_xlabel("unseen clip; dashed: mean", fontsize=9, color=FAINT)
    axis.set_ylabel("error of the last latents", fontsize=9, color=FAINT)
    axis.legend(loc="lower right", frameon=False, fontsize=8.5, ncols=2)
    return figure


def _densities(found: Result) -> Any:
    """A heat map: layers across, heads down."""
    given = found.found.choice.densities
    layers, heads = len(given), max(map(len, given))
    cells = [[given[layer][head] for layer in range(layers)] for head in range(heads)]
    written = ".2g" if layers * heads <= 200 else ""
    figure, axis = density_map(cells, width=_WIDTH, tall=max(0.7, min(6.0, 0.3 * heads)), written=written)
    axis.set_yticks(range(heads), [f"head {i}" for i in range(heads)] if heads <= 16 else [""] * heads)
    choice = found.found.choice
    dense = exact_steps(choice.method, choice.dense_steps, found.size.steps)
    axis.set_xlabel(f"layer; in {found.size.steps - dense} of {found.size.steps} steps", fontsize=9, color=FAINT)
    return figure


def _weights(found: Result) -> Any:
    """Weight over output error, a point for each head, as large as its density."""
    choice = found.found.choice
    table = found.found.tables[choice.name]
    at = table.nearest(PROBE_AT)
    figure = new_figure(_WIDTH, 3.6)
    axis = axis_at(figure, (0.85, 0.6, _WIDTH - 1.1, 2.85), grid="both")
    points = [
        (table.error[layer][head][at], weight, choice.densities[layer][head], f"{layer}.{head}")
        for layer, row in enumerate(found.found.weights)
        for head, weight in enumerate(row)
        if weight > 0.0 and table.error[layer][head][at] > 0.0
    ]
    if points:
        errors, weights, densities, names = zip(*points, strict=True)
        axis.scatter(errors, weights, s=[30 + 300 * x for x in densities], color="#0b5cad", alpha=0.45, linewidths=0)
        if len(points) <= 64:
            for error, weight, name in zip(errors, weights, names, strict=True):
                axis.annotate(name, (error, weight), fontsize=7.5, color=INK, ha="center", va="center")
    axis.set_xscale("log")
    axis.set_yscale("log")
    words = f"squared output error of the head at density {table.densities[at]:g}; points: layer.head, larger: denser"
    axis.set_xlabel(words, fontsize=9, color=FAINT)
    axis.set_ylabel("weight", fontsize=9, color=FAINT)
    return figure
