"""SVG: the bands and their width by hand, the choice of every head, the sampled queries, text, refusals."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_site import DIM, HEADS, Driven, attention, law, tensors
from oracle import assert_identity
from torch import Tensor

import vsparse
from vsparse.methods import Call, chance
from vsparse.methods.svg import SVG, BandWidth, SVGAttention

VIDEO = vsparse.Grid(t=5, h=3, w=7)
TEXT = vsparse.Grid(t=5, h=3, w=7, text_after=10)
BEFORE = vsparse.Grid(t=5, h=3, w=7, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
METHOD = SVG(density=0.4, rows=12, block=4)
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)


def driven(method: SVG, grid: vsparse.Grid, **site: Any) -> Driven:
    return Driven(method, grid, LENGTHS if grid.text else None, **site)


def bands_by_hand(method: SVG, grid: vsparse.Grid) -> Tensor:
    """``[2, N, N]`` bool: the spatial and the temporal rule for each pair of tokens; text sees and is seen."""
    width = BandWidth(density=method.density, block=method.block)(grid)
    keep = torch.ones(2, grid.tokens, grid.tokens, dtype=torch.bool)
    frame = grid.h * grid.w
    for q in range(grid.video):
        for k in range(grid.video):
            moved = [x % frame * grid.t + x // frame for x in (q, k)]
            sink = k // frame < method.sink_frames
            at = grid.text_before + q, grid.text_before + k
            keep[0, at[0], at[1]] = abs(q - k) <= width or sink
            keep[1, at[0], at[1]] = abs(moved[0] - moved[1]) <= width or sink
    return keep


def in_blocks(keep: Tensor, one: Driven) -> Tensor:
    """A rule over tokens, spread to whole blocks."""
    where = one.token_blocks()
    blocks = torch.zeros(2, one.layout.blocks, one.layout.blocks, dtype=torch.bool)
    pairs = keep.nonzero()
    blocks[pairs[:, 0], where[pairs[:, 1]], where[pairs[:, 2]]] = True
    return blocks[:, where][:, :, where]


@GRIDS
@pytest.mark.parametrize("sink_frames", [0, 1])
def test_candidates_by_hand(grid: vsparse.Grid, sink_frames: int) -> None:
    method = METHOD.replace(sink_frames=sink_frames)
    assert isinstance(method, SVG)
    one = driven(method, grid)
    keep = bands_by_hand(method, grid)
    for found, wanted in zip(method.static_pattern(one.site), keep, strict=True):
        assert torch.equal(found.token_mask(grid), wanted)
    assert one.call.static is not None
    where = one.token_blocks()
    found = one.call.static.validate().to_mask()[0][:, where][:, :, where]
    assert torch.equal(found, in_blocks(keep, one))


@GRIDS
@pytest.mark.parametrize("step", [-1, 3])
def test_heads_take_the_band_with_the_smaller_error(grid: vsparse.Grid, step: int) -> None:
    """Under the blocks that are then executed: the released code tries bands of another width."""
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    one = driven(METHOD, grid)
    one.call = _at_step(one, step)
    one(q, k, v)
    valid = one.valid()
    pairs = valid[:, None, None] & valid[:, None, :, None]
    token = _sampled(one)
    full = attention(q, k, v, pairs.expand(-1, HEADS, -1, -1))[:, token]
    masks = in_blocks(bands_by_hand(METHOD, grid), one)
    errors = [
        (attention(q, k, v, (pairs & mask).expand(-1, HEADS, -1, -1))[:, token] - full).square().sum((1, 3))
        for mask in masks
    ]
    near, far = errors
    assert float((near / far).log().abs().min()) > 1e-5, "a tie would decide"
    wanted = torch.where((far < near)[..., None, None], masks[1], masks[0])
    assert torch.equal(one.keep(), wanted & pairs)


def _at_step(one: Driven, step: int) -> Call:
    return dc.replace(one.call, step=torch.tensor(step))


def _sampled(one: Driven) -> Tensor:
    assert isinstance(one.module, SVGAttention)
    method, grid = one.module.method, one.grid
    token = chance.spread(method.rows, grid.video, salt=one.module.salt, step=one.call.step)
    return grid.text_before + token


def test_heads_that_look_in_space_and_heads_that_look_in_time() -> None:
    grid = vsparse.Grid(t=6, h=4, w=6)
    generator = torch.Generator().manual_seed(0)
    frame, position = torch.arange(grid.video) // grid.frame, torch.arange(grid.video) % grid.frame
    k = torch.zeros(1, grid.video, HEADS, 24)
    k[0, :, 0, :6] = torch.nn.functional.one_hot(frame, 6).float()
    k[0, :, 1] = torch.nn.functional.one_hot(position, 24).float()
    v = torch.randn(k.shape, generator=generator)
    one = Driven(SVG(density=0.4, sink_frames=0, block=4), grid, head_dim=24, dim=48)
    one(40 * k, k, v)
    spatial, temporal = in_blocks(bands_by_hand(one.method, grid), one)  # type: ignore[arg-type]
    assert torch.equal(one.keep()[0], torch.stack((spatial, temporal)))


@GRIDS
def test_output_and_gradients_with_the_map_fixed(grid: vsparse.Grid) -> None:
    inputs = tensors(grid, batch=2)
    one = driven(METHOD, grid)
    one(*(x.double() for x in inputs))
    keep = one.keep()
    assert_identity(lambda *x: one(*x), lambda *x: attention(*x, keep), inputs)


def test_on_one_frame_the_bands_are_one() -> None:
    """Without a temporal axis what is near in time is what is near in space: either choice computes the same."""
    one = driven(METHOD, vsparse.Grid(t=1, h=6, w=7))
    assert one.call.static is not None
    spatial, temporal = one.call.static.to_mask()[0]
    assert torch.equal(spatial, temporal)
    assert not bool(METHOD.replace(sink_frames=0).static_map(one.layout, one.site).to_mask().all())  # type: ignore[union-attr]


@GRIDS
def test_density_one_keeps_everything(grid: vsparse.Grid) -> None:
    q, k, v = tensors(grid, batch=2)
    one = driven(SVG(density=1.0, sink_frames=0, block=4), grid)
    found = one(q, k, v)
    assert float(one.maps[0].density().min()) == 1.0
    keep = one.valid()[:, None, None] & one.valid()[:, None, :, None]
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep.expand(-1, HEADS, -1, -1)))


# ---- sampled queries ---------------------------------------------------------------------------------------------


@given(
    grid=st.builds(
        vsparse.Grid, t=st.integers(1, 9), h=st.integers(1, 9), w=st.integers(1, 9), text_before=st.integers(0, 9)
    ),
    rows=st.integers(1, 80),
    step=st.integers(-1, 50),
)
def test_queries_come_from_the_whole_video(grid: vsparse.Grid, rows: int, step: int) -> None:
    """One from each of equal parts: the released code draws from the first 10 000 tokens, the first few frames."""
    one = Driven(SVG(rows=rows, block=4), grid)
    one.call = _at_step(one, step)
    token = _sampled(one) - grid.text_before
    count = min(rows, grid.video)
    assert token.shape == (count,)
    for i, place in enumerate(token.tolist()):
        assert i * grid.video // count <= place < (i + 1) * grid.video // count


def test_queries_follow_step_layer_and_seed_alone() -> None:
    grid = vsparse.Grid(t=9, h=20, w=20)
    seen = set()
    for seed, layer, step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]:
        drawn = []
        for _ in range(2):
            one = Driven(SVG(seed=seed), grid, layer=layer, layers=2)
            one.call = _at_step(one, step)
            drawn.append(tuple(_sampled(one).tolist()))
        assert drawn[0] == drawn[1]
        seen.add(drawn[0])
    assert len(seen) == 5


def test_the_global_generator_does_not_move() -> None:
    before = torch.get_rng_state()
    driven(METHOD, VIDEO)(*tensors(VIDEO))
    assert torch.equal(torch.get_rng_state(), before)


# ---- width -------------------------------------------------------------------------------------------------------


def test_width_as_published() -> None:
    """A density of 0.25 over 33 frames is 4.42 frames on either side (algorithm of the released code)."""
    grid = vsparse.Grid(t=33, h=45, w=80)
    assert BandWidth(density=0.25, block=1)(grid) / grid.frame == pytest.approx(4.42, abs=0.005)
    rounded = BandWidth(density=0.25, block=128)(grid)
    assert rounded % 128 == 0
    assert abs(rounded - BandWidth(density=0.25, block=1)(grid)) <= 64


@given(
    grid=st.builds(vsparse.Grid, t=st.integers(1, 6), h=st.integers(1, 6), w=st.integers(1, 6)),
    text=st.integers(0, 12),
    density=st.floats(0.01, 1.0),
)
def test_band_and_text_take_the_density(grid: vsparse.Grid, text: int, density: float) -> None:
    """Counted pair by pair; the formula leaves the diagonal out and is rounded; no band is narrower than a block."""
    grid = vsparse.Grid(t=grid.t, h=grid.h, w=grid.w, text_after=text)
    width = BandWidth(density=density, block=1)(grid)

    def share(width: int) -> float:
        band = sum(grid.video - abs(d) for d in range(-width, width + 1) if abs(d) < grid.video)
        return (band + 2 * grid.tokens * text - text**2) / grid.tokens**2

    assert width == 1 or share(width - 2) <= density + 1e-9
    assert density <= share(width + 1) + 1e-9


def test_predicted_density_is_that_of_the_executed_maps() -> None:
    grid = vsparse.Grid(t=5, h=6, w=8, text_after=9)
    method = SVG(density=0.35, sink_frames=0, block=8)
    one = Driven(method, grid)
    one(*tensors(grid))
    keep = bands_by_hand(method, grid)
    masks = in_blocks(keep, one).double().mean((1, 2))
    assert method.predicted_density(one.layout, one.site) == float(masks.mean())
    taken = {round(float(x), 9) for x in one.maps[0].density().flatten()}
    assert taken <= {round(float(x), 9) for x in masks}


# ---- defaults, refusals ------------------------------------------------------------------------------------------


def test_defaults_are_published() -> None:
    assert SVG() == SVG(density=0.3, rows=64, sink_frames=1, block=64, seed=0)
    assert SVG.default_schedule == vsparse.Schedule(dense_steps=0.2, dense_layers=1)
    assert DIM == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "svg: density must be a number in"),
        ({"density": math.nan}, "svg: density"),
        ({"rows": 0}, "svg: rows must be an integer >= 1, got 0"),
        ({"rows": 2.0}, "svg: rows"),
        ({"sink_frames": -1}, "svg: sink_frames must be an integer >= 0"),
        ({"seed": -1}, "svg: seed"),
        ({"block": 0}, "block"),
    ],
)
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVG(**options)
