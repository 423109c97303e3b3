"""Patched at density 1, a fine-tuning is the host's own, however it is run: 20 steps of AdamW by the numerics law."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
import rows
import torch
from same_training import ALONE, SPREAD, Way, errors, parts_are_averaged, train, trained_apart, way_of, ways

Get = Callable[[], processes.Pool]
_USUAL = {modes: rows.pairwise(ways(modes)) for modes in (ALONE, SPREAD)}


@pytest.fixture(scope="session")
def pool() -> Iterator[Get]:
    with processes.pool() as get:
        yield get


@pytest.mark.parametrize(
    ("host", "lora", "mode", "method"),
    [row if row in _USUAL[ALONE] else pytest.param(*row, marks=pytest.mark.full) for row in ways(ALONE)],
)
def test_parity(host: str, lora: str, mode: str, method: str) -> None:
    way = way_of((host, lora, mode, method))
    found = errors(way, train(way))
    assert max(found.values()) <= 2, found


def test_parity_would_see_a_block_that_is_left_out() -> None:
    """The same training with some blocks dropped breaks the law, in the curve and in the parameters."""
    found = errors(way := Way(host="wan", method="vsa", options=rows.METHODS["vsa"].sparse), train(way))
    assert min(found.values()) > 2, found


def test_lora_may_come_first_or_last() -> None:
    """The same training to the last bit, whether the LoRA is added before the patch or after it."""
    first, last = (train(dc.replace(way_of(("wan", "", "plain", "vsa")), lora=order)) for order in ("before", "after"))
    assert all(map(torch.equal, first, last))


def spread(get: Get, chosen: list[tuple[str, ...]]) -> None:
    """Both processes end with the same parameters, and these are the single process's."""
    broken = {}
    for row in chosen:
        first, second = get().run(trained_apart, row)
        assert first == second, row
        found = errors(way_of(row), tuple(torch.tensor(x, dtype=torch.float64) for x in first))
        if not max(found.values()) <= 2:
            broken[row] = found
    assert not broken, broken


@pytest.mark.slow
def test_two_processes(pool: Get, tmp_path: Path) -> None:
    """With DDP and FSDP2, one sample on each process, the training is that of one process; so are the gradients of what
    the method adds, to the last bit, and that is saved and loaded whole."""
    spread(pool, _USUAL[SPREAD])
    for mode in SPREAD:
        pool().run(parts_are_averaged, mode, str(tmp_path / mode))


@pytest.mark.slow
@pytest.mark.full
def test_two_processes_in_full(pool: Get) -> None:
    spread(pool, [row for row in ways(SPREAD) if row not in _USUAL[SPREAD]])
