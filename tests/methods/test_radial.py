"""Radial attention: the rule token by token, its published form, blocks, text, refusals."""

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
from vsparse.methods.radial import LogDecay, Radial

VIDEO = vsparse.Grid(t=7, h=3, w=5)
TEXT = vsparse.Grid(t=7, h=3, w=5, text_after=10)
BEFORE = vsparse.Grid(t=7, h=3, w=5, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
METHOD = Radial(decay_factor=0.5, least=2, block=4)
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)


def rule_by_hand(method: Radial, grid: vsparse.Grid) -> Tensor:
    """``[N, N]`` bool: the rule of the docstring for each pair of tokens; text sees and is seen."""
    s = grid.h * grid.w
    keep = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for q in range(grid.t * s):
        for k in range(grid.t * s):
            distance, gap = abs(q // s - k // s), abs(q % s - k % s)
            reach = 2 ** math.floor(math.log2(s) + 1) / 2 ** math.floor(math.log2(max(distance, 0.5)) + 1)
            width = max(method.decay_factor * reach, method.least)
            far = reach < method.least and distance % int(method.least / reach) != 0
            if distance == 0:
                seen = True
            elif distance == 1:
                seen = gap <= method.adjacent * s
            else:
                seen = gap <= width and not far
            keep[grid.text_before + q, grid.text_before + k] = seen or k // s < method.sink_frames
    return keep


@given(
    grid=st.builds(vsparse.Grid, t=st.integers(1, 7), h=st.integers(1, 4), w=st.integers(1, 4)),
    method=st.builds(
        Radial,
        decay_factor=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
        adjacent=st.sampled_from([0.0, 0.5, 1.0]),
        sink_frames=st.integers(0, 2),
        least=st.integers(1, 12),
        block=st.integers(1, 6),
    ),
)
def test_blocks_hold_exactly_the_kept_pairs(grid: vsparse.Grid, method: Radial) -> None:
    one = Driven(method, grid)
    keep = rule_by_hand(method, grid)
    assert torch.equal(method.static_pattern(one.site).token_mask(grid), keep)
    member = torch.nn.functional.one_hot(one.token_blocks(), one.layout.blocks).double()
    found = method.static_map(one.layout, one.site).validate()  # type: ignore[union-attr]
    assert torch.equal(found.to_mask()[0, 0], member.T @ keep.double() @ member > 0)
    assert method.predicted_density(one.layout, one.site) == float(found.density())


@GRIDS
def test_attention_by_hand(grid: vsparse.Grid) -> None:
    q, k, v = tensors(grid, batch=2)
    one = Driven(METHOD, grid, LENGTHS if grid.text else None)
    found = one(q, k, v)
    keep = rule_by_hand(METHOD, grid)
    valid = one.valid()[:, None, None] & one.valid()[:, None, :, None]
    assert bool((one.keep() | ~(keep & valid)).all()), "a pair of the rule is lost"
    assert 0.2 < float(one.maps[0].density().mean()) < 0.9
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), one.keep()))
    one = Driven(Radial(decay_factor=0.5, least=2, block=1), grid, LENGTHS if grid.text else None)
    one(q, k, v)
    assert torch.equal(one.keep(), (keep & valid).expand(-1, HEADS, -1, -1))


def test_the_mask_follows_the_shape_back_and_forth() -> None:
    """The released code keeps the mask of the first shape. 147 tokens are no multiple of 128, and none is dropped."""
    grids = [vsparse.Grid(t=7, h=3, w=7), vsparse.Grid(t=3, h=7, w=7), vsparse.Grid(t=7, h=3, w=7)]
    maps = []
    for grid in grids:
        one = Driven(Radial(decay_factor=0.5, least=2, block=16), grid)
        q, k, v = tensors(grid)
        one(q, k, v)
        assert one.keep().shape[-1] == grid.video
        assert bool((one.keep() | ~rule_by_hand(one.method, grid)).all())  # type: ignore[arg-type]
        maps.append(one.maps[0].to_mask())
    assert torch.equal(maps[0], maps[2])
    assert not torch.equal(maps[0], maps[1])


def test_widths_of_the_published_models() -> None:
    """Wan 2.1 at 720p has 3600 positions in a frame: full, half, then max(0.2 * 4096 / 2^bits, 128)."""
    grid = vsparse.Grid(t=40, h=45, w=80)
    wan = LogDecay(decay_factor=0.2, adjacent=0.5, least=128)
    assert [wan(d, grid) for d in range(10)] == [3600, 1800, 204, 204, 128, 128, 128, 128, 128, 128]
    # A reach of 64 (32 to 39 frames away) halves the frames that are seen.
    assert [wan(d, grid) for d in range(31, 37)] == [128, 128, -1, 128, -1, 128]
    hunyuan = LogDecay(decay_factor=0.95, adjacent=1.0, least=128)
    assert [hunyuan(d, grid) for d in (1, 2, 4, 8, 16)] == [3600, 972, 486, 243, 128]


def test_density_falls_with_length() -> None:
    """O(n log n): twice the frames, well below twice the share; about a quarter of Wan 2.1 at 720p is kept."""
    shares = []
    for frames in (21, 41):
        one = Driven(Radial(), vsparse.Grid(t=frames, h=45, w=80))
        shares.append(one.method.predicted_density(one.layout, one.site))
    assert 0.2 < shares[0] < 0.3
    assert shares[1] < 0.75 * shares[0]


def test_defaults_are_those_of_wan() -> None:
    schedule = Radial.default_schedule
    assert [schedule.phase(step=s, steps=50, layer=1, filled=False) for s in (11, 12)] == ["dense", "search"]
    assert schedule.dense_layer(0)
    assert not schedule.dense_layer(1)
    assert Radial() == Radial(decay_factor=0.2, adjacent=0.5, sink_frames=1, least=128, block=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_factor": -1}, "radial: decay_factor must be a number >= 0, got -1"),
        ({"decay_factor": math.nan}, "radial: decay_factor"),
        ({"adjacent": "half"}, "radial: adjacent"),
        ({"sink_frames": -1}, "radial: sink_frames must be an integer >= 0"),
        ({"least": 0}, "radial: least must be an integer >= 1"),
        ({"block": 0}, "block"),
    ],
)
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Radial(**options)
