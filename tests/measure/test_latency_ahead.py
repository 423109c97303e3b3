"""Times of a plan: by hand with known rates, and what a step computes, counted without values."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path

import pytest
import rows
import tiny_pipelines
import torch
from latency_cases import RATES
from typer.testing import CliRunner

import vsparse
from vsparse import cli
from vsparse.measure.latency import ahead, model, rates, tables
from vsparse.measure.latency.ahead import Machine, Times, plan_times, step_work, times_of
from vsparse.measure.latency.layer import predict_site
from vsparse.measure.latency.timeline import FEED, KERNEL, PROJECT, REST
from vsparse.measure.latency.work import Work, counting

FAST = dc.replace(RATES, memory=1e9)
ABACUS = Machine(name="abacus", rates=FAST, itemsize=4)
SIZE = {"height": 96, "width": 112, "num_frames": 5}
TOKENS, LAYERS, WIDTH = 2 * 6 * 7, 2, 32
FULL = 4 * WIDTH * TOKENS**2 / 50  # seconds of full attention in one layer


def test_a_step_by_hand() -> None:
    """adaspa in 5 steps: an exact search, a refresh, three reuses; 50 FLOP/s for full attention, 200 for sparse."""
    made = vsparse.plan(rows.build("wan")[0], "adaspa", **SIZE, steps=5, density=0.5, block=21)
    work = {
        KERNEL: Work(attention=1e9),
        PROJECT: Work(products=40.0, moved=2e9, calls=1.0),
        FEED: Work(products=60.0, attention=50.0),
    }
    found = plan_times(made, ABACUS, steps=5, batch=1, work=work)
    assert found.dense == pytest.approx(LAYERS * FULL)
    site = made.sites[0]
    layout = made.method.layout(made.grid, site)  # type: ignore[arg-type]
    call = {x: sum(s.values()) for x, s in predict_site(made.method, layout, site, FAST, 4).items()}
    assert call["search"] > call["dense"] > call["reuse"]
    expected = LAYERS * (call["search"] + call["refresh"] + 3 * call["reuse"]) / 5
    assert found.sparse == pytest.approx(expected)
    # Bytes were counted in numbers of 2 bytes, and the abacus has 4; the kernel is not in the rest.
    assert found.rest == pytest.approx(40 / 100 + 2 * 2e9 / 1e9 + 0.5 + 60 / 100 + 50 / 50)
    assert found.steps == (found.dense + found.rest, found.sparse + found.rest)
    assert found.share == found.dense / (found.dense + found.rest)
    twice = plan_times(made, ABACUS, steps=5, batch=2, work=work)
    assert (twice.dense, twice.sparse, twice.rest) == (2 * found.dense, 2 * found.sparse, 2 * found.rest)
    alone = plan_times(made, ABACUS, steps=5, batch=1, work=None)
    assert (alone.rest, alone.steps, alone.share) == (None, None, None)


def test_dense_layers_and_steps_take_what_full_attention_takes() -> None:
    host = rows.build("wan")[0]
    schedule = vsparse.Schedule(dense_steps=0.5, dense_layers=1)
    made = vsparse.plan(host, "sta", **SIZE, steps=10, schedule=schedule, window=(1, 1, 1), tile=(1, 4, 4), block=16)
    found = plan_times(made, ABACUS, steps=10, batch=1, work=None)
    site = made.sites[1]
    layout = made.method.layout(made.grid, site)  # type: ignore[arg-type]
    sparse = sum(predict_site(made.method, layout, site, FAST, 4)["search"].values())
    assert found.sparse == pytest.approx(FULL + (5 * FULL + 5 * sparse) / 10)
    dense = vsparse.plan(host, "dense", **SIZE, steps=10)
    assert plan_times(dense, ABACUS, steps=10, batch=1, work=None).sparse == pytest.approx(LAYERS * FULL)


def test_of_two_experts_a_step_runs_one() -> None:
    size = {"height": 32, "width": 32, "num_frames": 5}
    one, two = (tiny_pipelines.wan(experts=n)[0] for n in (1, 2))
    times = [plan_times(vsparse.plan(x, "vsa", **size), ABACUS, steps=None, batch=1, work=None) for x in (one, two)]
    assert times[0] == times[1]
    works = [step_work(x, **size) for x in (one, two)]
    assert works[0] == works[1]


@torch.no_grad()
def test_what_a_step_computes_is_what_a_real_one_computes() -> None:
    pipe, _ = tiny_pipelines.wan()
    found = step_work(pipe, height=32, width=32, num_frames=5)
    noisy = torch.zeros(1, 4, 3, 16, 16)
    text = torch.zeros(1, 512, pipe.transformer.config.text_dim)
    with counting(pipe.transformer) as real:
        pipe.transformer(hidden_states=noisy, timestep=torch.zeros(1), encoder_hidden_states=text)
    assert {part: (x.products, x.attention) for part, x in found.items() if part != REST} == {
        part: (x.products, x.attention) for part, x in real.items() if part != REST
    }
    assert found[FEED].moved == real[FEED].moved / 2, "bfloat16 without values, float32 with them"


def test_a_bare_transformer_is_counted_in_the_pipeline_that_runs_it() -> None:
    model_, _ = rows.build("wan")
    found = step_work(model_, height=96, width=112, num_frames=5)
    assert found[KERNEL].attention == LAYERS * 4 * WIDTH * TOKENS**2
    with pytest.raises(ValueError, match="no text-to-video pipeline is known that runs a WanVACETransformer3DModel"):
        step_work(rows.build("wan_vace")[0], **SIZE)
    with pytest.raises(ValueError, match="height must be 16 plus a multiple of 16, got 100"):
        step_work(model_, height=100, width=112, num_frames=5)


def test_without_a_rest_the_attention_is_still_predicted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rates, "cache_file", lambda: tmp_path / "none.json")
    target = rows.build("wan_vace")[0]
    made = vsparse.plan(target, "vsa", **SIZE)
    times, why = times_of(made, target, SIZE, steps=None, batch=1)
    assert [one.machine.name for one in times] == ["H100, assumed"], "no rates are kept here, and none are measured"
    assert times[0].rest is None
    assert "WanVACETransformer3DModel" in why
    assert "step, vsa" not in _printed(times)


def _printed(times: list[Times]) -> str:
    with cli.console.capture() as caught:
        cli.console.print(tables.times_table(times, "vsa"))
    return " ".join(caught.get().split())


def test_the_table_says_which_rates_it_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "_width", 200)
    monkeypatch.setattr(ahead, "kept_rates", lambda *_: RATES)
    kept, sheet = ahead.machines()
    text = _printed(
        [Times(machine=kept, dense=6.0, sparse=2.0, rest=2.0), Times(machine=sheet, dense=1, sparse=1, rest=1)]
    )
    for words in (
        "2 s (3.00 times)",
        "4 s (2.00 times)",
        "4.00 times",
        "Rates of this machine in float32, measured 2026-01-01",
        "H100, assumed, never measured: for full attention 50% of 989 TFLOP/s",
        "for sparse 30% of 989 TFLOP/s",
    ):
        assert words in text, words


def test_the_error_that_is_quoted_is_that_of_the_document() -> None:
    (dense, sparse), (low, lower) = model.LOW
    text = " ".join((Path(__file__).parents[2] / "docs" / "latency.md").read_text().split())
    assert (
        f"the attention kernel comes out {dense:.0%} (dense) and {sparse:.0%} (sparse) too low".replace("%", " %")
        in text
    )
    assert f"the sum {low:.0%} and {lower:.0%}".replace("%", " %") in text


def test_the_command_prints_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "_width", 200)
    arguments = ["plan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "-m", "vsa", "--height", "480", "--width", "832"]
    result = CliRunner().invoke(cli.app, [*arguments, "--frames", "81", "--steps", "50"])
    assert result.exit_code == 0, result.output
    for words in ("30 (12 heads of 128)", "Predicted time of a step", "step, vsa", "H100, assumed"):
        assert words in result.output
    assert "not counted" not in result.output
