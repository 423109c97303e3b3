"""A method for each range of layers; one map for both CFG branches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rows
import torch
from host_law import Standard, trained

import vsparse
from vsparse.methods import SparseAttention
from vsparse.methods.by_layer import ByLayer

PARTS: dict[str, Any] = {
    "0": ("vsa", {"density": 0.3, "tile": (2, 4, 4), "block": 16}),
    "1-2": ("adaspa", {"density": 0.3, "block": 16}),
    "4-": ("sta", {"window": (1, 3, 3), "tile": (1, 2, 2), "block": 4}),
}
EVERYTHING = {
    "0": ("vsa", {"density": 1.0, "tile": (2, 4, 4), "block": 16}),
    "2-": ("nabla", {"mass": 1.0, "tile": (1, 2, 3), "block": 4}),
}


def sites(patch: vsparse.Patch) -> list[SparseAttention]:
    return list(patch.sites)


def build(layers: int = 6) -> tuple[Any, Any]:
    return rows.build("wan", layers=layers)


def test_every_layer_has_its_method_and_its_schedule() -> None:
    """VSA always, AdaSpa and STA after their own dense steps, a layer in no range never."""
    model, inputs = build()
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, ByLayer(parts=PARTS)) as patch:  # type: ignore[arg-type]
        assert [site.method.key for site in sites(patch)] == ["vsa", "adaspa", "adaspa", "dense", "sta", "sta"]
        seen = []
        with patch.generation(10):
            for step in range(4):
                with patch.step(step):
                    rows.forward(model, values)
                seen.append([site.phase for site in sites(patch)])
        assert seen == [
            ["search", "dense", "dense", "dense", "dense", "dense"],
            ["search", "search", "search", "dense", "dense", "dense"],
            ["search", "reuse", "reuse", "dense", "dense", "dense"],
            ["search", "reuse", "reuse", "dense", "search", "search"],
        ]
        assert patch.stats()["sparse_density"] < 0.9
    with pytest.raises(ValueError, match="depends on the denoising step"), vsparse.apply(model, ByLayer(parts=PARTS)):  # type: ignore[arg-type]
        rows.forward(model, values)


def test_a_given_schedule_holds_for_all_sparse_parts() -> None:
    model, inputs = build()
    schedule = vsparse.Schedule(dense_layers=1)
    parts = {key: part for key, part in PARTS.items() if key != "1-2"}
    with vsparse.apply(model, ByLayer(parts=parts), schedule=schedule) as patch:  # type: ignore[arg-type]
        rows.forward(model, rows.prompt("wan", inputs))
        assert [site.phase for site in sites(patch)] == ["dense"] * 4 + ["search"] * 2


def test_an_empty_schedule_is_a_given_one(tmp_path: Path) -> None:
    """``Schedule()`` makes every sparse part sparse from the first step; without one STA waits. Saved, too."""
    model, inputs = build()
    values = rows.prompt("wan", inputs)
    parts = {"0-2": "sta", "3-4": "vsa"}
    for given, first in ((None, "dense"), (vsparse.Schedule(), "search")):
        patch = vsparse.apply(model, "by_layer", parts=parts, schedule=given)
        patch.save(tmp_path / first)
        found = vsparse.plan(model, "by_layer", parts=parts, schedule=given).schedule
        assert patch.plan.schedule == found
        patch.remove()
        patch = vsparse.load(model, tmp_path / first)
        with patch.generation(10), patch.step(0):
            rows.forward(model, values)
        assert [site.phase for site in sites(patch)] == [first] * 3 + ["search"] * 2 + ["dense"]
        patch.remove()


def test_everything_kept_equals_the_host() -> None:
    model, inputs = build(3)
    values = rows.prompt("wan", inputs, batch=2)
    hidden = [values["hidden_states"]]

    def run(*given: torch.Tensor) -> list[torch.Tensor]:
        return [model(**{**values, "hidden_states": given[0]})[0]]

    law = Standard.of(lambda: trained(model, run, hidden), rows.tokens(model, values))
    with vsparse.apply(model, ByLayer(parts=EVERYTHING)) as patch:  # type: ignore[arg-type]
        found = trained(model, run, hidden)
        assert patch.stats()["density"] == 1.0
    law.check(found)


def test_plan_counts_each_layer_by_its_method() -> None:
    model, _ = build()
    size = {"height": 64, "width": 96, "num_frames": 9, "steps": 10}
    whole = vsparse.plan(model, ByLayer(parts=PARTS), **size)  # type: ignore[arg-type]
    alone = [vsparse.plan(model, key, **options, **size) for key, options in PARTS.values()]
    assert whole.density is not None
    parts = [plan.density for plan in alone]
    assert whole.density == pytest.approx((parts[0] + 2 * parts[1] + 1.0 + 2 * parts[2]) / 6)  # type: ignore[operator]
    assert whole.new_parameters == alone[0].new_parameters // 6
    assert whole.state_bytes == alone[1].state_bytes // 6 * 2  # type: ignore[operator]


def test_save_and_load(tmp_path: Path) -> None:
    model, inputs = build()
    values = rows.prompt("wan", inputs)
    with rows.randomise(vsparse.apply(model, ByLayer(parts=PARTS))) as patch:  # type: ignore[arg-type]
        wanted = rows.generation(patch, model, values, steps=4)
        patch.save(tmp_path / "adapter")
        method = patch.plan.method
    with vsparse.load(model, tmp_path / "adapter") as patch:
        assert patch.plan.method == method
        assert all(map(torch.equal, rows.generation(patch, model, values, steps=4), wanted))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"0-3": "vsa", "2": "sta"}, r"by_layer: layer 2 is in two ranges"),
        ({"5-": "vsa", "7-8": "sta"}, r"by_layer: layer 7 is in two ranges"),
        ({"a": "vsa"}, 'by_layer: a range of layers is "3", "0-9" or "10-", got \'a\''),
        ({"3-1": "vsa"}, "by_layer: a range of layers"),
        ({"0": 3}, "by_layer: a part must be a Method"),
        ({"0": "none such"}, "unknown method 'none such'"),
        ({"0": ("vsa", {"densty": 1})}, "method 'vsa' has no option 'densty'"),
        ("vsa", "by_layer: parts must be a mapping"),
    ],
)
def test_refused_in_words(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByLayer(parts=parts)


# ---- one map for both branches -----------------------------------------------------------------------------------


def test_branches_share_a_map() -> None:
    """The first branch searches, the second computes in full at that step and uses the map from then on."""
    model, inputs = rows.build("wan")
    calls = {name: rows.prompt("wan", inputs, seed=seed) for seed, name in enumerate(("cond", "uncond"))}
    options = {"density": 0.3, "block": 16}
    maps: dict[bool, dict[str, Any]] = {}
    sizes: dict[bool, int] = {}
    for share in (False, True):
        with vsparse.apply(model, "adaspa", share_branches=share, **options) as patch:
            phases = []
            with patch.generation(10):
                for step in (1, 2, 5, 6):
                    for name, values in calls.items():
                        with patch.step(step, branch=name):
                            rows.forward(model, values)
                        phases.append(patch.sites[0].phase)
                state = patch.sites[0].state
                keys = ("shared", "shared") if share else ("cond", "uncond")
                maps[share] = {name: state.version(key)["bits"] for name, key in zip(calls, keys, strict=True)}
                sizes[share] = patch.stats()["state_bytes"]
            if share:
                assert phases == ["search", "dense", "reuse", "reuse", "refresh", "reuse", "reuse", "reuse"]
            else:
                assert phases == ["search", "search", "reuse", "reuse", "refresh", "refresh", "reuse", "reuse"]
    assert 2 * sizes[True] == sizes[False]
    assert not torch.equal(maps[False]["cond"], maps[False]["uncond"])
    assert torch.equal(maps[True]["cond"], maps[False]["cond"])
