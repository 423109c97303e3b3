"""The benchmark of a training step on a video of a few tokens: every figure is there, and nothing needs a GPU."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import vsparse

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return runpy.run_path(str(ROOT / "scripts" / "bench_training.py"))


def test_a_small_run(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setitem(script["main"].__globals__, "in_own_process", lambda _, *x: asked.append(x) or str(len(asked)))
    given = ["--grid=2x8x8", "--layers=1", "--heads=1", "--head-dim=32", "--densities", "0.5", "--rounds=1"]
    given += [
        f"--out={tmp_path}",
        f"--record={tmp_path / 'measured.json'}",
        "--device=cpu",
        "--methods",
        "dense",
        "vsa",
    ]
    monkeypatch.setattr("sys.argv", ["bench_training.py", *given])
    script["main"]()
    report = json.loads((tmp_path / "bench_training.json").read_text())
    assert json.loads((tmp_path / "measured.json").read_text())["training"] == report
    assert [(x["method"], x["checkpointing"], x["bytes"]) for x in report["memory"]] == [
        ("dense", False, 1), ("vsa", False, 2), ("dense", True, 3), ("vsa", True, 4),
    ]  # fmt: skip
    assert all(x["counted"] > 0 for x in report["memory"])
    times = {(x["method"], x["checkpointing"]): x for x in report["times"]}
    assert len(times) == 4
    assert all(x["ratio"] == 1 and x["choosing"] == 0 for (key, _), x in times.items() if key == "dense")
    assert all(x["density"] == 0.5 and 0 < x["choosing"] < 1 for (key, _), x in times.items() if key == "vsa")


def test_a_child_prints_its_peak(
    script: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--memory", "vsa", "0.5", "1", "--grid=2x8x8", "--layers=1", "--heads=1", "--head-dim=32", "--device=cpu"]
    monkeypatch.setattr("sys.argv", ["bench_training.py", *given])
    script["main"]()
    assert int(capsys.readouterr().out) >= 0


FEW: Mapping[str, dict[str, Any]] = {"svg2": {"query_clusters": 16, "key_clusters": 64}}  # its own are for long videos


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_holds_no_more_than_a_dense_one(
    script: dict[str, Any], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of its tensors, with every method, gradients of new parameters among them."""
    monkeypatch.setattr("sys.argv", ["bench_training.py", "--grid=4x16x16", "--device=cpu"])
    given, options = script["arguments"](), script["METHODS"]
    keys = [key for key in vsparse.list_methods() if key != "by_layer"]
    for key in {*keys} - {*options}:
        monkeypatch.setitem(options, key, lambda _, key=key: FEW.get(key, {}))
    peaks = {key: script["counted"](given, key, 0.25, checkpointing=checkpointing) for key in keys}
    dense = peaks.pop("dense")
    assert {*options} <= {*keys}
    assert all(peak <= dense for peak in peaks.values()), (dense, peaks)
