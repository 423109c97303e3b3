"""Block maps caught in a running model."""

from __future__ import annotations

import pytest
import tiny_pipelines
import torch

import vsparse
from vsparse import Grid
from vsparse.measure.capture import capture, random_map
from vsparse.methods import get_method


def test_capture_sees_every_call_and_changes_nothing() -> None:
    built = tiny_pipelines.wan()
    with vsparse.apply(built[0], "vsa", density=0.5) as patch:
        before = tiny_pipelines.run(built)
        with capture(patch, layers=(1,)) as seen:
            during = tiny_pipelines.run(built)
        after = tiny_pipelines.run(built)
        assert all("tally" not in site.__dict__ for site in patch.sites)
        density = patch.stats()["sites"]["transformer.blocks.1.attn1"]
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert [one.step for one in seen] == [0, 0, 1, 1]
    assert {one.site.layer for one in seen} == {1}
    assert torch.stack([one.blocks.density().mean() for one in seen]).mean() == pytest.approx(density)


def test_capture_refuses_layers_that_are_not_there() -> None:
    patch = vsparse.apply(tiny_pipelines.wan()[0], "vsa")
    with pytest.raises(ValueError, match="no patched layer"), capture(patch, layers=(7,)):
        pass


@pytest.mark.parametrize("grid", [Grid(t=2, h=8, w=8), Grid(t=2, h=8, w=8, text_after=9)])
@pytest.mark.parametrize("key", ["vsa", "adaspa"])
def test_random_map_is_sparse_repeats_and_leaves_the_generator(key: str, grid: Grid) -> None:
    method = get_method(key)(density=0.3)
    state = torch.random.get_rng_state()
    first, second = (random_map(method, grid, heads=2) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.blocks.to_mask(), second.blocks.to_mask())
    assert float(first.blocks.density().mean()) < 1


def test_random_map_refuses_in_words() -> None:
    with pytest.raises(ValueError, match="no sparse call"):
        random_map(get_method("dense")(), Grid(t=2, h=8, w=8))
    with pytest.raises(ValueError, match="at most 20,000 tokens"):
        random_map(get_method("vsa")(), Grid(t=21, h=30, w=52))
    with pytest.raises(ValueError, match="both sides"):
        random_map(get_method("vsa")(), Grid(t=2, h=8, w=8, text_before=1, text_after=1))
