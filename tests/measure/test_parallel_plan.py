"""Choosing how GPUs share a planned model: every method gets a way that it can run, and words for what it rests on."""

from __future__ import annotations

import dataclasses as dc
import functools

import pytest
import rows
import torch

import vsparse
from vsparse.measure.machines import INSIDE, assumed_cluster, room
from vsparse.measure.parallel_plan import choose_parallel, layer_maps
from vsparse.methods import Site, get_method
from vsparse.parallel.context import parse
from vsparse.parallel.planner import Choice, predict
from vsparse.parallel.rates import Cluster, Rate
from vsparse.planning import Plan

SIZE = {"height": 96, "width": 128, "num_frames": 9, "steps": 10}
MACHINE = assumed_cluster("pcie5", dense=False)
ALONE = {
    "vmoba": "its layers have tokens in several orders",
    "svg2": "it finds the order of the tokens in each call",
    "by_layer": "its layers have tokens in several orders",
}


@functools.cache
def planned(key: str, host: str = "wan") -> Plan:
    model, _ = rows.build(host, layers=3) if host == "wan" else rows.build(host)
    return vsparse.plan(model, key, **rows.METHODS[key].sparse, **SIZE)


def words(choice: Choice) -> str:
    return "\n".join(choice.notes)


@pytest.mark.parametrize("key", rows.METHODS)
def test_every_method_gets_a_way_that_it_can_run(key: str) -> None:
    state = torch.get_rng_state()
    made = planned(key)
    told: list[str] = []
    found = choose_parallel(made, MACHINE, 2, told=told.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.setting.size == 2
    assert parse(str(found.setting)) == found.setting
    assert {one.how for one in found.tried} == ({"ulysses"} if key in ALONE else {"ulysses", "ring", "gather"})
    assert f"heads alone are shared: {ALONE[key]}" in words(found) if key in ALONE else "map: " in words(found)
    assert (found.attention.tokens, found.attention.heads, found.attention.layers) == (3 * 6 * 8, 2, 3)
    assert sorted(head for group in found.split.heads for head in group) == [0, 1]
    assert (found.split.ulysses, found.split.ring) == (found.best.ulysses, found.best.ring)
    assert found.best == predict(found.attention, found.cluster, found.split, found.best.how)
    assert told[-1] == "predicting"


@pytest.mark.parametrize("key", ["vsa", "radial", "adaspa"])
def test_text_beside_the_video(key: str) -> None:
    found = choose_parallel(planned(key, "hunyuan_video"), MACHINE, 2)
    assert found.attention.tokens == 3 * 6 * 8


def test_notes_say_where_maps_come_from() -> None:
    said = {key: words(choose_parallel(planned(key), MACHINE, 4)) for key in ("dense", "sta", "svg", "vsa", "adaspa")}
    said["dsv"] = words(choose_parallel(planned("dsv"), MACHINE, 4))
    for key, part in {
        "dense": "map: all blocks; density 1.000",
        "sta": "map: static; density",
        "svg": "map: heads take the static patterns of svg in turn",
        "vsa": "map: chosen by vsa on 4 made heads (local, periodic in time, global, mixed; seed 0)",
        "adaspa": "map: a stand-in, the largest products of block means, as adaspa searches by attending",
        "dsv": "map: a stand-in, the largest products of block means, as dsv chooses by what is trained",
    }.items():
        assert part in said[key], said[key]
    assert "its map kept from an earlier one: dense steps and layers" in said["adaspa"]
    assert "dense steps" not in said["dense"]
    own = dc.replace(MACHINE, rate=Rate(flops=1e12, origin="measured: here"))
    assert "full attention is taken to be as fast" in words(choose_parallel(planned("dense"), own, 4))
    assert "full attention" not in said["dense"] + words(choose_parallel(planned("vsa"), own, 4))


def test_a_map_that_is_kept_costs_no_choice() -> None:
    kept, anew = (choose_parallel(planned(key), MACHINE, 4).attention for key in ("adaspa", "xattention"))
    assert (kept.choosing, kept.pooled) == (0.0, 0)
    assert anew.choosing > 0
    assert anew.pooled == anew.tokens  # xattention reads every key of the others


def test_several_methods_of_one_order_share_heads_alone() -> None:
    model, _ = rows.build("wan", layers=3)
    parts = {"0": ("sta", {"tile": (1, 4, 4), "block": 16}), "1-": ("vsa", {"tile": (1, 4, 4), "block": 16})}
    found = choose_parallel(vsparse.plan(model, "by_layer", parts=parts, **SIZE), MACHINE, 2)
    assert "its layers run several methods" in words(found)
    skips = vsparse.plan(model, "sparge", skip_threshold=5.0, block=16, **SIZE)
    made = dc.replace(planned("sparge"), method=skips.method)
    assert "it skips blocks by a threshold" in words(choose_parallel(made, MACHINE, 2))


def test_layers_that_differ_in_their_pattern_are_told() -> None:
    model, _ = rows.build("wan", layers=3)
    several = ("Window(size=(1, 3, 3))", "Window(size=(3, 5, 5))")
    made = vsparse.plan(model, "pattern", pattern=several, by="layer", block=16, **SIZE)
    assert "layers differ in their pattern; that of layer 0 stands for all" in words(choose_parallel(made, MACHINE, 2))


def test_memory_of_a_gpu_bounds_the_choice() -> None:
    made = planned("vsa")
    free = choose_parallel(made, MACHINE, 4)
    assert free.memory == MACHINE.memory
    least = min(one.memory for one in free.tried)
    found = choose_parallel(made, MACHINE, 4, gpu_memory=least / room(1.0))
    assert found.best.memory == pytest.approx(least)
    with pytest.raises(ValueError, match=r"memory of .* holds no way on 4 processes; the smallest"):
        choose_parallel(made, MACHINE, 4, gpu_memory=1.0)


def refused(made: Plan, gpus: int, words: str, cluster: Cluster = MACHINE) -> None:
    with pytest.raises(ValueError, match=words):
        choose_parallel(made, cluster, gpus)


def test_what_cannot_be_done_is_refused() -> None:
    model, _ = rows.build("wan", layers=3)
    refused(vsparse.plan(model, "vsa"), 4, "give height, width and num_frames to the plan")
    refused(dc.replace(planned("vsa"), sites=()), 4, "can be patched, and the plan has none")
    refused(planned("vsa"), 0, "gpus must be an integer >= 1, got 0")
    refused(planned("vsa"), 997, r"997 GPUs cannot share 2 heads and \d+ tiles of 144 tokens")
    refused(planned("vmoba"), 6, r"vmoba shares heads alone \(its layers .*\), so at most 2 GPUs .* got 6")
    one_node = dc.replace(MACHINE, between=None)
    refused(planned("vsa"), 12, "12 GPUs are more than a node of .* has, 8, and nothing is known of the link", one_node)
    with pytest.raises(ValueError, match="links must be one of nvlink4, pcie5, got 'pigeon'"):
        assumed_cluster("pigeon", dense=False)
    assert list(INSIDE) == ["nvlink4", "pcie5"]


def test_a_stand_in_keeps_what_the_density_says() -> None:
    grid = vsparse.Grid(t=4, h=8, w=8, text_after=16)
    site = Site.alone(heads=4, head_dim=32)
    (found,), _ = layer_maps(get_method("adaspa")(density=0.25, block=16), grid, site)
    assert found.to_mask()[0, :, :16, :16].sum(-1).eq(4).all()  # a quarter of sixteen blocks of the video
    assert found.to_mask()[0, :, 16:].all()
    assert found.to_mask()[0, :, :, 16:].all()
