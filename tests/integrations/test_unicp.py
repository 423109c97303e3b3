"""unicp in whole hosts: cached steps, what keeps them apart, solvers, training, memory, calibration end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch
from rows import heard

import vsparse
from vsparse.measure.calibrate import by_layer, changes, recording
from vsparse.methods.unicp import UniCP, UniCPAttention
from vsparse.methods.unicp_calibration import calibrate, fit_bases

STEPS = 6
CACHED = UniCP(windows=3, ends=0.0)  # S o o R o o
HOST = pytest.mark.parametrize("host", ["wan", "hunyuan_video"])


def loop(patch: vsparse.Patch, model: Any, prompts: dict[str, list[dict[str, Any]]]) -> dict[str, list[torch.Tensor]]:
    """A generation of branches, each with its own inputs for every step."""
    found: dict[str, list[torch.Tensor]] = {branch: [] for branch in prompts}
    with patch.generation(STEPS):
        for i in range(STEPS):
            for branch, values in prompts.items():
                with patch.step(i, branch=branch):
                    found[branch].append(rows.forward(model, values[i]))
    return found


def moving(host: str, inputs: Any, first: int, grid: Any = rows.SMALL) -> list[dict[str, Any]]:
    """Inputs of a generation: another noise in every step."""
    return [rows.prompt(host, inputs, grid, seed=first + 2 * i) for i in range(STEPS)]


def outputs(model: Any) -> dict[str, list[torch.Tensor]]:
    """What each site gives, call by call."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, site in rows.sites(model):
        site.register_forward_hook(lambda _m, _a, out, name=name: found.setdefault(name, []).append(out.clone()))
    return found


@HOST
def test_cached_outputs_are_those_that_were_computed(host: str) -> None:
    model, inputs = rows.build(host)
    with vsparse.apply(model, CACHED) as patch, heard(model) as phases:
        given = outputs(model)
        loop(patch, model, {"cond": moving(host, inputs, 0), "uncond": moving(host, inputs, 1)})
        stats = patch.stats()
    assert [phase for _, phase in phases] == [
        x for x in ("search", "output", "output", "refresh", "output", "output") for _ in "cu"
    ]
    for calls in given.values():
        for branch in (calls[::2], calls[1::2]):
            assert all(torch.equal(branch[i], branch[i - i % 3]) for i in range(STEPS))
            assert not torch.equal(branch[0], branch[3])
    assert not any(torch.equal(calls[0], calls[1]) for calls in given.values())
    assert stats["sparse_density"] == pytest.approx(1 / 3)
    assert stats["state_bytes"] == 0


@HOST
def test_branches_prompts_and_resolutions_do_not_meet(host: str) -> None:
    model, inputs = rows.build(host)
    cond, uncond = moving(host, inputs, 0), moving(host, inputs, 1)
    other = moving(host, inputs, 0, (3, 5, 4))
    with vsparse.apply(model, CACHED) as patch:
        alone = [loop(patch, model, {"cond": x})["cond"] for x in (cond, uncond, other)]
        together = loop(patch, model, {"cond": cond, "uncond": uncond})
        again = [loop(patch, model, {"cond": x})["cond"] for x in (other, cond, uncond)]
    assert all(map(torch.equal, together["cond"], alone[0]))
    assert all(map(torch.equal, together["uncond"], alone[1]))
    for found, wanted in zip(again, (alone[2], alone[0], alone[1]), strict=True):
        assert all(map(torch.equal, found, wanted))


def test_windows_of_one_are_the_host() -> None:
    model, inputs = rows.build("wan")
    calls = moving("wan", inputs, 0)
    wanted = [rows.forward(model, values) for values in calls]
    with vsparse.apply(model, UniCP(rank=16)) as patch:
        assert all(map(torch.equal, loop(patch, model, {"cond": calls})["cond"], wanted))


def test_a_second_evaluation_reads_and_never_writes() -> None:
    model, inputs = rows.build("wan")
    first, second = moving("wan", inputs, 0), moving("wan", inputs, 1)
    for method, repeated in ((CACHED, "dense"), (UniCP(windows=3, ends=0.0, inner="sparge"), "reuse")):
        phases = []
        with vsparse.apply(model, method) as patch, patch.generation(STEPS):
            for i in range(4):
                with patch.step(i):
                    rows.forward(model, first[i])
                    phases.append(patch.sites[0].phase)
                    known = [site.state.version("cond") for site in patch.sites]
                    rows.forward(model, second[i])
                    phases.append(patch.sites[0].phase)
                    assert [site.state.version("cond") for site in patch.sites] == known
        assert phases == [
            "search", repeated, "output", "output", "output", "output", "refresh", repeated,
        ]  # fmt: skip


def test_a_layer_that_was_passed_over_computes_when_its_window_is_over() -> None:
    """A window counts from the step that computed, not from the step that should have."""
    model, inputs = rows.build("wan")
    calls = moving("wan", inputs, 0)
    with vsparse.apply(model, CACHED) as patch, patch.generation(STEPS), heard(model) as phases:
        for i in (1, 2, 5):
            with patch.step(i):
                rows.forward(model, calls[i])
    assert [phase for _, phase in phases] == ["search", "output", "refresh"]


def test_an_inner_method_is_run_as_it_is() -> None:
    model, inputs = rows.build("wan")
    calls = moving("wan", inputs, 0)
    for key in ("vsa", "sparge", "attention_tile", "sta"):
        inner = vsparse.list_methods()[key](**rows.METHODS[key].sparse)
        with rows.randomise(vsparse.apply(model, inner, schedule=vsparse.Schedule())) as patch:
            wanted = rows.forward(model, calls[0])
            names = {name for name, _ in patch.named_parameters()}
        with rows.randomise(vsparse.apply(model, UniCP(windows=3, ends=0.0, inner=inner))) as patch:
            found = loop(patch, model, {"cond": calls})["cond"]
            assert torch.equal(found[0], wanted)
            assert {name.replace(".inner.", ".") for name, _ in patch.named_parameters()} == names
            assert patch.stats()["sparse_density"] < 0.4


def test_an_inner_method_survives_a_copy(tmp_path: Path) -> None:
    import copy

    model, inputs = rows.build("wan")
    calls = moving("wan", inputs, 0)
    inner = vsparse.list_methods()["vsa"](**rows.METHODS["vsa"].sparse)
    with rows.randomise(vsparse.apply(model, UniCP(windows=3, ends=0.0, inner=inner))) as patch:
        wanted = loop(patch, model, {"cond": calls})["cond"]
        patch.save(tmp_path / "saved")
        twin = copy.deepcopy(model)
    mine = vsparse.patch_of(twin)
    assert mine is not None
    assert all(map(torch.equal, loop(mine, twin, {"cond": calls})["cond"], wanted))
    assert mine.stats()["sparse_density"] < 0.4
    with vsparse.load(model, tmp_path / "saved") as patch:
        assert patch.plan.method.inner == inner
        assert all(map(torch.equal, loop(patch, model, {"cond": calls})["cond"], wanted))


def test_gradients_through_a_reused_output_are_refused() -> None:
    model, inputs = rows.build("wan")
    calls = moving("wan", inputs, 0)
    with vsparse.apply(model, CACHED) as patch, patch.generation(STEPS):
        with patch.step(0), torch.no_grad():
            model(**calls[0])
        with patch.step(1), pytest.raises(NotImplementedError, match=r"blocks\.0\.attn1 would reuse an output"):
            model(**calls[1])
        model.train()
        with patch.step(1):
            model(**calls[1])[0].sum().backward()


def test_the_plan_says_what_the_cache_costs() -> None:
    pipe, _ = tiny_pipelines.wan()
    size = {"height": 32, "width": 32, "num_frames": 5, "steps": 6}
    made = vsparse.plan(pipe, CACHED, **size)
    assert made.grid is not None
    assert made.cost is not None
    site = made.sites[0]
    one = made.grid.tokens * site.heads * site.head_dim * 4 + 4
    assert made.state_bytes == len(made.sites) * one
    assert made.cost.sparse == pytest.approx(made.cost.dense / 3)
    assert made.cost.density == pytest.approx(1 / 3)
    half = vsparse.plan(pipe.to(torch.bfloat16), CACHED, **size)
    assert half.state_bytes == len(made.sites) * (one // 2 + 2)


@HOST
def test_calibration_end_to_end(host: str, tmp_path: Path) -> None:
    """Record, fit bases, measure changes, find numbers, apply, save, load."""
    model, inputs = rows.build(host)
    drift = [rows.prompt(host, inputs, seed=0) for _ in range(STEPS)]
    for i, values in enumerate(drift):
        noise = rows.prompt(host, inputs, seed=2)["hidden_states"]
        values["hidden_states"] = values["hidden_states"] + (0.3 if i in (1, 3, 4) else 0.0) * noise
    with recording(model, most=4) as recorded:
        for values in drift:
            rows.forward(model, values)
    with vsparse.apply(model, UniCP(rank=3)) as patch:
        errors = fit_bases(patch.sites, recorded)
        bases = {name: x.detach().clone() for name, x in patch.named_parameters()}
        with changes(patch) as found:
            loop(patch, model, {"cond": drift, "uncond": drift})
        assert all("commit" not in vars(site.state) for site in patch.sites)
    assert [sorted(known) for known in found] == [list(range(1, STEPS))] * len(found)
    assert all(known[4] == 0.0 < min(known[1], known[2], known[3], known[5]) for known in found[:1])
    bound = 1.1 * max(known[1] for known in found)
    numbers = calibrate(found, steps=STEPS, bound=bound, ends=0.0, slicing=by_layer(errors))
    method = UniCP(rank=3, **numbers)
    assert method.saves
    with vsparse.apply(model, method) as patch:
        fit_bases(patch.sites, recorded)
        assert all(torch.equal(x, bases[name]) for name, x in patch.named_parameters())
        wanted = loop(patch, model, {"cond": drift})["cond"]
        assert patch.stats()["calls"]["output"] > 0
        patch.save(tmp_path / "saved")
    with vsparse.load(model, tmp_path / "saved") as patch:
        assert patch.plan.method == method
        assert all(isinstance(site, UniCPAttention) for site in patch.sites)
        assert all(map(torch.equal, loop(patch, model, {"cond": drift})["cond"], wanted))


def test_changes_of_a_pipeline_with_two_experts() -> None:
    """Each expert has its own first step, which nothing spans."""
    built = tiny_pipelines.wan(experts=2)
    with vsparse.apply(built[0], "unicp") as patch, changes(patch) as found:
        tiny_pipelines.run(built, num_inference_steps=6)
    steps = [sorted(known) for known in found]
    assert steps[0] == steps[1]
    assert 0 not in steps[0]
    assert len(steps[0]) == 4


def test_changes_refuse_other_patches() -> None:
    model, _ = rows.build("wan")
    for method in (vsparse.list_methods()["vsa"](), CACHED):
        with (
            vsparse.apply(model, method) as patch,
            pytest.raises(ValueError, match='changes: the patch must be "unicp" with every step computed'),
            changes(patch),
        ):
            pass


@pytest.mark.parametrize("inner", ["dense", "sparge"])
def test_a_recomputation_reads_and_never_writes(inner: str) -> None:
    """In evaluation mode, where outputs are cached: gradients are those without checkpointing, the cache stays."""
    model, inputs = rows.build("wan")
    calls = moving("wan", inputs, 0)
    found = []
    with vsparse.apply(model, UniCP(windows=3, ends=0.0, inner=inner)) as patch:
        for checkpointing in (False, True):
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
            with patch.generation(STEPS):
                losses = []
                for i in (0, 3):
                    with patch.step(i):
                        losses.append(model(**calls[i])[0].square().mean())
                known = [site.state.version("cond") for site in patch.sites]
                torch.stack(losses).sum().backward()
                assert [site.state.version("cond") for site in patch.sites] == known
                assert all(version["output"].numel() for version in known)
                with patch.step(4):
                    last = rows.forward(model, calls[4])
            found.append((rows.gradients(model), last))
    assert torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(found[1][0][name], x) for name, x in found[0][0].items())
