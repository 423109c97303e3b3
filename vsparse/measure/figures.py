"""What the pictures share: colours, a figure without a display, and a PNG that is written whole or not at all."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

from vsparse.measure.video import check_output
from vsparse.optional import require

__all__ = ["ACCENT", "FAINT", "INK", "as_uri", "axis_at", "new_figure", "save_figure"]

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
