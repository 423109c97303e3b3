"""What the pictures share: colours, a figure without a display, and a PNG that is written whole or not at all."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vsparse.measure.video import check_output
from vsparse.optional import require

__all__ = ["ACCENT", "FAINT", "INK", "as_uri", "axis_at", "density_map", "new_figure", "save_figure"]

INK, FAINT, ACCENT = "#1b1f24", "#667080", "#0b5cad"
_SHARP = 180  # dots per inch of what is embedded


def new_figure(width: float, height: float) -> Any:
    """A white matplotlib figure of a size in inches, without pyplot's global state.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return require("matplotlib.figure", "cli").Figure(figsize=(width, height), dpi=110, facecolor="white")


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG under a temporary name, then give it its name."""
    target = check_output(path, ".png")
    partial = target.with_name(f".{target.name}")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def as_uri(figure: Any) -> str:
    """A figure as the source of an image in a page that stands alone."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=_SHARP)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def axis_at(figure: Any, place: tuple[float, float, float, float], *, grid: str = "y") -> Any:
    """An axis at ``(left, bottom, width, height)`` in inches, plain."""
    width, height = figure.get_size_inches()
    axis = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
    axis.set_axisbelow(True)
    axis.grid(axis=grid, color="#e4e8ec", linewidth=0.6)
    axis.tick_params(labelsize=8.5, colors=FAINT, length=2)
    for edge in ("top", "right"):
        axis.spines[edge].set_visible(False)
    for edge in ("left", "bottom"):
        axis.spines[edge].set_color("#b8bec6")
    return axis


def density_map(cells: Sequence[Sequence[float]], *, width: float, tall: float, written: str = "") -> tuple[Any, Any]:
    """A heat map of shares from 0 to 1 with its scale.

    Args:
        cells: Rows of it. width: of the figure in inches. tall: of the map. written: how each cell is written into it,
            such as ".2f"; "": not at all.

    Returns:
        The figure, and the axis of the map, without ticks for its rows.
    """
    figure = new_figure(width, tall + 0.95)
    axis = axis_at(figure, (0.95, 0.6, width - 2.15, tall))
    image = axis.imshow(cells, aspect="auto", vmin=0.0, vmax=1.0, cmap="Blues", interpolation="nearest")
    axis.grid(visible=False)
    axis.xaxis.set_major_locator(require("matplotlib.ticker", "cli").MaxNLocator(integer=True, nbins=20))
    axis.tick_params(axis="y", length=0)
    for y, row in enumerate(cells if written else ()):
        for x, value in enumerate(row):
            color = "white" if value > 0.6 else INK
            axis.text(x, y, f"{value:{written}}", ha="center", va="center", fontsize=7, color=color)
    bar = axis_at(figure, (width - 1.0, 0.6, 0.16, tall))
    figure.colorbar(image, cax=bar)
    bar.tick_params(labelsize=8, colors=FAINT, length=2)
    return figure, axis
