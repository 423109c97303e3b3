"""The contact sheet: frames of several runs, and where each differs from the first."""

from __future__ import annotations

import dataclasses as dc
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsparse.measure.figures import ACCENT, FAINT, INK, new_figure, save_figure
from vsparse.measure.quality import check_frames
from vsparse.measure.video import check_output

__all__ = ["SheetRow", "contact_sheet"]

GAIN = 4
LONGEST = 7  # runs under one another, beside the reference


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class SheetRow:
    """One run: a name, lines of facts under it, and its frames ``[F, H, W, 3]`` in [0, 1]."""

    name: str
    facts: Sequence[str]
    frames: Tensor


def contact_sheet(
    path: str | os.PathLike[str], rows: Sequence[SheetRow], *, title: str, note: str = "", columns: int = 7
) -> Path:
    """Write a PNG: one row of frames per run, and under every run that visibly differs from the first, by how much.

    Many runs stand in columns side by side, with the first one at the head of each.

    Args:
        path: Ends in ".png". rows: the first is the reference; all have one shape. title: above all. note: below all.
        columns: Most frames to show; they are spread evenly over the clip, first and last included.

    Returns:
        The path.

    Raises:
        ValueError: no rows, or frames that do not fit. ImportError: matplotlib is not installed.
    """
    target = check_output(path, ".png")
    if not rows:
        raise ValueError("contact_sheet needs at least one row")
    for row in rows:
        check_frames(row.name, row.frames)
        if row.frames.shape != rows[0].frames.shape:
            raise ValueError(f"{row.name}: frames {tuple(row.frames.shape)} differ from {tuple(rows[0].frames.shape)}")
    count, height, width = rows[0].frames.shape[:3]
    shown = _spread(count, columns)
    cell, label, gap, group = 1.3, 2.75, 0.05, 0.22
    tall = cell * height / width
    panels = _panels(rows)
    heights = [[2 * tall + gap if _differs(row, rows[0]) else tall for row in panel] for panel in panels]
    wide = label + len(shown) * (cell + gap) + 0.15
    size = (wide * len(panels), 1.15 + max(sum(h) + group * (len(h) - 1) for h in heights) + 0.15)
    figure = new_figure(*size)
    for place, (panel, extents) in enumerate(zip(panels, heights, strict=True)):
        left, y = place * wide, size[1] - 1.15
        for row, extent in zip(panel, extents, strict=True):
            for part in range(1 if extent == tall else 2):
                images = (row.frames - rows[0].frames).abs().mul(GAIN) if part else row.frames
                y_low = y - tall - part * (tall + gap)
                for column, index in enumerate(shown):
                    x = left + label + column * (cell + gap)
                    axis = figure.add_axes((x / size[0], y_low / size[1], cell / size[0], tall / size[1]))
                    axis.set_axis_off()
                    axis.imshow(images[index].float().cpu().clamp(0, 1).numpy(), interpolation="nearest", aspect="auto")
                    if row is rows[0]:
                        axis.set_title(f"frame {index + 1}", fontsize=9, color=FAINT, pad=4)
                edge = (left + label - 0.1) / size[0]
                _label(figure, edge, (y_low + tall) / size[1], size[1], tall, row, part, rows[0])
            y -= extent + group
    figure.text(0.12 / size[0], 1 - 0.2 / size[1], title, fontsize=13, weight="bold", color=INK, va="top")
    below = "\n".join(textwrap.wrap(note, int(size[0] * 15)))
    figure.text(0.12 / size[0], 1 - 0.48 / size[1], below, fontsize=8.5, color=FAINT, va="top")
    return save_figure(figure, target)


def _panels(rows: Sequence[SheetRow]) -> list[list[SheetRow]]:
    """The rows in columns of at most ``LONGEST``, the reference at the head of each."""
    rest = list(rows[1:])
    count = max(1, math.ceil(len(rest) / LONGEST))
    size = math.ceil(len(rest) / count) if rest else 1
    return [[rows[0], *rest[i : i + size]] for i in range(0, max(1, len(rest)), size)]


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` frame indices, evenly spread, first and last included."""
    if most < 1:
        raise ValueError(f"columns must be at least 1, got {most}")
    return sorted({int(i) for i in torch.linspace(0, count - 1, min(count, most)).round()})


def _differs(row: SheetRow, reference: SheetRow) -> bool:
    """Whether a difference would show in 8 bits."""
    return bool((row.frames - reference.frames).abs().max() * GAIN > 0.5 / 255)


def _label(
    figure: Any, x: float, top: float, inches: float, tall: float, row: SheetRow, part: int, reference: SheetRow
) -> None:
    """Text to the left of a strip of frames whose upper edge is at ``top``."""
    if part:
        text = f"|difference to {reference.name}| \u00d7 {GAIN}"
        middle = top - tall / 2 / inches
        figure.text(x, middle, text, fontsize=8.5, color=FAINT, ha="right", va="center", style="italic")
        return
    color = INK if row is reference else ACCENT
    figure.text(x, top - 0.05 / inches, row.name, fontsize=11, weight="bold", color=color, ha="right", va="top")
    facts = "\n".join(row.facts)
    figure.text(x, top - 0.33 / inches, facts, fontsize=8.5, color=INK, ha="right", va="top", linespacing=1.4)
