"""Efficient-vDiT's attention tile: the rule by hand, its published densities, the search, text, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_site import HEADS, Driven, attention, law, tensors
from torch import Tensor

import vsparse
from vsparse.methods.attention_tile import AttentionTile, FrameTiles, search_global_frames
from vsparse.methods.samples import Sample

VIDEO = vsparse.Grid(t=6, h=3, w=5)
TEXT = vsparse.Grid(t=6, h=3, w=5, text_after=10)
BEFORE = vsparse.Grid(t=6, h=3, w=5, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)


def frames_by_hand(frames: int, count: int) -> list[list[bool]]:
    chosen = {math.floor(i * frames / count) for i in range(count)} if count < frames else set(range(frames))
    return [[q == k or q in chosen or k in chosen for k in range(frames)] for q in range(frames)]


def tokens_by_hand(grid: vsparse.Grid, count: int) -> Tensor:
    """``[N, N]`` bool; text sees and is seen."""
    keep = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    video = slice(grid.text_before, grid.text_before + grid.video)
    frames = torch.tensor(frames_by_hand(grid.t, count))
    keep[video, video] = frames.repeat_interleave(grid.frame, 0).repeat_interleave(grid.frame, 1)
    return keep


@given(
    grid=st.builds(vsparse.Grid, t=st.integers(1, 9), h=st.integers(1, 4), w=st.integers(1, 4)),
    count=st.integers(1, 10),
    block=st.integers(1, 6),
)
def test_blocks_hold_exactly_the_kept_pairs(grid: vsparse.Grid, count: int, block: int) -> None:
    """No block straddles two frames, whatever the frame size, so nothing but the tiles is computed."""
    one = Driven(AttentionTile(global_frames=count, block=block), grid)
    keep = tokens_by_hand(grid, count)
    one(*tensors(grid))
    assert torch.equal(one.keep()[0], keep.expand(HEADS, -1, -1))
    assert float(one.maps[0].density().mean()) == float(keep.double().mean())


@GRIDS
@pytest.mark.parametrize("count", [1, 3, 6, 99])
def test_output(grid: vsparse.Grid, count: int) -> None:
    q, k, v = tensors(grid, batch=2)
    one = Driven(AttentionTile(global_frames=count, block=4), grid, LENGTHS if grid.text else None)
    found = one(q, k, v)
    valid = one.valid()
    keep = (valid[:, None, None] & valid[:, None, :, None] & tokens_by_hand(grid, count)).expand(-1, HEADS, -1, -1)
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep))


@pytest.mark.parametrize(
    ("frames", "count", "published"),
    [
        (8, 4, 0.1760), (8, 3, 0.2988), (8, 2, 0.4547), (8, 1, 0.6438),
        (24, 12, 0.2151), (24, 8, 0.4030), (24, 6, 0.5188), (24, 4, 0.6498), (24, 3, 0.7205),
    ],
)  # fmt: skip
def test_published_sparsity(frames: int, count: int, published: float) -> None:
    """The closed form holds exactly; the paper's table lies 0.8 to 1.5 points below it."""
    place = torch.arange(frames)
    kept = FrameTiles(count=count)(place[:, None], place[None])
    dropped = (frames - count) * (frames - count - 1)
    assert int((~kept).sum()) == dropped
    assert 0.005 < dropped / frames**2 - published < 0.015


def test_a_number_for_each_layer() -> None:
    method = AttentionTile(global_frames=(1, 2, 6), block=4)
    for layer, count in enumerate((1, 2, 6)):
        one = Driven(method, VIDEO, layer=layer, layers=3)
        one(*tensors(VIDEO))
        assert torch.equal(one.keep()[0, 0], tokens_by_hand(VIDEO, count))


# ---- search ------------------------------------------------------------------------------------------------------


def samples(grid: vsparse.Grid, sharp: float, seed: int = 0) -> list[Sample]:
    """Attention that stays in its own frame, the more so the sharper it is."""
    found = []
    for i in range(2):
        q, k, v = tensors(grid, seed=seed + i, scale=0.3)
        frame = torch.nn.functional.one_hot(torch.arange(grid.video) // grid.frame, 8).float() * sharp
        q[0, grid.text_before :][: grid.video] += frame[:, None]
        k[0, grid.text_before :][: grid.video] += frame[:, None]
        found.append(Sample(grid=grid, q=q, k=k, v=v, text_length=LENGTHS[:1] if grid.text else None))
    return found


def error(sample: Sample, count: int) -> float:
    """Relative L1 error by hand."""
    valid = torch.ones(sample.grid.tokens, dtype=torch.bool)
    if sample.text_length is not None:
        valid[sample.grid.video + int(sample.text_length[0]) :] = False
    q, k, v = (x.double() for x in (sample.q, sample.k, sample.v))
    pairs = valid & valid[:, None]
    keep = pairs & tokens_by_hand(sample.grid, count)
    full, part = (attention(q, k, v, x.expand(1, HEADS, -1, -1)) for x in (pairs, keep))
    return float(((full - part).abs().sum((0, 1, 3)) / full.abs().sum((0, 1, 3))).mean())


@pytest.mark.parametrize("grid", [VIDEO, TEXT], ids=["video", "text"])
def test_search_takes_the_fewest_frames_within_the_bound(grid: vsparse.Grid) -> None:
    layers = [samples(grid, 0.0), samples(grid, 3.0), samples(grid, 6.0)]
    for bound in (0.02, 0.1, 0.3):
        found = search_global_frames(layers, bound=bound, block=4)
        for layer, count in zip(layers, found, strict=True):
            errors = {n: sum(error(sample, n) for sample in layer) / len(layer) for n in range(1, grid.t)}
            assert count == min((n for n, x in errors.items() if x <= bound), default=grid.t)
    assert found[0] > found[1] >= found[2], "the sharper the frames, the fewer are needed"
    AttentionTile(global_frames=found)


def test_search_falls_back_to_all_frames() -> None:
    assert search_global_frames([samples(VIDEO, 0.0)], bound=1e-9, candidates=[1, 2]) == (VIDEO.t,)


def test_search_refuses_in_words() -> None:
    calm = samples(VIDEO, 1.0)
    with pytest.raises(ValueError, match="bound must be positive, got 0"):
        search_global_frames([calm], bound=0.0)
    with pytest.raises(ValueError, match="no layer has calibration samples"):
        search_global_frames([], bound=0.1)
    with pytest.raises(ValueError, match="layer 1: no calibration samples were given"):
        search_global_frames([calm, []], bound=0.1)
    other = samples(vsparse.Grid(t=5, h=3, w=5), 1.0)
    with pytest.raises(ValueError, match="layer 0: calibration samples must be of one shape"):
        search_global_frames([[calm[0], other[0]]], bound=0.1)
    with pytest.raises(ValueError, match=r"sample: k must be \[B, N=90, H, D\]"):
        Sample(grid=VIDEO, q=calm[0].q, k=calm[0].k[:, 1:], v=calm[0].v)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, 2.0, True, (), (1, 0), "3"])
def test_refused_in_words(count: Any) -> None:
    with pytest.raises(ValueError, match="attention_tile: global_frames must be an integer >= 1 or a tuple"):
        AttentionTile(global_frames=count)


def test_a_tuple_for_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="global_frames has 2 entries, and root has 3 layers"):
        Driven(AttentionTile(global_frames=(1, 2)), VIDEO, layers=3)


def test_defaults() -> None:
    assert AttentionTile() == AttentionTile(global_frames=3, block=64)
    assert AttentionTile(global_frames=[1, 2]).global_frames == (1, 2)  # type: ignore[arg-type]
