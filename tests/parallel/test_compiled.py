"""A divided host under `torch.compile`: what it gives and sends back, how many graphs it takes, what is refused."""

from __future__ import annotations

import dataclasses as dc
import itertools
from typing import Any

import pytest
import rows
import torch
from compiling import WAYS, Counted, compile_blocks, compiled
from divided import Case, compared, enable_parallelism
from processes import Get
from torch._dynamo.exc import Unsupported

import vsparse
from vsparse.parallel.context import parse

Row = tuple[str, str, str, str, str, str]

SETTINGS = ("ulysses=2", "ring=2", "gather=2", "ulysses=2,ring=2")
THIN: list[Row] = [
    ("wan", "vsa", "ulysses=2", "blocks", "aot_eager", "after"),
    ("wan", "vsa", "ring=2", "blocks", "eager", "before"),
]
PRODUCT = list(itertools.product(["wan"], ["vsa", "adaspa"], SETTINGS, WAYS, ["aot_eager"], ["before", "after"]))
MORE: list[Row] = [
    ("wan", "dsv", "gather=2", "blocks", "aot_eager", "after"),
    ("wan", "vsa", "ulysses=2", "blocks", "inductor", "after"),
    ("wan", "vsa", "ring=2", "blocks", "inductor", "after"),
    *((host, "vsa", "ulysses=2,ring=2", "blocks", "aot_eager", "after") for host in rows.HOSTS if host != "wan"),
]


@pytest.mark.parametrize(
    ("host", "method", "setting", "way", "backend", "when"),
    [*THIN, *(pytest.param(*row, marks=pytest.mark.full) for row in [*PRODUCT, *MORE] if row not in THIN)],
)
def test_it_gives_what_one_process_gives(
    pool: Get, pair: Get, host: str, method: str, setting: str, way: str, backend: str, when: str
) -> None:
    """Outputs, losses and every gradient by the law of divided hosts, activations recomputed in the backward."""
    case = Case(
        host=host, method=method, parallel=parse(setting), compiled=(way, backend, when), checkpointing=way == "blocks"
    )
    get = pair if case.parallel.size == 2 else pool
    found = get().run(compared, case)
    assert all(max(one.values()) <= 2 for one in found), found


def graphs(setting: str, by_diffusers: bool) -> tuple[int, list[int], int]:
    """Graphs of the stock host, after each of several forwards, and heads that have moved in between."""
    parallel = parse(setting)
    model, inputs = rows.build("wan", heads=4, layers=3)
    prompts = [rows.prompt("wan", inputs, (4, 4, 6), seed=seed) for seed in range(2)]
    stock = Counted()
    rows.forward(compiled(model, "blocks", stock), prompts[0])
    own = None if by_diffusers else dc.replace(parallel, balance=1.0)  # heads move where they differ at all
    options = {**rows.METHODS["vsa"].sparse, "schedule": vsparse.Schedule(dense_steps=0.2)}
    with rows.randomise(vsparse.apply(model, "vsa", parallel=own, **options)) as patch:
        if by_diffusers:
            enable_parallelism(model, parallel)
        count, seen = Counted(), []
        compile_blocks(model, count)
        for values in prompts:
            with patch.generation(10):
                for step in range(6):
                    with patch.step(step):
                        rows.forward(model, values)
                    seen.append(count.graphs)
        balance = patch._runtimes[0].division._balance.values()
        assert set(patch.stats()["calls"]) == {"dense", "search"}
        return stock.graphs, seen, sum(x.plans for x in balance)


@pytest.mark.parametrize(
    ("setting", "by_diffusers"),
    [("ulysses=2", False), *(pytest.param(x, x == SETTINGS[0], marks=pytest.mark.full) for x in SETTINGS)],
)
def test_graphs_do_not_grow(pool: Get, pair: Get, setting: str, by_diffusers: bool) -> None:
    """Two for each of the stock host, before an attention and behind it, whatever the layer, step, phase or prompt.

    diffusers' own division has hooks around the first block, which take graphs, too, but once.
    """
    get = pair if parse(setting).size == 2 else pool
    for stock, seen, moved in get().run(graphs, setting, by_diffusers):
        assert seen == [seen[0] if by_diffusers else 2 * stock] * 12
        assert bool(moved) == ("ulysses" in setting)


def refused(setting: str, way: str) -> str:
    """What a host says that must be one graph."""
    model, inputs = rows.build("wan", heads=3)
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "vsa", parallel=parse(setting), **rows.METHODS["vsa"].sparse):
        host: Any = model
        if way == "repeated":
            compile_blocks(model, "eager", fullgraph=True)
        elif way == "wrapped":
            model.blocks[1] = torch.compile(model.blocks[1], backend="eager", fullgraph=True)
        else:
            host = torch.compile(model, backend="eager", fullgraph=True)
        try:
            rows.forward(host, values)
        except (ValueError, Unsupported) as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("repeated", ["fullgraph must be False", "got True for blocks.0, blocks.1;"]),
        ("wrapped", ["fullgraph must be False", "got True for blocks.1;"]),
        ("whole", ["vsparse prepares each forward on the host; use fullgraph=False"]),
    ],
)
def test_one_graph_is_refused_on_every_process(pool: Get, way: str, words: list[str]) -> None:
    for said in pool().run(refused, "ulysses=2,ring=2", way):
        assert all(word in said for word in words), said
