"""Rates: known times give known figures, a file gives back what was put in, and nothing else is taken for one."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vsparse.measure.machines import room
from vsparse.measure.rates import FORMAT, KINDS, LINKS, Point, cluster_of, fitted, read_rates, timed
from vsparse.measure.recall_report import as_rows
from vsparse.parallel.collectives import ALONE

ROOT = Path(__file__).resolve().parents[2]
FIXED = {"inside": 1e-5, "between": 3e-5, "inside_ring": 2e-5, "between_ring": 4e-5, "attention": 5e-5, "merging": 0.0}
SPEED = {"inside": 4e11, "between": 5e10, "inside_ring": 3e11, "between_ring": 2e10, "attention": 3e14, "merging": 2e12}


def points(*without: str) -> dict[str, list[Point]]:
    """Times that follow the figures above exactly; medians of three, of which the others are off."""
    found: dict[str, list[Point]] = {}
    for kind in KINDS:
        sizes = [] if kind in without else [1e6, 1e7, 1e8, 1e9]
        exact = [(x, FIXED[kind] + x / SPEED[kind]) for x in sizes]
        found[kind] = [Point(name="made", amount=x, times=(2 * t, t, t / 2)) for x, t in exact]
    return found


def report(*without: str, per_node: int = 8) -> dict[str, Any]:
    found = fitted(points(*without), "two clocks, today")
    return {"format": FORMAT, "device": "clock", "per_node": per_node, "memory": 2**30, "fitted": found}


def test_figures_come_out_as_put_in() -> None:
    found = fitted(points(), "two clocks, today")
    for kind in LINKS:
        one = found[kind]
        assert one is not None
        assert (one["latency"], one["bandwidth"]) == (pytest.approx(FIXED[kind]), pytest.approx(SPEED[kind]))
    rate = found["attention"]
    assert rate is not None
    assert (rate["overhead"], rate["flops"]) == (pytest.approx(FIXED["attention"]), pytest.approx(SPEED["attention"]))
    assert rate["memory"] == pytest.approx(SPEED["merging"])
    for one in found.values():
        assert one is not None
        for words in ("measured: ", "fitted to 4 measurements", "two clocks, today"):
            assert words in one["origin"]
    assert "by made" in rate["origin"]


def test_what_was_not_measured_is_not_there() -> None:
    found = fitted(points("between", "between_ring"), "here")
    assert (found["between"], found["between_ring"]) == (None, None)
    with pytest.raises(ValueError, match="seconds must grow"):
        fitted({**points(), "inside": [Point(name="x", amount=a, times=(1.0 / a,)) for a in (1.0, 2.0)]}, "here")


def test_times_are_those_of_a_clock() -> None:
    """Runs that warm up do not count, and neither does what happens between two."""
    now, lasts = 0.0, iter([50.0, 40.0, 3.0, 1.0, 2.0])

    def work() -> None:
        nonlocal now
        now += next(lasts)

    def clock() -> float:
        nonlocal now
        now += 0.5
        return now

    found = timed(work, ALONE, torch.device("cpu"), warmup=2, repeats=3, clock=clock)
    assert found == [3.5, 1.5, 2.5]
    one = Point(name="work", amount=1.0, times=tuple(found))
    assert (one.seconds, one.spread) == (2.5, 2.0 / 2.5)


def test_a_file_gives_back_its_cluster(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(as_rows(report()))
    found = read_rates(path)
    assert found == cluster_of(report())
    assert (found.name, found.per_node, found.memory) == ("clock", 8, room(2**30))
    assert found.between is not None
    assert found.link(0, 9) is found.between
    assert found.link(0, 9, ring=True) is found.between_ring
    assert (found.link(0, 1), found.link(0, 1, ring=True)) == (found.inside, found.inside_ring)
    assert all("measured: " in line for line in found.assumptions())
    assert len(found.assumptions()) == 5


def test_nodes_of_one_process_have_nothing_inside(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(as_rows(report("inside", "inside_ring", per_node=1)))
    found = read_rates(path)
    assert found.link(0, 1) is found.between


BROKEN: dict[str, tuple[Any, str]] = {
    "no object": ([], "damaged, or none"),
    "another file": ({"densities": []}, "damaged, or none: KeyError 'format'"),
    "newer": ({**report(), "format": FORMAT + 1}, f"its format is {FORMAT + 1}, and this vsparse reads {FORMAT}"),
    "nothing fitted": ({**report(), "fitted": {}}, "damaged, or none: KeyError 'inside'"),
    "no link": (report("inside"), "no link between the processes of a node"),
    "a word": ({**report(), "memory": "much"}, "damaged, or none: TypeError"),
    "no speed": (
        {**report(), "fitted": {**report()["fitted"], "inside": {"latency": 0.0, "bandwidth": 0.0, "origin": "x"}}},
        "cannot be used: Link: bandwidth must be a finite number, positive, got 0.0",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="this file of rates") as error:
        read_rates(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_half_a_file_and_none(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    with pytest.raises(FileNotFoundError, match=r"no such file; torchrun .*measure_rates.py --out"):
        read_rates(path)
    path.write_text(as_rows(report())[:200])
    with pytest.raises(ValueError, match="damaged"):
        read_rates(path)


def test_the_script_wants_torchrun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_rates.py", "--out", str(tmp_path / "rates.json")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "measure_rates.py"), run_name="__main__")
    assert "start it with torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
