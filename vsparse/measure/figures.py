"""What the pictures share: colours, a figure without a display, and a PNG that is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vsparse.measure.video import check_output
from vsparse.optional import require

__all__ = ["ACCENT", "FAINT", "INK", "new_figure", "save_figure"]

INK, FAINT, ACCENT = "#1b1f24", "#667080", "#0b5cad"


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
