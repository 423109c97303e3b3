"""Pictures of a layout (the block of each token) and of a block map (the key blocks that each query block keeps)."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.geometry import Segment
from vsparse.layouts import Layout
from vsparse.measure.figures import FAINT, INK, new_figure, save_figure
from vsparse.measure.video import check_output
from vsparse.optional import require

__all__ = ["draw_block_map", "draw_layout"]

OMITTED, KEPT, TEXT, EMPTY = "#eef1f4", "#1f6fb4", "#e08214", "#c9ced6"
# Twelve light colours (ColorBrewer Set3 without its grey), so that block numbers stay legible on them.
BLOCKS = (
    "#8dd3c7", "#ffffb3", "#bebada", "#fb8072", "#80b1d3", "#fdb462",
    "#b3de69", "#fccde5", "#ccebc5", "#bc80bd", "#ffed6f", "#a6cee3",
)  # fmt: skip
MOST_NUMBERS = 600
# Inches.
TITLE_LINE, FACT_LINE = 0.26, 0.18


def draw_layout(path: str | os.PathLike[str], layout: Layout, *, title: str = "layout", frames: int = 8) -> Path:
    """Write a PNG: one panel per latent frame, every token in the colour of its block, text in a strip of its own.

    Args:
        path: Ends in ".png". layout: the first of its batch and heads is drawn. title: above all.
        frames: Most latent frames to show, from the first on.

    Returns:
        The path.
    """
    target = check_output(path, ".png")
    grid = layout.grid
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    block = layout.token_block[0, 0].cpu()
    length = layout.length[0, 0].cpu()
    ragged = length < layout.block
    video = block[grid.text_before : grid.text_before + grid.video].view(grid.t, grid.h, grid.w)
    numbers = layout.blocks <= MOST_NUMBERS
    shown = min(grid.t, frames)
    columns = shown if shown <= 5 else 3 if shown == 6 else 4
    rows = math.ceil(shown / columns)
    side = 2.6 if columns == 5 else 3.1
    tall, gap, foot = side * min(2.0, max(0.45, grid.h / grid.w)), 0.45, 0.95
    strip = 0.95 if grid.text else 0.0
    width = max(6.4, columns * (side + 0.35) + 0.6)
    words, head = _heading(title, _layout_facts(layout, int(ragged.sum()), shown), width)
    height = head + rows * tall + (rows - 1) * gap + strip + foot
    figure = new_figure(width, height)
    _write_heading(figure, words, width, height)
    for i in range(shown):
        row, column = divmod(i, columns)
        low = height - head - (row + 1) * tall - row * gap
        axis = figure.add_axes(_place(0.5 + column * (side + 0.35), low, side, tall, width, height))
        kind = "conditioning frame" if i < grid.condition_frames else "latent frame"
        _tokens(axis, video[i], ragged, numbers=numbers)
        axis.set_title(f"{kind} {i}", fontsize=9.5, color=INK, pad=4)
        axis.set_ylabel("row" if column == 0 else "", fontsize=8, color=FAINT)
        axis.set_xlabel("column" if row == rows - 1 else "", fontsize=8, color=FAINT)
    if grid.text:
        axis = figure.add_axes(_place(0.5, foot - 0.05, width - 1.0, 0.28, width, height))
        before, after = block[: grid.text_before], block[grid.text_before + grid.video :]
        _tokens(axis, torch.cat([before, after])[None], ragged, numbers=numbers)
        axis.set_yticks([])
        sides = [f"{len(x)} {name} the video" for x, name in ((before, "before"), (after, "after")) if len(x)]
        axis.set_title(f"text tokens: {' and '.join(sides)}", fontsize=9.5, color=INK, pad=4)
    full = ("a block and its index" if numbers else "a block", BLOCKS[0], None)
    part = ("a block that is not full: padding in its slots", BLOCKS[0], "///")
    _legend(figure, [full, part] if bool(ragged.any()) else [full])
    return save_figure(figure, target)


def draw_block_map(
    path: str | os.PathLike[str],
    blocks: BlockMap,
    *,
    title: str = "block map",
    origin: str = "",
    sample: int = 0,
    heads: Sequence[int] | None = None,
) -> Path:
    """Write a PNG: one panel per head, a cell per pair of query and key block.

    Args:
        path: Ends in ".png". blocks: the map; its blockings may or may not carry a layout (without one, text is not
            marked). title: above all. origin: where the map comes from, in a few words.
        sample: Index into the batch. heads: which heads; None: all, at most 12.

    Returns:
        The path.
    """
    target = check_output(path, ".png")
    keep, density = blocks.to_mask().cpu(), blocks.density().cpu()
    if not 0 <= sample < keep.shape[0]:
        raise ValueError(f"sample must lie in [0, {keep.shape[0]}), got {sample}")
    chosen = list(range(min(keep.shape[1], 12))) if heads is None else list(heads)
    if not chosen or any(not 0 <= h < keep.shape[1] for h in chosen):
        raise ValueError(f"heads must be indices in [0, {keep.shape[1]}), got {chosen}")
    kinds = _pair_kinds(blocks, keep.shape[2], keep.shape[3])
    columns = min(len(chosen), 4)
    rows = math.ceil(len(chosen) / columns)
    side = max(3.3, min(5.6, 7.0 / columns))
    tall = side * min(2.0, max(0.5, keep.shape[2] / keep.shape[3]))
    gap, foot = 0.75, 0.95
    width = max(6.4, columns * (side + 0.75) + 0.35)
    source = [origin] if origin else []
    facts = "; ".join([*source, _map_facts(blocks, float(density.mean()))])
    words, head = _heading(title, facts, width)
    height = head + rows * tall + (rows - 1) * gap + foot
    figure = new_figure(width, height)
    _write_heading(figure, words, width, height)
    for i, number in enumerate(chosen):
        row, column = divmod(i, columns)
        low = height - head - (row + 1) * tall - row * gap
        axis = figure.add_axes(_place(0.65 + column * (side + 0.75), low, side, tall, width, height))
        _cells(axis, keep[sample, number], kinds)
        own = density[min(sample, density.shape[0] - 1), min(number, density.shape[1] - 1)]
        axis.set_title(f"head {number}   density {float(own):.3f}", fontsize=9.5, color=INK, pad=5)
        axis.set_xlabel("key block", fontsize=8.5, color=FAINT)
        axis.set_ylabel("query block" if column == 0 else "", fontsize=8.5, color=FAINT)
    entries = [("kept, computed", KEPT, None), ("omitted", OMITTED, None)]
    if bool((kinds == 1).any()):
        entries.insert(1, ("kept, text (always)" if _text_is_full(keep, kinds) else "kept, text", TEXT, None))
    if bool((kinds == 2).any()):
        entries.append(("block without a valid token", EMPTY, None))
    _legend(figure, entries)
    return save_figure(figure, target)


# ---- parts -------------------------------------------------------------------------------------------------------


def _place(x: float, y: float, w: float, h: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x / width, y / height, w / width, h / height


def _heading(title: str, facts: str, width: float) -> tuple[tuple[list[str], list[str]], float]:
    """Lines of the title and of the facts below it, and the inches they and the room under them take."""
    words = textwrap.wrap(title, int(width * 9)), textwrap.wrap(facts, int(width * 14))
    return words, 0.7 + TITLE_LINE * len(words[0]) + FACT_LINE * len(words[1])


def _write_heading(figure: Any, words: tuple[list[str], list[str]], width: float, height: float) -> None:
    title, facts = words
    below = 0.24 + TITLE_LINE * len(title)
    left = 0.2 / width
    figure.text(left, 1 - 0.2 / height, "\n".join(title), fontsize=13, weight="bold", color=INK, va="top")
    figure.text(left, 1 - below / height, "\n".join(facts), fontsize=9, color=FAINT, va="top", linespacing=1.4)


def _legend(figure: Any, entries: Sequence[tuple[str, str, str | None]]) -> None:
    patches = require("matplotlib.patches", "cli")
    handles = [
        patches.Patch(facecolor=color, edgecolor="#7a828d", linewidth=0.6, hatch=hatch, label=name)
        for name, color, hatch in entries
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9, borderaxespad=0.4)


def _layout_facts(layout: Layout, ragged: int, shown: int) -> str:
    grid = layout.grid
    text = f" + {grid.text} text" if grid.text else ""
    waste = layout.slots / layout.tokens - 1
    facts = [
        f"grid {grid.t} \u00d7 {grid.h} \u00d7 {grid.w} = {grid.video:,} video tokens{text}",
        f"{layout.blocks} blocks of {layout.block} slots",
        f"{ragged} of them not full: {layout.slots:,} slots for {layout.tokens:,} tokens, {waste:.1%} padding"
        if ragged
        else "all full",
    ]
    if shown < grid.t:
        facts.append(f"first {shown} of {grid.t} latent frames shown")
    return "; ".join(facts)


def _map_facts(blocks: BlockMap, density: float) -> str:
    count = blocks.count
    low, high = int(count.min()), int(count.max())
    spread = f"{low}" if low == high else f"{low} to {high}"
    return (
        f"{blocks.q.blocks} query blocks of {blocks.q.block} \u00d7 {blocks.k.blocks} key blocks of {blocks.k.block} "
        f"tokens; {spread} key blocks kept per row; density {density:.3f} over all heads (share of valid token pairs)"
    )


def _tokens(axis: Any, block: Tensor, ragged: Tensor, *, numbers: bool) -> None:
    """One plane of tokens: colour by block, lines between blocks, the number of each block, hatches on ragged ones."""
    colors = require("matplotlib.colors", "cli")
    patches = require("matplotlib.patches", "cli")
    effects = require("matplotlib.patheffects", "cli")
    rows, columns = block.shape
    palette = colors.ListedColormap(BLOCKS)
    axis.imshow((block % len(BLOCKS)).numpy(), cmap=palette, vmin=0, vmax=len(BLOCKS) - 1, aspect="auto")
    for y, x in (block[:, 1:] != block[:, :-1]).nonzero().tolist():
        axis.plot([x + 0.5] * 2, [y - 0.5, y + 0.5], color=INK, linewidth=0.9, solid_capstyle="butt")
    for y, x in (block[1:] != block[:-1]).nonzero().tolist():
        axis.plot([x - 0.5, x + 0.5], [y + 0.5] * 2, color=INK, linewidth=0.9, solid_capstyle="butt")
    for number in block.unique().tolist():
        places = (block == number).nonzero().double()
        if bool(ragged[number]):
            for y, x in places.tolist():
                hatch = {"fill": False, "hatch": "///", "edgecolor": "#7a828d", "linewidth": 0}
                axis.add_patch(patches.Rectangle((x - 0.5, y - 0.5), 1, 1, **hatch))
        if numbers:
            y, x = _middle(places).tolist()
            size = max(4.5, min(9.0, 60.0 / max(rows, columns) ** 0.5 / max(1, len(str(number)))))
            halo = [effects.withStroke(linewidth=2.2, foreground=BLOCKS[number % len(BLOCKS)])]
            axis.text(x, y, str(number), ha="center", va="center", fontsize=size, color=INK, path_effects=halo)
    axis.tick_params(labelsize=7, colors=FAINT, length=2)
    _whole_ticks(axis)


def _middle(places: Tensor) -> Tensor:
    """Where to write a block's number: its centre, or, where that may lie outside, its token nearest to the centre."""
    centre = places.mean(0)
    box = places.amax(0) - places.amin(0) + 1
    if int(box.prod()) == len(places):
        return centre
    return places[(places - centre).square().sum(1).argmin()]


def _cells(axis: Any, keep: Tensor, kinds: Tensor) -> None:
    colors = require("matplotlib.colors", "cli")
    value = torch.where(keep, torch.where(kinds == 1, 2, 1), 0)
    value = torch.where(kinds == 2, 3, value)
    palette = colors.ListedColormap((OMITTED, KEPT, TEXT, EMPTY))
    axis.imshow(value.numpy(), cmap=palette, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
    rows, columns = keep.shape
    if max(rows, columns) <= 64:
        axis.set_xticks([i - 0.5 for i in range(1, columns)], minor=True)
        axis.set_yticks([i - 0.5 for i in range(1, rows)], minor=True)
        axis.grid(which="minor", color="white", linewidth=0.5)
        axis.tick_params(which="minor", length=0)
    axis.tick_params(labelsize=7.5, colors=FAINT, length=2)
    _whole_ticks(axis)


def _whole_ticks(axis: Any) -> None:
    ticker = require("matplotlib.ticker", "cli")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))


def _pair_kinds(blocks: BlockMap, rows: int, columns: int) -> Tensor:
    """``[Q, K]``: 0 video pair, 1 pair with text, 2 pair with a block that holds no valid token."""
    kinds = torch.zeros(rows, columns, dtype=torch.int64)
    for side, view in ((blocks.q, kinds), (blocks.k, kinds.T)):
        if side.layout is not None:
            view[(side.segment == int(Segment.TEXT)).cpu()] = 1
    for side, view in ((blocks.q, kinds), (blocks.k, kinds.T)):
        view[(side.length[0, 0] == 0).cpu()] = 2
    return kinds


def _text_is_full(keep: Tensor, kinds: Tensor) -> bool:
    return bool(keep[..., kinds == 1].all())
