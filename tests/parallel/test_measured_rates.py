"""Rates measured among four processes, as two nodes of two: everything is there, and it is a cluster to plan with."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch

from vsparse.measure.rates import KINDS, LINKS, Sizes, cluster_of, measure, read_rates
from vsparse.measure.recall_report import as_rows, write_text

Get = Callable[[], processes.Pool]
SIZES = Sizes(exchanges=(2**10, 2**22), slots=(128, 8192), heads=2, width=16, dtype=torch.float32, warmup=1, repeats=3)


def measured(path: str) -> dict[str, Any]:
    told: list[str] = []
    later = (1e-6 * n * n for n in itertools.count()).__next__  # what is measured later, and is larger, takes longer
    report = measure(torch.device("cpu"), per_node=2, command="a test", sizes=SIZES, told=told.append, clock=later)
    assert len(told) == 2 * 4 + 2 * 2
    if torch.distributed.get_rank() == 0:
        write_text(Path(path), as_rows(report))
    return {**report, "date": "", "environment": {}}


def refused() -> str:
    with pytest.raises(ValueError, match="as many on each node, got 4 with 3 on a node") as error:
        measure(torch.device("cpu"), per_node=3, command="a test")
    return str(error.value)


def test_four_processes_measure_two_nodes(pool: Get, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    everyone = pool().run(measured, str(path))
    times = [one["points"] for one in everyone]
    assert all(one == times[0] for one in times), "the slowest process of a repetition is the same for all"
    report = json.loads(path.read_text())
    assert [(kind, [x["amount"] for x in report["points"][kind]]) for kind in LINKS] == [
        (kind, list(SIZES.exchanges)) for kind in LINKS
    ]
    assert [len(report["points"][kind]) for kind in KINDS] == [2] * 6
    assert all(len(x["times"]) == 3 and min(x["times"]) > 0 for kind in KINDS for x in report["points"][kind])
    names = ("command", "processes", "per_node", "backend", "kernel", "dtype")
    assert [report[name] for name in names] == ["a test", 4, 2, "gloo", "gathered", "float32"]
    flops = [x["amount"] for x in report["points"]["attention"]]
    assert flops == [4 * 16 * 2 * rows * kept * 64**2 for rows, kept in ((2, 1), (128, 26))]  # a fifth, rounded up
    found = read_rates(path)
    assert found == cluster_of(report)
    assert (found.per_node, found.between is None, found.inside_ring is None) == (2, False, False)
    assert "gloo" in found.assumptions()[1]
    assert not [x.name for x in tmp_path.iterdir() if x != path]


def test_nodes_of_unequal_size_are_refused(pool: Get) -> None:
    assert len(set(pool().run(refused))) == 1
