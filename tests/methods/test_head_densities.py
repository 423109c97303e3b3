"""A density for each head: what a head keeps with it, it keeps as if all heads had it."""

from __future__ import annotations

from typing import Any

import one_site
import pytest
import rows
import torch
from one_site import Driven

import vsparse
from vsparse.measure.recall import kept_by
from vsparse.methods import Site, budgets, get_method
from vsparse.methods.samples import Sample
from vsparse.training.settings import MethodSettings

GRID = vsparse.Grid(t=3, h=6, w=8)
WITH_TEXT = vsparse.Grid(t=3, h=6, w=8, text_after=5)
OPTIONS: dict[str, dict[str, Any]] = {
    "vsa": {"tile": (1, 2, 4), "block": 8},
    "sla": {"block": 8},
    "adaspa": {"block": 8, "head_adaptive": False},
    "sparge": {"block": 8, "select": "density"},
    "jenga": {"block": 8, "mass": 0.01},
    "draft": {"tile": (1, 2, 4), "block": 8},
}
PAIR = (0.15, 0.7)


@pytest.mark.parametrize("grid", [GRID, WITH_TEXT], ids=["video", "text"])
@pytest.mark.parametrize("key", OPTIONS)
def test_a_head_keeps_what_it_would_keep_if_all_had_its_density(key: str, grid: vsparse.Grid) -> None:
    q, k, v = one_site.tensors(grid)
    sample = Sample(grid=grid, q=q, k=k, v=v)
    both = kept_by(get_method(key)(density=PAIR, **OPTIONS[key]), sample).keep
    for head, density in enumerate(PAIR):
        alone = kept_by(get_method(key)(density=density, **OPTIONS[key]), sample).keep
        assert torch.equal(both[head], alone[head])
    assert both[0].sum() < both[1].sum()


@pytest.mark.parametrize("key", OPTIONS)
def test_samples_with_texts_of_different_length(key: str) -> None:
    q, k, v = one_site.tensors(WITH_TEXT, batch=2)
    hidden = torch.zeros(2, WITH_TEXT.video, one_site.HEADS * one_site.DIM)

    def executed(density: budgets.Density) -> torch.Tensor:
        site = Driven(get_method(key)(density=density, **OPTIONS[key]), WITH_TEXT, torch.tensor([5, 2]))
        site(q, k, v, hidden)
        if site.method.state_phases:
            site(q, k, v, hidden, phase="reuse")
        return site.maps[0].to_mask()

    both = executed(PAIR)
    assert both.shape[:2] == (2, 2)
    for head, density in enumerate(PAIR):
        assert torch.equal(both[:, head], executed(density)[:, head])


@pytest.mark.parametrize("key", OPTIONS)
def test_predicted_density_is_the_mean(key: str) -> None:
    method = get_method(key)(**OPTIONS[key])
    site = Site.alone(heads=2, head_dim=8)
    layout = method.layout(WITH_TEXT, site)
    alone = [method.replace(density=density).predicted_density(layout, site) for density in PAIR]
    assert method.replace(density=PAIR).predicted_density(layout, site) == pytest.approx(sum(alone) / 2, rel=1e-12)


def test_in_a_model() -> None:
    """The executed density of each head is its own; an adapter brings the numbers back."""
    model, inputs = rows.build("wan")
    given = (0.2, 0.6)
    with vsparse.apply(model, "vsa", density=given, tile=(1, 2, 2), block=4) as patch:
        rows.forward(model, rows.prompt("wan", inputs, (4, 4, 4)))
        call = patch.sites[0].call
        assert call is not None
        assert call.density.tolist() == list(given)
        assert len({site.peak_density for site in patch.sites}) == 1
    assert patch.plan.method.options()["density"] == given


@pytest.mark.parametrize(
    ("density", "words"),
    [
        ((0.2, 0.0), r"vsa: density must be a number in \(0, 1\], got 0.0"),
        ((), r"vsa: density must be .* a tuple with one per head, got \(\)"),
        (True, "vsa: density must be a number"),
        ((0.2, 0.3, 0.4), "vsa: 3 densities for .*, which has 2 heads; give one number, or one for each head"),
    ],
)
def test_refusals(density: Any, words: str) -> None:
    model, _ = rows.build("wan")
    with pytest.raises(ValueError, match=words):
        vsparse.apply(model, "vsa", density=density)


def test_a_ramp_has_one_density() -> None:
    model, _ = rows.build("wan")
    with pytest.raises(ValueError, match="a ramp gives one density to all heads, and 'vsa' has one for each"):
        vsparse.apply(model, "vsa", density=(0.2, 0.3), schedule=vsparse.Schedule(ramp=lambda _: 0.5))
    with pytest.raises(ValueError, match="dense_steps and ramp_steps lead to one density, and 'vsa' is given one for"):
        MethodSettings(key="vsa", options={"density": [0.2, 0.3]}, ramp_steps=4)
