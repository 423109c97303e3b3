"""The cost model: closed forms in, seconds and errors out; rates that are kept, damaged, or measured again."""

from __future__ import annotations

import dataclasses as dc
import json
from pathlib import Path

import pytest
import torch
from latency_cases import RATES, WORK, known

from vsparse.measure.latency import model, rates, tables
from vsparse.measure.latency.rates import Rates, machine_rates, measure_rates
from vsparse.measure.latency.timeline import CHOOSE, KERNEL, PROJECT, REST, TEXT
from vsparse.measure.latency.work import Work

CPU, FLOAT = torch.device("cpu"), torch.float32


def test_seconds_of_work() -> None:
    assert model.predicted(Work(products=100.0), RATES) == 1.0
    assert model.predicted(Work(attention=100.0), RATES) == 2.0
    assert model.predicted(Work(moved=10.0), RATES) == 1.0
    assert model.predicted(Work(calls=3.0), RATES) == 1.5
    assert model.predicted(Work(touched=1e9), RATES) == 0.0


def test_a_step_is_taken_as_often_as_there_are_steps() -> None:
    found = model.steps_of({KERNEL: Work(attention=3.0, calls=1.0), TEXT: Work(products=5.0)}, 4)
    assert found == {KERNEL: Work(attention=12.0, calls=4.0), TEXT: Work(products=5.0)}


def test_predictions_and_their_errors() -> None:
    found = known()
    dense = {row.part: row for row in found.predictions("dense")}
    assert dense[KERNEL].seconds == 300 / 50 + 2 * 0.5
    assert dense[PROJECT].seconds == 40 / 100 + 5 / 10 + 0.5
    assert dense["sum"].seconds == dense[KERNEL].seconds + dense[PROJECT].seconds
    assert dense["sum"].measured == 7.0 + 1.0, "of the same parts"
    assert dense[KERNEL].error == 7.0 / 7.0 - 1.0
    assert REST not in dense
    sparse = {row.part: row for row in found.predictions("sparse")}
    # Dense calls, kept pairs at the sparse rate, and the overhead of the one sparse call.
    assert sparse[KERNEL].seconds == (100 / 50 + 2 * 0.5) + 400 / 200 + 1 * 0.25
    assert sparse[CHOOSE].seconds == 50 / 100 + 1 / 10 + 0.5, "the products that the method declares"
    assert sparse[KERNEL].error == sparse[KERNEL].seconds / 1.5 - 1.0
    rows = {row[0]: row[1:] for row in tables.predicted_rows(found)}
    assert rows[KERNEL] == ["7.000", "7.000", "+0%", "5.250", "1.500", "+250%"]
    assert dc.replace(found, rates=None).predictions("dense") == []
    assert found.as_json()["predicted"]["sparse"][0]["error"] == sparse[KERNEL].error


def test_flops_by_part() -> None:
    found = known()
    assert found.flops("dense") == {KERNEL: 300.0, PROJECT: 40.0, REST: 0.0}
    assert found.flops("sparse") == {KERNEL: 500.0, CHOOSE: 50.0, PROJECT: 40.0, "exact search": 0.0}
    assert set(WORK["sparse"]) <= set(found.flops("sparse"))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[int]]:
    """Rates are kept in a folder of the test, and measuring is counted instead of done."""
    path, count = tmp_path / "deep" / "rates.json", []
    monkeypatch.setattr(rates, "cache_file", lambda: path)

    def measure(device: torch.device, dtype: torch.dtype) -> Rates:
        count.append(1)
        return RATES

    monkeypatch.setattr(rates, "measure_rates", measure)
    return path, count


def test_rates_are_measured_once(kept: tuple[Path, list[int]]) -> None:
    path, count = kept
    assert machine_rates(CPU, FLOAT) == machine_rates(CPU, FLOAT) == RATES
    assert len(count) == 1
    assert [x.name for x in path.parent.iterdir()] == ["rates.json"]
    machine_rates(CPU, torch.bfloat16)
    assert len(count) == 2
    assert len(json.loads(path.read_text())) == 2
    machine_rates(CPU, FLOAT, again=True)
    assert len(count) == 3


@pytest.mark.parametrize("text", ["", "[1]", "{", "old", "negative"])
def test_damaged_rates_are_measured_anew(kept: tuple[Path, list[int]], text: str) -> None:
    path, count = kept
    machine_rates(CPU, FLOAT)
    (key,) = json.loads(path.read_text())
    if text == "old":
        text = json.dumps({key: {"device": "x"}, "other": 1})
    if text == "negative":
        text = json.dumps({key: {**dc.asdict(RATES), "memory": -1.0}})
    path.write_text(text)
    assert machine_rates(CPU, FLOAT) == RATES
    assert len(count) == 2
    assert machine_rates(CPU, FLOAT) == RATES
    assert len(count) == 2, "and kept again"


def test_rates_that_cannot_be_kept_are_used(kept: tuple[Path, list[int]]) -> None:
    path, count = kept
    path.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert machine_rates(CPU, FLOAT) == RATES
    assert len(count) == 1


def test_the_cache_is_among_those_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert rates.cache_file() == tmp_path / "vsparse" / "rates.json"


def test_rates_survive_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_TURNS", 1)
    found = measure_rates(CPU, FLOAT)
    assert Rates.read(json.loads(json.dumps(dc.asdict(found)))) == found
    assert found.dtype == "float32"
    with pytest.raises(ValueError, match="memory must be"):
        dc.replace(found, memory=float("nan"))


def test_random_attention_computes_what_it_says() -> None:
    options = {"heads": 2, "width": 16, "density": 0.5, "device": torch.device("cpu"), "dtype": torch.float32}
    found, again = (rates.RandomAttention.of(4 * 64, **options) for _ in range(2))
    assert torch.equal(found.blocks.count, torch.full_like(found.blocks.count, 2))
    assert found.flops == 4 * 16 * 2 * (4 * 2) * 64**2
    assert found.q.shape == (1, 4 * 64, 2, 16)
    assert torch.equal(found.run()[0], again.run()[0])
    assert not torch.equal(found.blocks.index[:, 0], found.blocks.index[:, 1])
