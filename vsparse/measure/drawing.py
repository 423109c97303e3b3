"""What ``vsparse draw`` draws: a layout, and the map of a method on the embedded or on an untrained model."""

from __future__ import annotations

import dataclasses as dc
import os
from typing import Literal, get_args

from vsparse.geometry import Grid
from vsparse.layouts import Layout, RasterLayout, TileLayout
from vsparse.measure.capture import Seen, capture, random_map
from vsparse.measure.draw import draw_block_map, draw_layout
from vsparse.measure.embedded import EMBEDDED, embedded_pipeline
from vsparse.measure.pipelines import generate
from vsparse.measure.video import check_output
from vsparse.methods import Method, Site
from vsparse.patch import apply

__all__ = ["draw_both"]

Kind = Literal["method", "tile", "raster"]
EMBEDDED_GRID = Grid(t=5, h=16, w=16)
PROMPT = "a red circle moving right on a dark background"


def draw_both(
    path: str | os.PathLike[str],
    method: Method,
    grid: Grid,
    *,
    layout: str = "method",
    tile: tuple[int, int, int] | None = None,
    block: int | None = None,
    layer: int = 2,
    random: bool = False,
    seed: int = 0,
) -> list[str]:
    """Write ``<stem>-layout.png`` and ``<stem>-map.png``.

    Args:
        path: Ends in ".png". method, grid: what selects, on which lattice.
        layout: "method", "tile" or "raster": which layout to draw. The map always uses the method's own.
        tile, block: Of a "tile" or "raster" layout. layer: of the embedded model.
        random: Take an untrained model also where the embedded one fits. seed: of the noise.

    Returns:
        Lines that say what was written and where it comes from.

    Raises:
        ValueError: arguments that do not go together.
    """
    target = check_output(path, ".png")
    first, second = (target.with_stem(f"{target.stem}-{part}") for part in ("layout", "map"))
    drawn, name = _layout(method, grid, layout, tile, block, layer)
    if grid == EMBEDDED_GRID and not random:
        seen = _embedded_map(method, layer, seed)
        origin = f"trained demo model, layer {layer}, denoising step {seen.step + 1} of {EMBEDDED.steps}"
    else:
        seen = random_map(method, grid, seed=seed)
        origin = "one layer of an untrained model on a smooth random video"
    title = f"block map of {_words(method)}"
    draw_layout(first, drawn, title=name)
    draw_block_map(second, seen.blocks, title=title, origin=origin)
    return [f"{first}: {name}", f"{second}: {title}; {origin}"]


def _words(method: Method) -> str:
    fields = dc.fields(method)
    changed = [f"{f.name}={value}" for f in fields if (value := getattr(method, f.name)) != f.default]
    return ", ".join([method.key, *changed])


def _layout(
    method: Method, grid: Grid, kind: str, tile: tuple[int, int, int] | None, block: int | None, layer: int
) -> tuple[Layout, str]:
    if kind not in get_args(Kind):
        raise ValueError(f"--layout must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if tile is not None and kind != "tile":
        raise ValueError("--tile goes with --layout tile; for the tile of a method say --set tile=4x4x4")
    if block is not None and kind == "method":
        raise ValueError("--block goes with --layout tile or raster; for the block of a method say --set block=64")
    if kind == "tile":
        t, h, w = tile or (4, 4, 4)
        return TileLayout(grid, tile=(t, h, w), block=block), f"tiles of {t} \u00d7 {h} \u00d7 {w} tokens"
    if kind == "raster":
        return RasterLayout(grid, block=block or 64), f"blocks of {block or 64} tokens in raster order"
    site = Site.alone(heads=2, head_dim=64, layer=layer)
    return method.layout(grid, site), f"layout of {_words(method)}"


def _embedded_map(method: Method, layer: int, seed: int) -> Seen:
    """The conditional branch's map in the middle of a generation with the embedded pipeline."""
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with apply(pipe, method) as patch, capture(patch, layers=(layer,)) as seen:
        generate(pipe, prompt=PROMPT, seed=seed, **dc.asdict(EMBEDDED))
    if not seen:
        raise ValueError(f"{method.key!r} made no sparse call in layer {layer}, so there is no map to draw")
    return min(seen, key=lambda one: abs(one.step - EMBEDDED.steps // 2))
