"""Small pictures of what methods keep: one style, one lattice, four heads of known structure, every token a pixel."""

from __future__ import annotations

import dataclasses as dc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsparse.geometry import Grid
from vsparse.measure.compare import LAYER, Sweep, sweeps
from vsparse.measure.draw import KEPT, OMITTED, TEXT
from vsparse.measure.figures import FAINT, INK, new_figure, save_figure
from vsparse.measure.recall import kept_by
from vsparse.measure.synthetic import HEADS, structured_sample
from vsparse.methods import get_method
from vsparse.methods.samples import Sample
from vsparse.optional import require

__all__ = ["GRID", "draw_attention", "draw_method", "portrait_lines", "portrait_sample"]

GRID = Grid(t=8, h=8, w=8, text_after=24)

_FINE = ("radial", "svg")  # bands, which blocks as long as two rows of this small video would smear


def portrait_sample() -> Sample:
    """The q, k and v of all portraits."""
    return structured_sample(GRID, heads=len(HEADS), seed=3, noise=0.7)


def portrait_lines() -> list[tuple[Sweep, Any]]:
    """One line and budget for each method: the budget whose density comes nearest to a quarter."""
    sample = portrait_sample()
    lines = [_finer(line) for line in sweeps()]
    chosen: dict[str, tuple[float, Sweep, Any]] = {}
    for line in lines:
        for value in line.values:
            far = abs(float(_kept(line, value, sample)[1].mean()) - 0.25)
            best = chosen.get(line.method)
            if best is None or far < best[0] - 1e-9:
                chosen[line.method] = (far, line, value)
    return [(line, value) for _, line, value in chosen.values()]


def _finer(line: Sweep) -> Sweep:
    return dc.replace(line, options={**line.options, "block": 4}) if line.method in _FINE else line


def _kept(line: Sweep, value: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    """``[H, N, N]`` bool in host order, and the density of each head."""
    options = {**line.options, **({line.field: value} if line.field else {})}
    kept = kept_by(get_method(line.method)(**options), sample, layer=LAYER)
    rows = kept.keep.gather(1, kept.row[..., None].expand(-1, -1, kept.keep.shape[-1]))
    return rows.gather(2, kept.block[:, None].expand(-1, rows.shape[1], -1)), kept.density()


def draw_method(path: str | os.PathLike[str], line: Sweep, value: Any) -> Path:
    """Write the PNG of a method: which key tokens (columns) each query token (row) is computed with, head by head."""
    keep, density = _kept(line, value, portrait_sample())
    text = torch.arange(GRID.tokens) >= GRID.video
    kinds = torch.where(keep, torch.where(text | text[:, None], 2, 1), 0)
    colors = require("matplotlib.colors", "cli").ListedColormap((OMITTED, KEPT, TEXT))
    below = [f"density {float(x):.2f}" for x in density]
    return _draw(path, kinds, below, {"cmap": colors, "vmin": 0, "vmax": 2})


def draw_attention(path: str | os.PathLike[str]) -> Path:
    """Write the PNG of the attention that the methods had before them, each row against its largest entry."""
    sample = portrait_sample()
    q, k = (x[0].double().transpose(0, 1) for x in (sample.q, sample.k))
    share = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    # Four steps of brightness, and the largest of four tokens by four: a file of noise would be large.
    coarse = torch.nn.functional.max_pool2d((share / share.amax(-1, keepdim=True)).sqrt(), 4)
    colors = require("matplotlib.colors", "cli").LinearSegmentedColormap.from_list("share", (OMITTED, KEPT, INK))
    return _draw(path, (coarse * 4).floor() / 4, [""] * len(share), {"cmap": colors})


def _draw(path: str | os.PathLike[str], images: Tensor, below: Sequence[str], style: dict[str, Any]) -> Path:
    side, gap, head, foot = 1.75, 0.14, 0.27, 0.24
    width, height = len(images) * (side + gap) + gap, head + side + foot
    figure = new_figure(width, height)
    for i, (image, words) in enumerate(zip(images, below, strict=True)):
        x = gap + i * (side + gap)
        axis = figure.add_axes((x / width, foot / height, side / width, side / height))
        axis.imshow(image.numpy(), interpolation="nearest", aspect="auto", **style)
        axis.set_xticks([])
        axis.set_yticks([])
        for edge in axis.spines.values():
            edge.set_color("#c9ced6")
        axis.set_title(HEADS[i % len(HEADS)], fontsize=8.5, color=INK, pad=3)
        axis.set_xlabel(words, fontsize=8, color=FAINT, labelpad=2)
    return save_figure(figure, path)
