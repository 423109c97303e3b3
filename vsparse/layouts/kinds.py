"""The kinds of layout, built from tables that are cached on ints."""

from __future__ import annotations

import dataclasses as dc
import functools
import itertools
import math
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vsparse.geometry import Grid, Segment
from vsparse.layouts.base import Layout

__all__ = ["PartitionLayout", "RasterLayout", "TileLayout"]


@dc.dataclass(frozen=True)
class _Run:
    """One tile: its tokens in order, its segment and the text tokens before it."""

    tokens: Tensor
    segment: Segment
    text_offset: int = 0


def _assemble(grid: Grid, runs: list[_Run], block: int, per_tile: int, key: tuple[object, ...]) -> dict[str, object]:
    """Lay the runs out one after another, each at the front of ``per_tile`` blocks."""
    capacity = block * per_tile
    slot_token = torch.full((len(runs), capacity), -1, dtype=torch.int64)
    for row, run in zip(slot_token, runs, strict=True):
        row[: len(run.tokens)] = run.tokens
    flat = slot_token.flatten()
    token_slot = torch.empty(grid.tokens, dtype=torch.int64)
    used = flat >= 0
    token_slot[flat[used]] = used.nonzero().squeeze(1)
    size = torch.tensor([len(run.tokens) for run in runs])[:, None]
    offset = torch.arange(per_tile)[None] * block
    length = (size - offset).clamp(0, block).to(torch.int32).flatten()
    text = torch.tensor([[run.text_offset] for run in runs])
    is_text = torch.tensor([[run.segment == Segment.TEXT] for run in runs])
    return {
        "grid": grid,
        "key": key,
        "block": block,
        "slot_token": flat[None, None],
        "token_slot": token_slot[None, None],
        "length": length[None, None],
        "segment": torch.tensor([[int(run.segment)] for run in runs], dtype=torch.int32).expand(-1, per_tile).flatten(),
        "text_offset": torch.where(is_text, text + offset, 0).to(torch.int32).flatten(),
        "blocks_per_tile": per_tile,
    }


def _text_runs(grid: Grid, capacity: int) -> tuple[list[_Run], list[_Run]]:
    before: list[_Run] = []
    after: list[_Run] = []
    seen = 0
    for segment, first, stop in grid.segments():
        if segment is not Segment.TEXT:
            continue
        for i in range(first, stop, capacity):
            tokens = torch.arange(i, min(i + capacity, stop))
            (before if first < grid.text_before else after).append(_Run(tokens, segment, seen))
            seen += len(tokens)
    return before, after


def _cubes(grid: Grid, size: tuple[int, int, int]) -> list[_Run]:
    """The video in cubes of ``size``, clipped at the edges, ordered by their corner; conditioning frames apart."""
    ids = torch.arange(grid.video).view(grid.t, grid.h, grid.w) + grid.text_before
    runs = []
    for frames, segment in (
        (range(grid.condition_frames), Segment.CONDITION),
        (range(grid.condition_frames, grid.t), Segment.VIDEO),
    ):
        corners = (frames[:: size[0]], range(0, grid.h, size[1]), range(0, grid.w, size[2]))
        for t, h, w in itertools.product(*corners):
            cube = ids[t : min(t + size[0], frames.stop), h : h + size[1], w : w + size[2]]
            runs.append(_Run(cube.reshape(-1), segment))
    return runs


@functools.lru_cache(maxsize=64)
def _tile_tables(grid: Grid, tile: tuple[int, int, int], block: int) -> dict[str, object]:
    with torch.inference_mode(False), _disable_current_modes():
        per_tile = math.ceil(math.prod(tile) / block)
        before, after = _text_runs(grid, block * per_tile)
        runs = before + _cubes(grid, tile) + after
        return _assemble(grid, runs, block, per_tile, ("tile", grid, tile, block))


@functools.lru_cache(maxsize=64)
def _partition_tables(grid: Grid, chunk: tuple[int, int, int]) -> dict[str, object]:
    with torch.inference_mode(False), _disable_current_modes():
        before, after = _text_runs(grid, grid.text or 1)
        runs = before + _cubes(grid, chunk) + after
        slot_token = torch.cat([run.tokens for run in runs])
        length = torch.tensor([len(run.tokens) for run in runs], dtype=torch.int32)
        return {
            "grid": grid,
            "key": ("partition", grid, chunk),
            "block": int(length.max()),
            "slot_token": slot_token[None, None],
            "token_slot": slot_token.argsort()[None, None],
            "length": length[None, None],
            "segment": torch.tensor([int(run.segment) for run in runs], dtype=torch.int32),
            "text_offset": torch.zeros(len(runs), dtype=torch.int32),
            "start": (length.cumsum(0, dtype=torch.int32) - length)[None, None],
        }


@functools.lru_cache(maxsize=64)
def _raster_tables(grid: Grid, block: int, break_at: str | None) -> dict[str, object]:
    with torch.inference_mode(False), _disable_current_modes():
        before, after = _text_runs(grid, block)
        video = []
        for segment, first, stop in grid.segments():
            if segment is Segment.TEXT:
                continue
            step = grid.frame if break_at == "frame" else stop - first
            for low in range(first, stop, step):
                high = min(low + step, stop)
                video += [_Run(torch.arange(i, min(i + block, high)), segment) for i in range(low, high, block)]
        return _assemble(grid, before + video + after, block, 1, ("raster", grid, block, break_at))


def positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _three_sizes(name: str, value: tuple[int, int, int]) -> tuple[int, int, int]:
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise ValueError(f"{name} must be three positive integers (frames, rows, columns), got {value!r}")
    t, h, w = (positive(f"{name}[{axis}]", size) for axis, size in enumerate(value))
    return t, h, w


class TileLayout(Layout):
    """3-D tiles of any size: the tokens of a tile are contiguous, ragged tiles are packed at the front of their slots.

    Tiles are ordered by ``(t, h, w)`` of their corner, tokens inside a tile in raster order over the clipped extents
    (VSA, arXiv 2505.13389, section 3: full tiles give its closed form). Text tokens keep their order in blocks of
    their own, before or after the video; conditioning frames are tiled apart.

    Args:
        grid: The lattice.
        tile: Frames, rows and columns of a tile; sizes beyond the grid mean the whole axis.
        block: Slots of a block; a tile takes ``ceil(prod(tile) / block)`` blocks. None: one block per tile.

    Raises:
        ValueError: a size that is not a positive integer.
    """

    def __init__(self, grid: Grid, *, tile: tuple[int, int, int] = (4, 4, 4), block: int | None = None) -> None:
        tile = _three_sizes("tile", tile)
        tables = _tile_tables(grid, tile, math.prod(tile) if block is None else positive("block", block))
        super().__init__(**tables)  # type: ignore[arg-type]


class PartitionLayout(Layout):
    """VMoBA's chunks: the tokens of a chunk are contiguous, chunks have ragged starts and lengths, nothing is padded.

    Args:
        grid: The lattice.
        chunk: Frames, rows and columns of a chunk; sizes beyond the grid mean the whole axis. ``(n, h, w)`` is the 1-D
            temporal partition, ``(t, a, b)`` the 2-D spatial one, ``(n, a, b)`` the 3-D one (arXiv 2506.23858, section
            3.2). Edges may be ragged, which the paper's code does not allow. All text is one chunk.

    Raises:
        ValueError: a size that is not a positive integer.
    """

    def __init__(self, grid: Grid, *, chunk: tuple[int, int, int]) -> None:
        t, h, w = _three_sizes("chunk", chunk)
        sizes = (min(t, grid.t), min(h, grid.h), min(w, grid.w))
        super().__init__(**_partition_tables(grid, sizes))  # type: ignore[arg-type]


class RasterLayout(Layout):
    """Host order cut into blocks of consecutive tokens; every segment (and, if asked, every frame) starts a block.

    Args:
        grid: The lattice.
        block: Slots of a block.
        break_at: "frame" so that no block straddles two frames, or None.

    Raises:
        ValueError: ``block`` is not a positive integer, or ``break_at`` is neither "frame" nor None.
    """

    def __init__(self, grid: Grid, *, block: int = 64, break_at: Literal["frame"] | None = None) -> None:
        if break_at not in (None, "frame"):
            raise ValueError(f'break_at must be "frame" or None, got {break_at!r}')
        super().__init__(**_raster_tables(grid, positive("block", block), break_at))  # type: ignore[arg-type]
