"""plan and cost: what is predicted is what happens, worked out by hand or executed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch

import vsparse

SIZE = {"height": 96, "width": 112, "num_frames": 5}  # a grid of 2 x 6 x 7 tokens at Wan's usual compression


# ---- plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "method"), rows.both)
def test_a_plan_says_what_apply_does_and_touches_nothing(host: str, method: str) -> None:
    model, _ = rows.build(host)
    mark, generator = rows.footprint(model), torch.get_rng_state()
    options = rows.METHODS[method].sparse
    made = vsparse.plan(model, method, **options)
    assert rows.footprint(model) == mark
    assert torch.equal(torch.get_rng_state(), generator)
    with vsparse.apply(model, method, **options) as patch:
        assert patch.plan == made
        assert made.sites == tuple(site.site for site in patch.sites)
        assert made.new_parameters == sum(x.numel() for x in patch.parameters())
        assert patch.stats()["kernel"] == made.kernel
    assert not made.skipped
    assert [site.layer for site in made.sites] == list(range(len(made.sites)))
    assert {site.layers for site in made.sites} == {len(made.sites)}


def test_a_plan_reads_well() -> None:
    pipe, _ = tiny_pipelines.wan()
    text = str(vsparse.plan(pipe, "adaspa", height=32, width=32, num_frames=5, steps=10, block=16))
    assert re.search(r"^method +AdaSpa\(density=0.2, block=16", text, re.MULTILINE)
    assert re.search(r"^grid +3 x 8 x 8 = 192 tokens$", text, re.MULTILINE)
    assert re.search(r"^attention sites +2$", text, re.MULTILINE)
    assert re.search(
        r"^attention FLOPs +\d.\d{3}e\+\d\d of \d.\d{3}e\+\d\d dense \(\d\d.\d%\), search \d", text, re.MULTILINE
    )
    assert re.search(r"^state +0.0 MiB per branch$", text, re.MULTILINE)


def test_predicted_cost_by_hand() -> None:
    """VSA at a quarter of the tiles of 2 x 6 x 8 (three full tiles, one ragged): every figure worked out."""
    model, _ = rows.build("wan")
    made = vsparse.plan(model, "vsa", height=96, width=128, num_frames=5, density=0.25, tile=(2, 4, 4), block=32)
    assert made.grid == vsparse.Grid(t=2, h=6, w=8)
    tokens, slots, tiles, layers, width = 96, 128, 4, 2, 32
    assert made.density == 1 / tiles
    assert made.cost is not None
    assert made.cost.dense == layers * 4 * width * tokens**2
    search = layers * width * (3 * tokens + 4 * tiles**2)
    assert made.cost.search == search
    assert made.cost.sparse == search + layers * 4 * width * slots**2 / tiles
    assert made.cost.density == 1 / tiles
    assert made.state_bytes == 0


def test_predicted_cost_of_a_schedule_by_hand() -> None:
    model, _ = rows.build("wan")
    made = vsparse.plan(model, "adaspa", **SIZE, steps=5, batch=2, density=0.5, block=21)
    tokens, blocks = 84, 4
    assert made.grid == vsparse.Grid(t=2, h=6, w=7)
    assert made.cost is not None
    dense = 2 * 2 * 4 * 32 * tokens**2
    assert made.cost.dense == 5 * dense
    # One exact search, one search with the cached LSE, three reuses; a search costs half of a dense attention more.
    assert made.cost.search == 2 * dense / 2
    assert made.cost.sparse == dense + 4 * dense / 2 + dense
    assert made.cost.density == pytest.approx((1 + 4 / 2) / 5)
    per_site = 2 * tokens * 2 * 4 + 2 * 2 * blocks * 1
    assert made.state_bytes == 2 * per_site


def test_a_plan_asks_once_for_equal_sites_and_not_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """svg counts in its maps to say what its search costs: 720p, 40 layers and 50 steps would take minutes."""
    method = vsparse.list_methods()["svg"]
    asked = []

    def counted(self: Any, layout: Any, site: Any, batch: int, phase: str) -> float:
        asked.append((site.layer, phase))
        return 1.0

    monkeypatch.setattr(method, "search_flops", counted)
    made = vsparse.plan(rows.build("wan", layers=3)[0], "svg", **SIZE, steps=10)
    assert asked == [(1, "search")]
    assert made.cost is not None
    assert made.cost.search == 2 * 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 48}, "give height, width and num_frames together; missing: width, num_frames"),
        ({"height": 48, "width": 56}, "missing: num_frames"),
        ({**SIZE, "height": 0}, "height must be an integer >= 1, got 0"),
        ({**SIZE, "num_frames": 0}, "num_frames must be an integer >= 1, got 0"),
        ({**SIZE, "width": -8}, "width must be an integer >= 1, got -8"),
        ({**SIZE, "width": 8}, "height=96, width=8, num_frames=5 is less than one patch"),
        ({**SIZE, "height": 96.0}, "height must be an integer >= 1, got 96.0"),
        ({**SIZE, "batch": 0}, "batch must be an integer >= 1, got 0"),
        ({**SIZE, "steps": 0}, "steps must be an integer >= 1, got 0"),
    ],
)
def test_a_plan_refuses_sizes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vsparse.plan(rows.build("wan")[0], "vsa", **options)


def test_a_plan_of_a_step_schedule_needs_the_steps() -> None:
    with pytest.raises(ValueError, match="this schedule depends on the denoising steps; give steps"):
        vsparse.plan(rows.build("wan")[0], "adaspa", **SIZE)


@pytest.mark.parametrize("method", rows.METHODS)
def test_predicted_state_is_what_is_held(method: str) -> None:
    pipe, _ = tiny_pipelines.wan()
    options = rows.METHODS[method].sparse
    made = vsparse.plan(pipe, method, height=32, width=32, num_frames=5, steps=rows.STEPS, **options)
    model, inputs = pipe.transformer, rows.build("wan")[1]
    values = inputs(1, (made.grid.t, made.grid.h, made.grid.w), [3])
    with vsparse.apply(pipe, method, **options) as patch:
        for branches in (("cond",), ("cond", "uncond")):
            with patch.generation(rows.STEPS):
                for step in sorted(rows.phases(method).values()):
                    for branch in branches:
                        with patch.step(step, branch=branch):
                            rows.forward(model, values)
                assert patch.stats()["state_bytes"] == len(branches) * made.state_bytes
            assert patch.stats()["state_bytes"] == 0


@pytest.mark.parametrize("method", ["vsa", "adaspa"])
def test_predicted_density_is_executed_on_a_grid_that_divides(method: str) -> None:
    """No ragged tile, no text: nothing is left to estimate."""
    model, inputs = rows.build("wan")
    options = {"density": 0.25, "block": 32} | ({"tile": (2, 4, 4)} if method == "vsa" else {"head_adaptive": False})
    made = vsparse.plan(model, method, height=128, width=128, num_frames=5, steps=5, **options)
    with vsparse.apply(model, method, **options) as patch:
        rows.generation(patch, model, inputs(1, (2, 8, 8)), steps=5)
        stats = patch.stats()
        assert made.cost is not None
        assert stats["density"] == pytest.approx(made.cost.density, abs=1e-12)
        reused = stats["calls"].get("search", 0) if method == "vsa" else 0
        assert reused == 0 or stats["sparse_density"] == pytest.approx(made.density, abs=1e-12)


def test_grids_of_all_sizes_are_predicted_as_they_run() -> None:
    pipe, call = tiny_pipelines.wan()
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"].shape), with_kwargs=True
    )
    for height, width, frames in ((32, 32, 5), (48, 16, 9), (16, 48, 1)):
        made = vsparse.plan(pipe, "vsa", height=height, width=width, num_frames=frames)
        tiny_pipelines.run((pipe, call), height=height, width=width, num_frames=frames, num_inference_steps=1)
        assert made.grid is not None
        _, _, t, h, w = seen[-1]
        assert (made.grid.t, made.grid.h, made.grid.w) == (t, h // 2, w // 2)
        assert math.prod((t, h // 2, w // 2)) == made.grid.tokens
