"""Hypothesis strategies: grids, layouts, blockings and maps with every awkward corner."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from vsparse import BlockMap, CurveLayout, Grid, PartitionLayout, RasterLayout, TileLayout
from vsparse.layouts import Blocking, Layout

seeds = st.integers(0, 2**31 - 1)


@st.composite
def grids(draw: st.DrawFn, most: int = 5, text: int = 9) -> Grid:
    """Small ragged grids, with text before, after or not at all, and conditioning frames."""
    t, h, w = (draw(st.integers(1, most)) for _ in range(3))
    before, after = draw(st.sampled_from([(0, 0), (0, 1), (1, 0)]))
    amount = draw(st.integers(1, text))
    return Grid(
        t=t,
        h=h,
        w=w,
        text_before=before * amount,
        text_after=after * amount,
        condition_frames=draw(st.integers(0, t - 1)),
    )


@st.composite
def layouts(draw: st.DrawFn, grid: Grid) -> Layout:
    """Every kind of layout, tiles over several blocks included."""
    kind = draw(st.sampled_from(["tile", "blocks", "raster", "frame", "partition", "curve"]))
    size = tuple(draw(st.integers(1, 4)) for _ in range(3))
    block = draw(st.integers(1, 9))
    if kind == "tile":
        return TileLayout(grid, tile=size)
    if kind == "blocks":
        return TileLayout(grid, tile=size, block=block)
    if kind == "partition":
        return PartitionLayout(grid, chunk=size)
    if kind == "curve":
        return CurveLayout(grid, block=block)
    return RasterLayout(grid, block=block, break_at="frame" if kind == "frame" else None)


@st.composite
def text_lengths(draw: st.DrawFn, grid: Grid, batch: int) -> Tensor | None:
    """Valid text tokens of each sample, or None."""
    if not grid.text or draw(st.booleans()):
        return None
    return torch.tensor([draw(st.integers(0, grid.text)) for _ in range(batch)])


def blocking(
    blocks: int, block: int, *, seed: int, lead: tuple[int, int] = (1, 1), ragged: bool = False, fresh: bool = False
) -> Blocking:
    """Random lengths from 0 to ``block``, the first block empty once in a while; padded grid or ragged starts.

    Args:
        ragged: Give starts, with the blocks packed one after another. fresh: every block full.
    """
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(0, block + 1, (*lead, blocks), generator=generator, dtype=torch.int32)
    if fresh:
        length = torch.full_like(length, block)
    if seed % 3 == 0:
        length[..., 0] = 0
    if seed % 5 == 0:
        length[..., -1] = 1
    if not ragged:
        return Blocking(length=length, block=block)
    room = torch.randint(0, 3, (1, 1, blocks), generator=generator, dtype=torch.int32)
    most = length.amax((0, 1), keepdim=True) + room
    return Blocking(length=length, block=block, start=(most.cumsum(-1) - most).to(torch.int32))


def slots(b: Blocking) -> int:
    """S of a blocking."""
    if b.start is None:
        return b.blocks * b.block
    return int((b.start + b.block).max())


def block_map(q: Blocking, k: Blocking, *, seed: int, lead: tuple[int, int] = (1, 1), density: float = 0.4) -> BlockMap:
    """Random lists with empty rows and full rows; tight capacity unless a row is nearly full."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(*lead, q.blocks, k.blocks, generator=generator) < density
    row = torch.rand(*lead, q.blocks, 1, generator=generator)
    keep = (keep | (row > 0.9)) & (row > 0.1)
    count = keep.sum(-1)
    listed = torch.where(count == k.blocks, 0, count)
    return BlockMap.from_mask(keep, q, k, capacity=max(1, int(listed.max())))
