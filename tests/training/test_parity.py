"""Patched at density 1, a fine-tuning is the host's own, however it is run: 20 steps of AdamW by the numerics law."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path

import pytest
import rows
import torch
from processes import Get
from same_training import (
    ALONE,
    FOUR,
    PAIR,
    SPREAD,
    Way,
    apart_from_alone,
    errors,
    learning,
    parts_are_averaged,
    shared_ways,
    train,
    trained_apart,
    trained_exactly,
    way_of,
    ways,
)

pytestmark = pytest.mark.xdist_group("training")  # with the pools: the trainings they are held to run once

_EVERY = {ALONE: ways(ALONE), SPREAD: ways(SPREAD), PAIR: shared_ways(PAIR), FOUR: shared_ways(FOUR)}
_USUAL = {modes: rows.pairwise(_EVERY[modes]) for modes in (ALONE, SPREAD)}
# Pairwise without the mode, and each mode once: eight rows would be too slow.
_USUAL[PAIR] = [
    ("wan", "", "shared", "vsa", "ring=2"),
    ("wan", "after", "shared+checkpointing", "vsa", "ulysses=2"),
    ("hunyuan_video", "", "shared+accumulation", "vsa", "ulysses=2"),
    ("hunyuan_video", "after", "shared+unwrapped", "vsa", "ring=2"),
]
_USUAL[FOUR] = [
    ("wan", "", "shared+fsdp2", "vsa", "ring=2"),
    ("hunyuan_video", "after", "shared+ddp", "vsa", "ulysses=2"),
]


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
    """All processes end with the same parameters, and these are the single process's."""
    broken = {}
    for row in chosen:
        first, *others = get().run(trained_apart, row)
        assert all(other == first for other in others), row
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
    spread(pool, [row for row in _EVERY[SPREAD] if row not in _USUAL[SPREAD]])


# ---- videos that several processes share -------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_share_each_video(pool: Get) -> None:
    """By heads or by tokens, averaged by DDP, accumulated, checkpointed, or added up without a wrapper."""
    spread(pool, _USUAL[PAIR])


@pytest.mark.slow
def test_four_processes_share_two_videos(four: Get) -> None:
    """Two processes for each sample; DDP and FSDP2 over all four."""
    spread(four, _USUAL[FOUR])


@pytest.mark.slow
@pytest.mark.full
def test_shared_videos_in_full(pool: Get, four: Get) -> None:
    assert all(set(_USUAL[modes]) <= set(_EVERY[modes]) for modes in (PAIR, FOUR))
    for modes, get in ((PAIR, pool), (FOUR, four)):
        spread(get, [row for row in _EVERY[modes] if row not in _USUAL[modes]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "method", "mode", "parallel"),
    [
        ("wan", "vsa", "shared+unwrapped", "ring=2"),
        ("hunyuan_video", "dsv", "shared", "ulysses=2"),
        pytest.param("wan", "dsv", "shared+unwrapped", "ring=2", marks=pytest.mark.full),
        pytest.param("hunyuan_video", "vsa", "shared+checkpointing", "ulysses=2", marks=pytest.mark.full),
    ],
)
def test_what_a_method_adds_learns_as_alone(pool: Get, host: str, method: str, mode: str, parallel: str) -> None:
    """Gates that are not zero, and predictors with a loss of their own, at a density where blocks are dropped."""
    way = learning(host, method, mode, parallel)
    first, second = pool().run(trained_exactly, way)
    assert first == second
    found = apart_from_alone(way, tuple(torch.tensor(x, dtype=torch.float64) for x in first))
    assert max(found.values()) <= 2, found


@pytest.mark.slow
def test_parity_would_see_gradients_that_are_not_whole(pool: Get) -> None:
    """Averaged where they should be added up, they are half of what they are alone."""
    way = dc.replace(learning("wan", "vsa", "shared", "ulysses=2"), gradients="sum")
    first, _ = pool().run(trained_exactly, way)
    found = apart_from_alone(way, tuple(torch.tensor(x, dtype=torch.float64) for x in first))
    assert found["gradients"] > 2, found
