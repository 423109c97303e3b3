"""The figures of docs/scaling.md on a model small enough to run here."""

from __future__ import annotations

import dataclasses as dc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vsparse.geometry import Grid
from vsparse.measure import machines, scaling, scaling_report
from vsparse.measure.recall import kept_by
from vsparse.measure.recall_report import as_rows
from vsparse.measure.sharding import chosen_map
from vsparse.measure.synthetic import structured_sample
from vsparse.methods import get_method
from vsparse.parallel.planner import PARTS

SMALL = scaling.Model(name="small", grid=Grid(t=8, h=8, w=8, text_after=5), heads=13, layers=2, head_dim=16)
LINES = (
    scaling.Line(name="dense", method="dense"),
    scaling.Line(name="sta", method="sta", options={"window": (1, 3, 3), "tile": (2, 4, 4), "block": 16}),
    scaling.Line(
        name="nabla",
        method="nabla",
        options={"mass": 0.3, "window": (1, 1, 1), "tile": (1, 4, 4), "block": 16},
    ),
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    maps = scaling.maps_of(LINES, SMALL)
    clusters = machines.clusters(dense=False)
    return [scaling.case(line, SMALL, maps[line.name], clusters, gpus=(1, 2, 8)) for line in LINES]


@pytest.mark.parametrize("key", ["nabla", "sparge"])
def test_chosen_map_is_the_one_that_runs(key: str) -> None:
    sample = structured_sample(Grid(t=4, h=8, w=8, text_after=5))
    options = {"window": (3, 1, 1), "tile": (1, 4, 4)} if key == "nabla" else {"similarity": 0.0}
    method = get_method(key)(block=16, mass=0.5, **options)
    assert torch.equal(chosen_map(method, sample).to_mask()[0], kept_by(method, sample).keep)


def test_a_method_that_searches_by_attending_is_refused() -> None:
    with pytest.raises(ValueError, match="must choose before it attends, but 'adaspa'"):
        chosen_map(get_method("adaspa")(), structured_sample(Grid(t=2, h=4, w=4)))
    with pytest.raises(NotImplementedError, match="no sparse path"):
        chosen_map(get_method("dense")(), structured_sample(Grid(t=2, h=4, w=4)))


def test_heads_that_are_made_differ() -> None:
    found = torch.cat([one.density()[0] for one in scaling.maps_of(LINES, SMALL)["nabla"]])
    assert found.shape == (12,)
    assert float(found.max() / found.min()) > 1.5


def test_cases_hold_what_documents_say(rows: list[dict[str, Any]]) -> None:
    dense, sta, nabla = rows
    assert dense["density"] == [1.0, 1.0, 1.0]
    assert 0 < nabla["density"][1] < nabla["density"][0] < nabla["density"][2] < sta["density"][0] < 1
    for row in rows:
        pairs = {(one["ulysses"], one["ring"]): one for one in row["splits"]}
        assert list(pairs) == [(1, 1), (2, 1), (1, 2), (8, 1), (4, 2), (2, 4), (1, 8)]
        assert pairs[1, 8]["by_work"] <= pairs[1, 8]["balanced"] * 1.001
        for found in row["predicted"].values():
            assert found["1"]["speedup"] == 1.0
            for one in found.values():
                assert one["seconds"] == pytest.approx(sum(one[part] for part in PARTS), rel=1e-3)
                assert one["speedup"] >= max(x for x in one["pure"].values() if x is not None) * 0.999
    assert all(one["union"] in (0.0, 1.0) for one in dense["splits"])
    assert 0 < max(one["union"] for one in sta["splits"]) < 1


def test_balance_figures() -> None:
    steps = [[1.0, 5.0] * 6, [5.0, 1.0] * 6, [1.0] * 6 + [5.0] * 6]
    found = scaling.balance_figures(steps)
    assert found["spread"] == [5.0, 5.0]
    first = found["rows"][0]
    assert (first["source"], first["heads"], first["processes"]) == ("recorded", 12, 2)
    assert first["naive"] == [round((1 + 1 + 30 / 18) / 3, 3), round(30 / 18, 3)]
    assert first["equal"] == [1.0, 1.0]
    assert len(found["rows"]) == 2 * 3 * 3
    for row in found["rows"]:
        assert row["least"][0] <= row["free"][0] * 1.001
        assert row["equal"][0] <= row["naive"][0]
    two = found["kept"][0]
    assert (two["processes"], two["plans"], two["steps"], two["worst"]) == (2, 1, 3, 1.0)


def test_assumptions_are_declared() -> None:
    lines = machines.assumed()
    assert all("assumed: " in line for line in lines[:-1])
    for words in (
        "sparse attention: assumed: 30% of 989",
        "full attention: assumed: 50%",
        "450 GB/s",
        "64 GB/s",
        "400 Gb/s",
    ):
        assert any(words in line for line in lines), words


def test_picture(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    balance = scaling.balance_figures([[1.0, 5.0] * 6])
    path = scaling_report.plot(tmp_path / "scaling.png", {"cases": rows, "balance": balance})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_published_models_are_those_of_their_cards() -> None:
    assert {model.name: (model.grid.tokens, model.heads, model.layers) for model in scaling.MODELS} == {
        "Wan 2.1 14B, 720p": (75_600, 40, 40),
        "HunyuanVideo, 720p": (118_800 + 256, 24, 60),
        "Wan 2.1 1.3B, 480p": (32_760, 12, 30),
    }
    assert dc.replace(scaling.MODELS[0]).head_dim == 128


def test_the_file_of_figures_has_a_line_for_each_row(rows: list[dict[str, Any]]) -> None:
    assert json.loads(as_rows({"cases": rows})) == json.loads(json.dumps({"cases": rows}))
    for one in (rows[0]["splits"][0], rows[0]["predicted"]["PCIe 5"]["8"]):
        assert json.dumps(one) in as_rows(rows)
    text = (Path(__file__).resolve().parents[2] / "docs" / "scaling.json").read_text()
    assert as_rows(json.loads(text)) == text
