"""The latency measurement: known timings in, every derived figure out; nothing left behind; the command, small."""

from __future__ import annotations

import dataclasses as dc
import inspect
import itertools
import json
import math
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch
from latency_cases import RATES, Ticks, known
from torch import nn
from typer.testing import CliRunner

import vsparse
import vsparse.ops.host_order as host_order
from vsparse import cli, ops
from vsparse.layouts import Blocking
from vsparse.measure.embedded import opened
from vsparse.measure.latency import rates, tables
from vsparse.measure.latency.executed import watching
from vsparse.measure.latency.intervals import WIDEST, Interval, interval, verdict
from vsparse.measure.latency.profiler import profiled
from vsparse.measure.latency.rounds import LEAST, MOST, orders, rounds_in, take_turns
from vsparse.measure.latency.timeline import (
    BLOCK,
    CHOOSE,
    COMBINE,
    COMMUNICATE,
    CROSS,
    FEED,
    KERNEL,
    PACK,
    PARTS,
    PROJECT,
    REST,
    SCHEDULER,
    SEARCH,
    SELF_ATTENTION,
    TEXT,
    TRANSFORMER,
    VAE,
    CpuClock,
    Span,
    Timeline,
)
from vsparse.methods import get_method

# ---- intervals -------------------------------------------------------------------------------------------------------


def test_interval_takes_as_many_values_off_as_its_coverage_allows() -> None:
    ordered = [float(i) for i in range(1, 12)]
    draw = random.Random(0)
    for count, low, coverage in ((1, 1, 0.0), (2, 1, 0.5), (5, 1, 0.9375), (6, 1, 0.96875), (9, 2, 1 - 20 / 512)):
        values = ordered[:count]
        draw.shuffle(values)
        found = interval(values)
        assert (found.low, found.high, found.count) == (low, count + 1 - low, count)
        assert found.median == (count + 1) / 2
        assert found.coverage == coverage
    assert interval(ordered).low == 2, "three off each side would cover 93 % only"
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_coverage_is_the_chance_over_all_ways_to_fall_beside_the_median() -> None:
    """Each value lies below the true median with a chance of one half: count the ways."""
    for count in range(1, 12):
        found = interval([float(i) for i in range(count)])
        outside = int(found.low)
        ways = [sum(sides) for sides in itertools.product((0, 1), repeat=count)]
        inside = sum(outside < below < count - outside for below in ways)
        assert found.coverage == inside / 2**count


def made(low: float, middle: float, high: float, count: int = 6) -> Interval:
    return Interval(median=middle, low=low, high=high, coverage=0.97, count=count)


def test_a_speed_is_quoted_only_where_the_interval_allows_it() -> None:
    assert "sparse is 2.00 times as fast as dense" in verdict(made(1.9, 2.0, 2.1))
    assert "sparse is 2.00 times as slow as dense" in verdict(made(0.49, 0.5, 0.51))
    assert "no difference" in verdict(made(0.95, 1.01, 1.05))
    assert "too noisy" in verdict(made(2.0, 3.0, 3.0 + 3.0 * WIDEST))
    assert "one round" in verdict(made(2.0, 2.0, 2.0, count=1))


# ---- timeline --------------------------------------------------------------------------------------------------------


def test_time_belongs_to_the_innermost_part_and_adds_up() -> None:
    clock = Ticks()
    timeline = Timeline(clock)
    timeline.enter(TRANSFORMER)
    timeline.layer, timeline.phase, timeline.step = 3, "reuse", 7
    timeline.enter(PROJECT)
    assert timeline.timed(lambda x: x + 1, KERNEL, inside=PROJECT)(1) == 2
    timeline.leave()
    assert timeline.timed(lambda x: x + 1, KERNEL, inside=PROJECT)(1) == 2, "elsewhere it is not told apart"
    timeline.layer, timeline.phase = None, ""
    timeline.leave()
    found = timeline.end()
    assert found == {
        Span(REST, None, "", 0): 2.0,
        Span(TRANSFORMER, None, "", 0): 2.0,
        Span(PROJECT, 3, "reuse", 7): 2.0,
        Span(KERNEL, 3, "reuse", 7): 1.0,
    }
    assert sum(found.values()) == clock.time - 1.0
    timeline.enter(VAE)
    assert timeline.end() is found, "what comes after the end is not counted"


def test_a_failing_call_leaves_its_part() -> None:
    timeline = Timeline(Ticks())

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        timeline.timed(fail, KERNEL)()
    assert timeline.part == REST
    assert timeline.end()[Span(KERNEL, None, "", 0)] == 1.0


def test_other_threads_are_not_seen() -> None:
    timeline = Timeline(Ticks())
    thread = threading.Thread(target=timeline.timed(lambda: None, KERNEL))
    thread.start()
    thread.join()
    assert list(timeline.end()) == [Span(REST, None, "", 0)]


# ---- profiler --------------------------------------------------------------------------------------------------------

SHARED = (Blocking, host_order, ops, nn.functional)


def state(pipe: Any) -> list[Any]:
    """Everything that profiling touches: hooks, names of attributes, and functions among them."""
    models = [x for x in pipe.components.values() if isinstance(x, nn.Module)]
    hooks = [{key: x for key, x in rows.footprint(model).items() if key != "keys"} for model in models]
    owners = [x for model in models for x in model.modules()] + [pipe.scheduler, *SHARED]
    names = [sorted(vars(owner)) for owner in owners]
    functions = [{name: id(x) for name, x in vars(owner).items() if inspect.isroutine(x)} for owner in owners]
    return [[{key: one[3] for key, one in model.items()} for model in hooks], names, functions]


@pytest.mark.parametrize("method", [None, "vsa", "adaspa"])
def test_profiling_changes_no_result_and_leaves_nothing(method: str | None) -> None:
    built = tiny_pipelines.wan()
    plain = tiny_pipelines.run(built)
    stock = state(built[0])
    options = {} if method is None else {"density": 0.5, "block": 16}
    patch = None if method is None else vsparse.apply(built[0], method, **options)
    before, expected = state(built[0]), plain if patch is None else tiny_pipelines.run(built)
    timeline = Timeline(Ticks())
    with profiled(built[0], timeline, patch):
        found = tiny_pipelines.run(built)
    assert torch.equal(found, expected)
    assert state(built[0]) == before
    assert torch.equal(tiny_pipelines.run(built), expected)
    spans = timeline.end()
    tiny_pipelines.run(built)
    assert timeline.end() == spans, "nothing is timed afterwards"
    if patch is not None:
        patch.remove()
    assert state(built[0]) == stock


def test_an_error_inside_undoes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    built = tiny_pipelines.wan()
    patch = vsparse.apply(built[0], "vsa", density=0.5)
    tiny_pipelines.run(built)
    before = state(built[0])
    monkeypatch.setattr(host_order, "_each", None)  # deep inside the kernel's op
    with pytest.raises(TypeError), profiled(built[0], Timeline(Ticks()), patch):
        tiny_pipelines.run(built)
    monkeypatch.undo()
    assert state(built[0]) == before


def test_a_compiled_model_is_refused() -> None:
    pipe, _ = tiny_pipelines.wan()
    before = state(pipe)
    pipe.transformer.blocks[0].compile()
    with pytest.raises(NotImplementedError, match="compiled"), profiled(pipe, Timeline(Ticks())):
        pass
    del pipe.transformer.blocks[0]._compiled_call_impl
    assert state(pipe) == before


def seen(method: str | None, **options: Any) -> dict[Span, float]:
    built = tiny_pipelines.wan()
    patch = None if method is None else vsparse.apply(built[0], method, **options)
    timeline = Timeline(Ticks())
    with profiled(built[0], timeline, patch):
        tiny_pipelines.run(built, output_type="np")
    return timeline.end()


def test_every_part_of_a_dense_generation_is_seen() -> None:
    spans = seen(None)
    assert {span.part for span in spans} == set(PARTS) - {CHOOSE, SEARCH, PACK, COMBINE, COMMUNICATE}
    steps, layers = tiny_pipelines.SIZE["num_inference_steps"], 2
    kernels = {span for span in spans if span.part == KERNEL}
    assert kernels == {Span(KERNEL, i, "dense", step) for i in range(layers) for step in range(steps)}
    assert {(span.layer, span.phase) for span in spans if span.part in (TEXT, VAE, SCHEDULER, TRANSFORMER)} == {
        (None, "")
    }


def test_every_part_of_a_sparse_generation_is_seen() -> None:
    parts = {(span.part, span.phase) for span in seen("vsa", density=0.5)}
    assert {(part, "search") for part in (KERNEL, CHOOSE, PACK, COMBINE, PROJECT, CROSS, FEED, BLOCK)} <= parts
    schedule = vsparse.Schedule(dense_steps=0.5, search_at=(0.5,))
    parts = {(span.part, span.phase) for span in seen("adaspa", density=0.5, block=16, schedule=schedule)}
    assert {(SEARCH, "search"), (CHOOSE, "search"), (KERNEL, "reuse"), (CHOOSE, "reuse")} <= parts
    assert (KERNEL, "search") not in parts, "the search is attention and mass in one"


@pytest.mark.parametrize("host", rows.HOSTS)
def test_layers_of_every_host_are_told_apart(host: str) -> None:
    model, inputs = rows.build(host)
    timeline = Timeline(Ticks())
    with profiled(model, timeline):
        rows.forward(model, rows.prompt(host, inputs, batch=1))
    spans = timeline.end()
    layers = len(list(rows.sites(rows.build(host)[0]))) or len(vsparse.plan(model, "dense").sites)
    for part in (KERNEL, PROJECT, BLOCK):
        assert {span.layer for span in spans if span.part == part} == set(range(layers)), part
    assert {span.layer for span in spans if span.part == FEED} == set(range(layers))
    assert (CROSS in {span.part for span in spans}) == host.startswith("wan")


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_whole_generations() -> None:
    found = known()
    assert found.rounds == 3
    assert (found.seconds("dense").median, found.seconds("sparse").median) == (11.0, 5.5)
    assert found.spread("dense") == 2.0 / 11.0
    assert (found.speed.low, found.speed.median, found.speed.high) == (2.0, 2.0, 2.0)
    assert found.floor is not None
    assert (found.floor.low, found.floor.high, found.floor.count) == (12 / 11, 11 / 10, 2)
    assert "2.00 times as fast" in found.verdict
    assert known(rounds=1).floor is None
    assert "one round" in known(rounds=1).verdict


def test_what_no_part_claims_and_what_profiling_costs() -> None:
    found = known()
    claimed = [(6.0 + i + 1.0 + 2.0) / (1.1 * (10.0 + i)) for i in range(3)]
    assert found.gap("dense").median == 1.0 - sorted(claimed)[1]
    assert found.cost("dense").median == pytest.approx(0.1)
    assert found.cost("sparse").high == pytest.approx(0.1)
    missed = [line for line in tables.sentences(found) if line.startswith("Missed")]
    assert len(missed) == 4
    assert not [line for line in tables.sentences(found) if line.startswith("Not shown")]
    assert "the cost of profiling of the dense runs is 10.0% (10.0% to 10.0%), the goal is 3%" in missed[1]


def test_a_goal_that_the_interval_reaches_beyond_is_not_shown() -> None:
    found = known()
    quick = [dc.replace(run, seconds=run.seconds / 1.1) if run.spans else run for run in found.runs]
    assert not [line for line in tables.sentences(dc.replace(found, runs=quick)) if "cost of profiling" in line]
    quick[2] = dc.replace(quick[2], seconds=quick[2].seconds * 1.2)
    (line,) = [line for line in tables.sentences(dc.replace(found, runs=quick)) if "cost of profiling" in line]
    assert line.startswith("Not shown: the cost of profiling of the dense runs is 0.0%")


def test_parts_add_up_to_the_clock_around_them() -> None:
    found = known()
    assert found.typical("dense").seconds == 1.1 * 11.0
    parts = found.parts("dense")
    assert set(parts) == set(PARTS)
    assert {part: seconds for part, seconds in parts.items() if seconds and part != REST} == {
        KERNEL: 7.0, PROJECT: 1.0, VAE: 2.0,
    }  # fmt: skip
    assert math.fsum(parts.values()) == pytest.approx(found.typical("dense").seconds)
    assert parts[REST] == found.typical("dense").seconds - 10.0
    kernel = found.part("dense", KERNEL)
    assert (kernel.low, kernel.median, kernel.high) == (6.0, 7.0, 8.0)


def test_layers_steps_and_phases() -> None:
    found = known()
    assert found.layers("sparse") == {0: {KERNEL: 1.5, CHOOSE: 0.5, PROJECT: 1.0}}
    assert found.steps("sparse") == [3.0]
    (row,) = found.phases("sparse")
    assert (row.phase, row.calls, row.seconds) == ("reuse", 1, 3.0)
    (row,) = found.phases("dense")
    assert (row.phase, row.calls, row.parts[KERNEL]) == ("dense", 4, 7.0 / 4)


def test_bounds() -> None:
    found = known()
    share = 7.0 / (1.1 * 11.0)
    assert found.attention_share == share
    assert found.amdahl == 1 / (1 - share / 2)
    assert found.limit == 1 / (1 - share)
    assert (found.density, found.executed.dense_steps, found.executed.dense_layers) == (0.5, 1, 1)


def test_json_and_tables_say_the_same() -> None:
    found = known()
    told = json.loads(json.dumps(found.as_json()))
    assert told["speed"]["median"] == found.speed.median
    assert sum(told["typical"]["sparse"].values()) == pytest.approx(found.typical("sparse").seconds)
    assert told["heads"] == found.executed.density
    assert len(told["runs"]) == len(found.runs)
    cells = [list(column.cells) for column in tables.parts_table(found).columns]
    by_name = {name.strip(): i for i, name in enumerate(cells[0])}
    assert cells[1][by_name[KERNEL]] == "7.000"
    assert cells[3][by_name["self-attention"]] == "3.000"
    assert cells[3][by_name["sum"]] == f"{found.typical('sparse').seconds:.3f}"
    assert cells[4][by_name["sum"]] == "100.0%"
    assert set(SELF_ATTENTION) < set(PARTS)
    assert tables.whole_rows(found)[-1] == ["dense layers", "2 of 2", "1 of 2"]


# ---- rounds ----------------------------------------------------------------------------------------------------------


def test_four_rounds_put_each_kind_and_way_first_as_often() -> None:
    first = [orders(i)[0] for i in range(4)]
    assert sorted(first) == [(kind, way) for kind in ("dense", "sparse") for way in (False, True)]
    for i in range(4):
        assert sorted(orders(i)) == sorted(orders(0))
    assert (rounds_in(60, 10), rounds_in(60, 100), rounds_in(60, 0)) == (6, LEAST, MOST)


def test_rounds_measure_and_give_the_pipeline_back() -> None:
    pipe, _ = built = tiny_pipelines.wan()
    tiny_pipelines.run(built, output_type="np")  # the VAE keeps attributes of its own
    before, told = state(pipe), []
    asked = {"prompt": "a cat", "height": 32, "width": 32, "frames": 5, "steps": 2, "seed": 0}
    method = get_method("vsa")(density=0.5, tile=(1, 4, 4), block=16)
    runs, executed, work = take_turns(
        pipe, method, vsparse.Schedule(dense_steps=0.5), asked, seconds=1, rounds=2, began=lambda *x: told.append(x),
        clock=Ticks(),
    )  # fmt: skip
    assert state(pipe) == before
    assert [(run.kind, run.spans is not None) for run in runs] == [*orders(0), *orders(1)]
    assert [name for name, _ in told][:3] == ["warm-up", "densities", "dense"]
    for one in runs:
        if one.spans is not None:  # the clock around a run ticks once before the first mark and once after the last
            assert sum(one.spans.values()) == one.seconds - 2.0
    assert executed.phases == [["dense", "dense"], ["search", "search"]]
    assert executed.density[0] == [[1.0, 1.0], [1.0, 1.0]]
    assert executed.dense_steps == 1
    mean = sum(x for step in executed.density for layer in step for x in layer) / 8
    assert mean == pytest.approx(executed.stats["density"])
    assert executed.blocks is not None
    assert executed.step == 1
    heads, width, tokens, layers, steps, branches = 2, 64, 3 * 8 * 8, 2, 2, 2
    assert pipe.transformer.config.num_attention_heads == heads
    full = 4.0 * heads * tokens**2 * width * layers * branches
    assert work["dense"][KERNEL].attention == full * steps
    assert work["sparse"][KERNEL].attention == full, "the first of two steps is dense"
    sparse = [x for layer in executed.density[1] for x in layer]
    assert executed.flops[KERNEL] == pytest.approx(full * sum(sparse) / len(sparse))
    assert executed.flops[CHOOSE] > 0
    inner = pipe.transformer.config.ffn_dim
    assert work["dense"][FEED].products == 2 * 2.0 * tokens * heads * width * inner * layers * branches * steps


def test_watching_reads_densities_of_searches_and_reuses() -> None:
    pipe, _ = built = tiny_pipelines.wan()
    patch = vsparse.apply(pipe, "adaspa", density=0.5, block=16)
    tiny_pipelines.run(built)
    before = state(pipe)
    with watching(pipe, patch, rows.SHORT) as watcher:
        tiny_pipelines.run(built, num_inference_steps=rows.SHORT)
    found = watcher.executed()
    assert state(pipe) == before
    assert [set(step) for step in found.phases] == [{phase} for phase in rows.ADASPA]
    assert found.density[0] == [[1.0, 1.0]] * 2, "its output is dense"
    assert all(x < 1 for layer in found.density[1] for x in layer)


def test_clock_of_the_cpu() -> None:
    clock = CpuClock()
    marks = [clock.mark() for _ in range(3)]
    assert clock.seconds(marks) == [marks[1] - marks[0], marks[2] - marks[1]]
    assert clock.now() >= marks[2]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command_measures_the_embedded_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "_width", 160)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "measure_rates", lambda *_: RATES)
    asked = ["latency", "-m", "vsa", "-s", "density=0.25", "-s", "tile=1x8x8", "--steps", "1", "--rounds", "1"]
    result = CliRunner().invoke(cli.app, [*asked, "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for words in ("choose the map", "no speed-up is quoted: one round", "Bounds:", "cost of profiling (goal 3%)"):
        assert words.lower() in result.output.lower()
    told = json.loads((tmp_path / "latency.json").read_text())
    assert told["density"] == pytest.approx(0.25)
    assert told["rounds"] == 1


def test_command_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="go with a MODEL"):
        opened(None, device="cpu")
    result = CliRunner().invoke(cli.app, ["latency", str(tmp_path), "-o", str(tmp_path / "x")])
    assert result.exit_code == 2
