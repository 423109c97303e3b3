"""One attention layer: what is predicted from its sizes alone, what is measured of it, and when that is refused."""

from __future__ import annotations

import dataclasses as dc
import html
import json
from pathlib import Path

import pytest
import torch
from latency_cases import RATES, Ticks
from typer.testing import CliRunner

from vsparse import cli
from vsparse.geometry import Grid
from vsparse.measure.latency import layer, rates, report, tables
from vsparse.measure.latency.baselines import DEFAULT, Baseline
from vsparse.measure.latency.intervals import interval
from vsparse.measure.latency.layer import (
    BOUND,
    Case,
    Layer,
    Measured,
    case_of,
    measure_layer,
    phases_of,
    predict_layer,
    refusal,
)
from vsparse.measure.latency.timeline import CHOOSE, KERNEL, PACK, SEARCH
from vsparse.measure.scaling import MODELS
from vsparse.methods import get_method

CPU = torch.device("cpu")
SMALL = Case(name="small", grid=Grid(t=2, h=6, w=8), heads=2, head_dim=16)
VSA = get_method("vsa")(density=0.5, tile=(1, 4, 4), block=16)
ADASPA = get_method("adaspa")(density=0.5, block=16)
TOKENS, SLOTS = 2 * 6 * 8, 2 * 8 * 8  # tiles of 4 x 4 pad 6 rows to 8


def test_cases_by_name_and_by_model() -> None:
    for model in MODELS:
        found = case_of(model.name)
        assert (found.grid, found.heads, found.head_dim) == (model.grid, model.heads, model.head_dim)
    found = case_of("WanTransformer3DModel", height=480, width=832, frames=81)
    assert (found.grid, found.heads, found.head_dim) == (Grid(t=21, h=30, w=52), 40, 128)
    with pytest.raises(ValueError, match=r"one of 'Wan 2\.1 14B, 720p'"):
        case_of("Wan 14B")
    with pytest.raises(ValueError, match="has its size"):
        case_of(MODELS[0].name, height=480)


def test_prediction_of_a_method_that_chooses_in_every_call() -> None:
    """Rates: 100 for products, 50 for full attention, 200 for sparse with 0.25 s for a call, memory 10."""
    found = predict_layer(SMALL, VSA, dc.replace(RATES, memory=1e9), 4)
    assert list(found) == ["dense", "search"]
    assert found["dense"] == {KERNEL: 4 * 2 * 16 * TOKENS**2 / 50}
    tiles = 2 * 2 * 2
    tensor = SLOTS * 2 * 16 * 4
    density = VSA.predicted_density(VSA.layout(SMALL.grid, SMALL.site), SMALL.site)
    assert found["search"][KERNEL] == 0.25 + 4 * 2 * 16 * SLOTS**2 * density / 200
    assert found["search"][CHOOSE] == pytest.approx(2 * 16 * (3 * TOKENS + 4 * tiles**2) / 100 + 2 * tensor / 1e9)
    assert found["search"][PACK] == 8 * tensor / 1e9
    slow = predict_layer(SMALL, VSA, dc.replace(RATES, memory=1e-3), 4)
    assert slow["dense"][KERNEL] == 4 * tensor / 1e-3, "no faster than its memory"


def test_prediction_of_a_method_that_keeps_maps() -> None:
    found = predict_layer(SMALL, ADASPA, dc.replace(RATES, memory=1e9), 4)
    assert phases_of(ADASPA) == ("search", "refresh", "reuse")
    full = 4 * 2 * 16 * TOKENS**2
    assert found["search"] == {SEARCH: 1.5 * full / 50}, "one more product of three; the order is the host's"
    assert CHOOSE in found["refresh"]
    assert list(found["reuse"]) == [KERNEL]


def test_a_cpu_refuses_what_would_take_too_long() -> None:
    seconds = {"dense": {KERNEL: BOUND / 4}, "search": {KERNEL: BOUND / 4}}
    dense, sparse = BOUND / 4, BOUND / 4
    assert refusal({"dense": {KERNEL: dense / 2}, "search": {KERNEL: sparse / 2}}, 1, CPU) == ""
    assert f"about {3 * (3 * dense + sparse):.0f} s, more than 60 s" in refusal(seconds, 2, CPU)
    assert "about 50 minutes" in refusal(seconds, 49, CPU)
    assert refusal(seconds, 49, torch.device("cuda")) == ""


@pytest.mark.parametrize("method", [VSA, ADASPA])
def test_measured_parts_add_up(method: object) -> None:
    found = measure_layer(SMALL, method, CPU, torch.float32, rounds=2, clock=Ticks())  # type: ignore[arg-type]
    parts, whole, speeds = found.parts, found.whole, found.speeds
    assert list(whole) == ["dense", *phases_of(method)]  # type: ignore[arg-type]
    assert set(parts["dense"]) == {KERNEL}
    for phase, total in whole.items():
        assert total.count == 2
        assert sum(x.median for x in parts[phase].values()) == total.median, "every mark is one second apart"
    assert set(parts["search"]) == ({CHOOSE, PACK, KERNEL} if method is VSA else {CHOOSE, PACK, SEARCH})
    assert {phase: speed.median for phase, speed in speeds.items()} == {
        phase: whole["dense"].median / whole[phase].median for phase in speeds
    }


def test_errors_verdicts_and_table() -> None:
    times = {"dense": interval([2.0, 2.0]), "search": interval([1.0, 1.0])}
    found = Layer(
        case=SMALL,
        method="m",
        dtype="float32",
        density=0.5,
        predicted={"here": {"dense": {KERNEL: 1.0}, "search": {KERNEL: 1.0, CHOOSE: 0.5}}},
        measured=Measured(
            parts={phase: {KERNEL: x} for phase, x in times.items()},
            whole=times,
            speeds={"search": interval([2.0, 2.0])},
            baselines={"other": Baseline(seconds=interval([1.5, 1.5]), ratio=interval([1.0, 1.0]))},
            fastest="other",
            best_speeds={"search": interval([1.5, 1.5])},
        ),
    )
    assert found.errors("here") == {"dense": -0.5, "search": 0.5}
    best, usual = found.verdicts()
    assert best.startswith(
        "search: against the fastest dense attention measured in this run (other): sparse is 1.50 times"
    )
    assert usual.startswith(f"search: against {DEFAULT}: sparse is 2.00 times as fast")
    cells = [list(column.cells) for column in tables.layer_table(found).columns]
    assert cells[0] == ["full attention", "search", f"  {KERNEL}", f"  {CHOOSE}"]
    assert cells[1] == ["1 s", "1.5 s", "1 s", "500 ms"]
    assert cells[2] == ["2 s (2 to 2)", "1 s (1 to 1)", "1 s (1 to 1)", "–"]
    assert cells[3] == ["-50%", "+50%", "", ""]
    told = json.loads(json.dumps(found.as_json()))
    assert told["errors"]["search"] == 0.5
    assert (told["fastest"], told["whole"]["search"]["median"]) == ("other", 1.0)
    assert told["measured"]["search"][KERNEL]["median"] == 1.0


def test_the_assumed_gpu_says_so() -> None:
    found = layer.assumed()
    assert "assumed" in found.device
    assert "assumed" in found.dense.origin


def test_command_predicts_a_large_layer_and_measures_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = {
        name: dc.replace(getattr(RATES, name), flops=1e11, overhead=0.0) for name in ("products", "dense", "sparse")
    }
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "measure_rates", lambda *_: dc.replace(RATES, **fast, memory=1e10, call=1e-6))
    monkeypatch.setattr(cli.console, "_width", 160)
    vsa = ["latency", "-o", str(tmp_path), "-m", "vsa", "-s", "density=0.1"]
    result = CliRunner().invoke(cli.app, [*vsa, "--layer", MODELS[0].name])
    assert result.exit_code == 0, result.output
    assert "not measured: on this CPU it would take about" in result.output
    assert json.loads((tmp_path / "layer.json").read_text())["measured"] is None
    assert "not measured: on this CPU it would take about" in (tmp_path / "layer.html").read_text()
    size = ["--height", "64", "--width", "64", "--frames", "5", "--rounds", "2"]
    result = CliRunner().invoke(cli.app, [*vsa, "--layer", "WanTransformer3DModel", *size])
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "layer.json").read_text())
    assert told["whole"]["search"]["count"] == 2
    page = html.unescape((tmp_path / "layer.html").read_text())
    words = ["attention kernel", "over the fastest", "not measured: ", *told["verdicts"]]
    assert [x for x in words if x not in page] == []
    assert set(told["errors"]) == {"dense", "search"}
    result = CliRunner().invoke(cli.app, [*vsa, "model", "--layer", "x"])
    assert result.exit_code == 2
    assert report.ROUNDS >= 6


@pytest.mark.parametrize(
    "given",
    [
        ["--prompt", "x"],
        ["--seed", "0"],
        ["--steps", "4"],
        ["--seconds", "60"],
        ["--dense-steps", "0.2"],
        ["--dense-layers", "0"],
        ["--search-at", "0.5"],
    ],
    ids=lambda x: x[0],
)
def test_what_a_layer_does_not_have_is_refused(given: list[str], tmp_path: Path) -> None:
    command = ["latency", "-m", "vsa", "--layer", MODELS[0].name, "--out", str(tmp_path), *given]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    assert f"leave out {given[0]}" in " ".join(result.output.split())
