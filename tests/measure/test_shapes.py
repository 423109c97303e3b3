"""The scenes of the embedded model: prompts, the split, and that a drawn clip is what its scene says."""

from __future__ import annotations

import dataclasses as dc
import itertools
import math
from collections import Counter

import pytest
import torch

from vsparse.measure.shapes import (
    COLORS,
    DIRECTIONS,
    RADII,
    SHAPES,
    TRAVELS,
    Scene,
    distance,
    draw,
    held_out,
    parse,
    scenes,
    training_scenes,
)

RED = Scene(color="red", shape="circle", direction="right", background="dark")


def test_every_scene_has_its_own_prompt_and_comes_back_from_it() -> None:
    assert RED.prompt == "a red circle moving right on a dark background"
    assert len({scene.prompt for scene in scenes()}) == 144
    assert [parse(scene.prompt) for scene in scenes()] == list(scenes())


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("a red circle", "prompt must have the form 'a red circle moving right"),
        ("a pink circle moving right on a dark background", "color must be one of red, .*'pink'"),
        ("a red circle moving right on a dark background.", "prompt must have the form"),
    ],
)
def test_other_prompts_are_refused(prompt: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(prompt)


def test_the_split_holds_out_combinations_but_no_pair_of_words() -> None:
    seen, unseen = training_scenes(), held_out()
    assert sorted(scene.prompt for scene in (*seen, *unseen)) == sorted(scene.prompt for scene in scenes())
    assert len(unseen) == 24
    names = [field.name for field in dc.fields(Scene)]
    for name in names:
        counts = Counter(getattr(scene, name) for scene in unseen)
        assert len(set(counts.values())) == 1, counts  # every word equally often
    for pair in itertools.combinations(names, 2):
        known, asked = ({tuple(getattr(scene, name) for name in pair) for scene in part} for part in (seen, unseen))
        assert asked <= known


def test_a_clip_depends_on_its_number_alone() -> None:
    mixed = scenes()[::13]
    clips = draw(mixed, seed=3, size=16, frames=3)
    assert clips.dtype == torch.float32
    assert clips.shape == (len(mixed), 3, 3, 16, 16)
    assert float(clips.min()) >= -1
    assert float(clips.max()) <= 1
    torch.manual_seed(1)
    assert torch.equal(draw(mixed[4:6], seed=3, first=4, size=16, frames=3), clips[4:6])
    assert not torch.equal(draw(mixed, seed=4, size=16, frames=3), clips)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_the_area_of_its_circle_around_its_centre_of_mass(shape: str) -> None:
    """By counting cells of a fine grid: only those that the outline crosses can be wrong."""
    cells, width, radius = 1024, 4.0, 1.0
    axis = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells - 0.5) * width
    x, y = axis.expand(cells, cells), axis[:, None].expand(cells, cells)
    far = distance(shape, x, y, torch.tensor(radius))
    cell = (width / cells) ** 2
    inside, crossed = far < 0, far.abs() < width / cells
    assert abs(float(inside.sum()) * cell - math.pi) <= float(crossed.sum()) * cell
    for along in (x, y):
        assert abs(float(along[inside].sum()) * cell) <= float((along[crossed].abs()).sum()) * cell


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_shape_crosses_the_picture_inside_it(direction: str) -> None:
    asked = [dc.replace(scene, direction=direction) for scene in scenes()[:: len(DIRECTIONS) * 2]]
    clips = draw(asked, seed=0, size=64, frames=5)
    for scene, clip in zip(asked, clips, strict=True):
        color = torch.tensor(COLORS[scene.color])[:, None, None, None] * 2 - 1
        full = (clip - color).abs().amax(0) < 1e-6  # pixels wholly inside
        assert not full[:, (0, -1)].any()
        assert not full[:, :, (0, -1)].any()
        y, x = (
            grid.to(torch.float64) / 64 for grid in torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        )
        center = torch.stack([torch.stack((x[mask].mean(), y[mask].mean())) for mask in full])
        way = (center[-1] - center[0]) @ torch.tensor(DIRECTIONS[direction], dtype=torch.float64)
        assert TRAVELS[0] - 1 / 64 <= float(way) <= TRAVELS[1] + 1 / 64
        assert float(full.float().mean((1, 2)).amax()) <= math.pi * RADII[1] ** 2


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="draw needs scenes"):
        draw([], seed=0)
    with pytest.raises(ValueError, match="frames=0"):
        draw([RED], seed=0, frames=0)
