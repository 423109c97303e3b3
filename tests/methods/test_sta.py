"""STA: windows of tiles by hand, constant counts, heads, text, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_site import HEADS, Driven, attention, law, tensors, tiles
from torch import Tensor

import vsparse
from vsparse.methods.sta import STA

VIDEO = vsparse.Grid(t=5, h=7, w=6)
TEXT = vsparse.Grid(t=5, h=7, w=6, text_after=10)
BEFORE = vsparse.Grid(t=5, h=7, w=6, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
TILE = (2, 2, 2)
ONE = STA(window=(1, 3, 3), tile=TILE, block=4)
PER_HEAD = STA(window=((1, 3, 3), (3, None, 1)), tile=TILE, block=8)
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)


def driven(method: STA, grid: vsparse.Grid) -> Driven:
    return Driven(method, grid, LENGTHS if grid.text else None)


def along(size: int | None, n: int, q: int) -> set[int]:
    """Tiles of one axis that tile ``q`` of ``n`` sees: the centre moves inward, so that the width stays."""
    if size is None or size >= n:
        return set(range(n))
    centre = min(max(q, size // 2), n - 1 - size // 2)
    return set(range(centre - size // 2, centre + size // 2 + 1))


def window_by_hand(grid: vsparse.Grid, tile: tuple[int, ...], window: tuple[int | None, ...]) -> Tensor:
    """``[N, N]`` bool over tokens, text seen by all and seeing all."""
    counts = [math.ceil(n / size) for n, size in zip((grid.t, grid.h, grid.w), tile, strict=True)]
    places = list(itertools.product(*map(range, counts)))
    members = tiles(grid, tile)  # type: ignore[arg-type]
    keep = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for q, own in zip(places, members, strict=True):
        for k, other in zip(places, members, strict=True):
            seen = all(k[a] in along(window[a], counts[a], q[a]) for a in range(3))
            keep[torch.tensor(own)[:, None], torch.tensor(other)] = seen
    return keep


@GRIDS
@pytest.mark.parametrize("method", [ONE, PER_HEAD], ids=["one window", "a window per head"])
def test_attention_by_hand(grid: vsparse.Grid, method: STA) -> None:
    q, k, v = tensors(grid, batch=2)
    one = driven(method, grid)
    found = one(q, k, v)
    windows = (method.window,) * HEADS if method is ONE else method.window
    keep = torch.stack([window_by_hand(grid, TILE, window) for window in windows])  # type: ignore[arg-type]
    valid = one.valid()
    wanted = keep & valid[:, None, None] & valid[:, None, :, None]
    assert torch.equal(one.keep(), wanted)
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), wanted))


@given(
    grid=st.builds(vsparse.Grid, t=st.integers(1, 7), h=st.integers(1, 6), w=st.integers(1, 6)),
    window=st.tuples(*[st.sampled_from([1, 3, 5, None])] * 3),
    tile=st.tuples(*[st.integers(1, 3)] * 3),
)
def test_every_row_keeps_the_product_of_the_windows(
    grid: vsparse.Grid, window: tuple[int | None, ...], tile: tuple[int, int, int]
) -> None:
    method = STA(window=window, tile=tile, block=4)  # type: ignore[arg-type]
    one = Driven(method, grid)
    counts = [math.ceil(n / size) for n, size in zip((grid.t, grid.h, grid.w), tile, strict=True)]
    each = math.prod(min(n, size or n) for n, size in zip(counts, window, strict=True))
    tiled = method.static_pattern(one.site).block_map(one.layout.tiled)  # type: ignore[union-attr]
    assert tiled.validate().count.unique().tolist() == [each]
    tokens = window_by_hand(grid, tile, window)
    blocks = one.layout.token_block[0, 0]
    assert torch.equal(method.static_map(one.layout, one.site).to_mask()[0, 0][blocks][:, blocks], tokens)  # type: ignore[union-attr]
    assert method.predicted_density(one.layout, one.site) == float(tokens.double().mean())


@pytest.mark.parametrize(("window", "density"), [((5, 5, 5), 125 / 300), ((3, 3, 3), 27 / 300), ((5, 3, 5), 75 / 300)])
def test_published_densities(window: Any, density: float) -> None:
    """HunyuanVideo at 117 frames of 768 x 1280: 58 %, 91 % and 75 % sparse."""
    one = Driven(STA(window=window), vsparse.Grid(t=30, h=48, w=80), heads=24)
    assert STA().window == (5, 5, 5)
    assert one.method.predicted_density(one.layout, one.site) == density


@GRIDS
def test_whole_axes_are_full_attention(grid: vsparse.Grid) -> None:
    """So are windows larger than the grid: they are clipped to it."""
    q, k, v = tensors(grid, batch=2)
    one = driven(STA(window=(99, None, 7), tile=TILE, block=4), grid)
    found = one(q, k, v)
    assert one.maps[0].capacity == 0
    valid = one.valid()
    keep = valid[:, None, None] & valid[:, None, :, None]
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep.expand(-1, HEADS, -1, -1)))


@pytest.mark.parametrize("frames", [1, 3])
def test_tiles_begin_anew_after_conditioning_frames(frames: int) -> None:
    grid = vsparse.Grid(t=6, h=2, w=2, condition_frames=frames)
    one = Driven(STA(window=(1, None, None), tile=(2, 2, 2), block=8), grid)
    row = one.method.static_pattern(one.site).token_mask(grid)[frames * 4]  # type: ignore[union-attr]
    assert row.view(6, 4).any(-1).nonzero().flatten().tolist() == [frames, frames + 1]
    assert one.method.static_map(one.layout, one.site).count.unique().tolist() == [1]  # type: ignore[union-attr]


@pytest.mark.parametrize("window", [(2, 3, 3), (3, 3), 3, (3, 3, -1), (True, 3, 3), (), ((3, 3, 3), (3, 3, 2)), None])
def test_windows_are_odd(window: Any) -> None:
    with pytest.raises(ValueError, match="sta: window must be three odd numbers of tiles"):
        STA(window=window)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="tile"):
        STA(tile=(6, 8, 0))
    with pytest.raises(ValueError, match=r"sta: 3 patterns for site, which has 2 heads"):
        Driven(STA(window=((1, 1, 1),) * 3), VIDEO)
    assert STA(window=[[1, 3, 3], [3, None, 1]]) == STA(window=((1, 3, 3), (3, None, 1)))  # type: ignore[arg-type]
