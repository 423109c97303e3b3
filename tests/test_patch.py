"""plan, stats, the registry, and what a Patch tells: predictions by hand, and executed pairs counted one by one."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import math
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch

import vsparse
from vsparse import reference
from vsparse.blocks import BlockMap
from vsparse.methods import SparseAttention

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


# ---- what ran ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, tuple[BlockMap, ...]]]]:
    """Site, batch and maps of every sparse call."""
    found: list[tuple[str, int, tuple[BlockMap, ...]]] = []
    stock = SparseAttention.tally

    def tally(self: SparseAttention, blocks: BlockMap, batch: int, *more: BlockMap) -> None:
        found.append((f"transformer.{self.site.name}", batch, (blocks, *more)))
        stock(self, blocks, batch, *more)

    with monkeypatch.context() as patched:
        patched.setattr(SparseAttention, "tally", tally)
        yield found


def _pairs(maps: tuple[BlockMap, ...], batch: int, heads: int) -> tuple[int, int]:
    """Computed and valid token pairs, counted in the mask of all pairs of slots."""
    slots = (
        maps[0].k.blocks * maps[0].k.block
        if maps[0].k.start is None
        else int((maps[0].k.start + maps[0].k.length).max())
    )
    masks = [reference._pairs(m, slots, slots).expand(batch, heads, -1, -1) for m in maps]
    union = torch.stack(masks).any(0)
    assert int(sum(int(m.sum()) for m in masks)) == int(union.sum()), "maps that are merged must be disjoint"
    valid = reference._pairs(BlockMap.full(maps[0].k), slots, slots).expand(batch, heads, -1, -1)
    return int(union.sum()), int(valid.sum())


@pytest.mark.parametrize(("host", "method"), rows.both)
def test_density_is_counted_pairs(host: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs, (3, 6, 7), batch=2)
    with vsparse.apply(model, method, **rows.METHODS[method].sparse) as patch, executed(monkeypatch) as maps:
        calls = len(rows.tour(patch, model, values))
        stats = patch.stats()
        grid, lengths = patch.sites[0].call.grid, patch.sites[0].call.text_length
    valid = [grid.tokens] * 2 if lengths is None else [grid.video + n for n in lengths.tolist()]
    computed: dict[str, list[tuple[int, int]]] = {}
    for site, batch, ran in maps:
        computed.setdefault(site, []).append(_pairs(ran, batch, 2))
    everything = 2 * sum(n * n for n in valid)
    assert {possible for pairs in computed.values() for _, possible in pairs} <= {everything}
    done = sum(mine for pairs in computed.values() for mine, _ in pairs)
    dense = calls * len(patch.sites) - len(maps)
    assert stats["calls"].get("dense", 0) == dense
    assert sum(stats["calls"].values()) == calls * len(patch.sites)
    assert stats["density"] == pytest.approx(
        (done + dense * everything) / (calls * len(patch.sites) * everything), abs=1e-12
    )
    assert stats["sites"].keys() == computed.keys()
    for site, pairs in computed.items():
        assert stats["sites"][site] == pytest.approx(sum(x for x, _ in pairs) / (everything * len(pairs)), abs=1e-12)
    if maps:
        assert stats["sparse_density"] == pytest.approx(done / (len(maps) * everything), abs=1e-12)
    else:
        assert stats["sparse_density"] is None


@pytest.mark.parametrize("method", rows.SPARSE)
def test_predicted_density_is_executed_on_a_grid_that_divides(method: str) -> None:
    """No ragged tile, no text: nothing is left to estimate."""
    if method not in ("vsa", "adaspa"):
        pytest.skip("its density is not a field")
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


def test_stats_of_nothing() -> None:
    with vsparse.apply(rows.build("wan")[0], "vsa") as patch:
        assert patch.stats() == {
            "density": None,
            "sparse_density": None,
            "sites": {},
            "calls": {},
            "searches": 0,
            "fallbacks": {},
            "kernel": patch.plan.kernel,
            "state_bytes": 0,
        }
        assert patch.auxiliary_losses() == {}


def test_a_failed_call_is_not_counted() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "vsa") as patch:
        handle = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rows.forward(model, values)
        handle.remove()
        assert patch.stats()["calls"] == {}
        rows.forward(model, values)
        assert patch.stats()["calls"] == {"search": 2}


def test_parameters_follow_the_host_mode() -> None:
    model, _ = rows.build("wan")
    model.train()
    with vsparse.apply(model, "vsa") as patch:
        assert all(site.training for site in patch.sites)
        assert not any(site.training for site in vsparse.apply(rows.build("wan")[0], "vsa").sites)
        assert all(x.requires_grad for x in patch.parameters())
        assert [name for name, _ in patch.named_parameters()] == [
            f"transformer.blocks.{i}.attn1.to_gate_compress.{part}" for i in range(2) for part in ("weight", "bias")
        ]


@pytest.mark.parametrize("method", rows.METHODS)
def test_the_global_generator_does_not_move(method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    patch = vsparse.apply(model, method, **rows.METHODS[method].sparse)
    assert torch.equal(torch.get_rng_state(), before)
    rows.generation(patch, model, values)
    assert torch.equal(torch.get_rng_state(), before)
    model.train()
    with patch.generation(1), patch.step(0):
        model(**values)[0].sum().backward()
    patch.remove()
    assert torch.equal(torch.get_rng_state(), before)


# ---- the registry ------------------------------------------------------------------------------------------------


def test_every_method_has_a_row() -> None:
    """A new method joins the contracts: give it its options in tests/rows.py."""
    assert set(rows.METHODS) == set(vsparse.list_methods())


def test_every_host_has_a_row() -> None:
    """A new model joins the contracts: give it a builder in tests/tiny.py and a row in tests/rows.py."""
    from vsparse.integrations.diffusers.hosts import HOSTS

    assert {row.model for row in rows.HOSTS.values()} == {model for host in HOSTS for model in host.models}


@pytest.mark.parametrize("method", rows.METHODS)
def test_methods_are_frozen_and_equal_by_value(method: str) -> None:
    kind = vsparse.list_methods()[method]
    assert kind.key == method
    assert kind() == kind()
    fields = {k: v for k, v in rows.METHODS[method].sparse.items() if k != "schedule"}
    assert kind(**fields) == kind().replace(**fields)
    assert hash(kind()) == hash(kind())
    with pytest.raises(AttributeError):
        kind().density = 0.5  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        kind(0.5)  # type: ignore[call-arg]


class _Point:
    value = "somewhere:Thing"

    def __init__(self, name: str, thing: object) -> None:
        self.name, self.thing = name, thing

    def load(self) -> object:
        return self.thing


def test_third_parties_register(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = vsparse.list_methods()["dense"]

    class Mine(dense):  # type: ignore[misc, valid-type]
        key = "mine"

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [_Point("mine", Mine)])
    assert vsparse.list_methods()["mine"] is Mine
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "mine") as patch:
        rows.forward(model, values)
        assert patch.stats()["calls"] == {"dense": 2}
    for point, words in (
        (_Point("vsa", Mine), "the method key 'vsa' is taken"),
        (_Point("x", 3), "must name Method classes"),
    ):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, point=point: [point])
        with pytest.raises(RuntimeError, match=words):
            vsparse.list_methods()


# ---- leaving -----------------------------------------------------------------------------------------------------


def test_leaving_the_context_removes_even_after_an_error() -> None:
    model, _ = rows.build("wan")
    mark = rows.footprint(model)
    with pytest.raises(KeyError), vsparse.apply(model, "vsa"):
        raise KeyError
    assert rows.footprint(model) == mark


def test_a_dropped_patch_can_be_found_again() -> None:
    model, inputs = rows.build("wan")
    values, mark = rows.prompt("wan", inputs), rows.footprint(model)
    vsparse.apply(model, "vsa")
    rows.forward(model, values)
    found = vsparse.patch_of(model)
    assert found is not None
    assert found.stats()["calls"] == {"search": 2}
    found.remove()
    assert rows.footprint(model) == mark
    assert vsparse.patch_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("removed", [True, False])
def test_a_dead_model_is_freed(removed: bool) -> None:
    """A patch that is still held does not hold a model that it has left; a forgotten one holds nothing."""
    model, inputs = rows.build("wan")
    patch = vsparse.apply(model, "adaspa", block=16)
    with patch.generation(5), patch.step(0):
        rows.forward(model, rows.prompt("wan", inputs))
        held = weakref.ref(patch.sites[0].state.version("cond")["bits"])
    gone = weakref.ref(model)
    if removed:
        patch.remove()
    else:
        del patch
    del model
    gc.collect()
    assert gone() is None
    assert held() is None


def test_apply_in_a_thread_and_run_in_another() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "vsa", density=0.3):
        wanted = rows.forward(model, values)
    thread = threading.Thread(target=lambda: vsparse.apply(model, "vsa", density=0.3))
    thread.start()
    thread.join()
    assert torch.equal(rows.forward(model, values), wanted)
    patch = vsparse.patch_of(model)
    assert patch is not None
    patch.remove()


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
