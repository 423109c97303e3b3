"""A host whose video several processes share gives what it gives alone, every gradient included."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import rows
from divided import Case, balanced, compared, counted, warned
from processes import Get

from vsparse.parallel.context import parse

Row = tuple[str, str, str]

PAIRS = ("ulysses=2", "ring=2", "gather=2")
FOURS = ("ulysses=2,ring=2", "ulysses=4", "ulysses=2,gather=2", "ring=4", "gather=4")
BY_HEAD = ("sta", "pattern")  # their rows have patterns for two heads
WHOLE = ("dense", "unicp")  # they have no block size to choose
ORDERS = ("vmoba", "svg2", "by_layer")  # tokens in another order in each layer, or in each call


def _fits(method: str, setting: str) -> bool:
    parallel = parse(setting)
    return not (method in ORDERS and parallel.rows > 1) and not (method in BY_HEAD and parallel.ulysses > 2)


def _all(settings: Iterable[str]) -> list[Row]:
    return [row for row in itertools.product(rows.HOSTS, rows.METHODS, settings) if _fits(*row[1:])]


def _thin(settings: tuple[str, ...], methods: int, each: int) -> list[Any]:
    """Some methods on Wan, each in one setting, and every other host in some settings with one method each."""
    turns, kept = itertools.cycle(settings), set()
    for method in list(rows.METHODS)[-methods:]:
        kept.add(("wan", method, next(x for x in turns if _fits(method, x))))
    chosen = itertools.cycle(reversed([x for x in rows.METHODS if x not in (*ORDERS, *BY_HEAD, "unicp", "adaspa")]))
    turns = itertools.cycle(settings)
    kept |= {(host, next(chosen), next(turns)) for host in rows.HOSTS if host != "wan" for _ in range(each)}
    return [row if row in kept else pytest.param(*row, marks=pytest.mark.full) for row in _all(settings)]


def _check(get: Get, host: str, method: str, setting: str) -> None:
    parallel = parse(setting)
    heads = 2 if method in BY_HEAD else 5 if parallel.ulysses == 4 else 3
    # Their blocks of 64 tokens need a larger video, for every process to have one.
    grid = (4, 8, 9) if method in WHOLE and parallel.rows == 4 else rows.SMALL
    checkpointing = method in ("vsa", "dsv")
    case = Case(host=host, method=method, parallel=parallel, heads=heads, grid=grid, checkpointing=checkpointing)
    found = get().run(compared, case)
    assert all(max(one.values()) <= 2 for one in found), found


@pytest.mark.parametrize(("host", "method", "setting"), _thin(PAIRS, len(rows.METHODS), 3))
def test_two_processes(pair: Get, host: str, method: str, setting: str) -> None:
    _check(pair, host, method, setting)


@pytest.mark.parametrize(("host", "method", "setting"), _thin(FOURS, 5, 1))
def test_four_processes(pool: Get, host: str, method: str, setting: str) -> None:
    _check(pool, host, method, setting)


@pytest.mark.parametrize(
    ("host", "method", "setting", "order"),
    [
        ("wan", "vsa", "ulysses=2", "before"),
        ("wan", "adaspa", "ulysses=2", "after"),
        ("wan", "nabla", "ulysses=2,ring=2", "after"),  # heads over all four: diffusers cuts anywhere
        ("hunyuan_video", "sla", "ulysses=2", "after"),
        ("hunyuan_video15", "draft", "ulysses=2", "after"),
        ("cogvideox", "dsv", "ulysses=2", "after"),
    ],
)
def test_divided_by_diffusers(pool: Get, host: str, method: str, setting: str, order: str) -> None:
    case = Case(host=host, method=method, parallel=parse(setting), heads=4, grid=(4, 4, 6), order=order)
    found = pool().run(compared, case)
    assert all(max(one.values()) <= 2 for one in found), found


@pytest.mark.parametrize(
    ("host", "method", "setting"), [("wan", "adaspa", "ulysses=2"), ("hunyuan_video", "vsa", "ring=2")]
)
def test_a_density_for_each_head(pair: Get, host: str, method: str, setting: str) -> None:
    more = {"head_adaptive": False} if method == "adaspa" else {}
    options = {**rows.METHODS[method].sparse, "density": (0.2, 0.9, 0.5), **more}
    found = pair().run(compared, Case(host=host, method=method, parallel=parse(setting), options=options))
    assert all(max(one.values()) <= 2 for one in found), found


@pytest.mark.parametrize(
    ("setting", "method", "heads"),
    [
        ("ulysses=2", "nabla", 4),
        ("ulysses=2,ring=2", "nabla", 12),
        ("ulysses=4", "adaspa", 5),  # keeps maps of its heads: they move between generations
    ],
)
def test_heads_that_move_do_not_show(pool: Get, setting: str, method: str, heads: int) -> None:
    found = pool().run(balanced, parse(setting), method, heads)
    assert len({str(stats) for _, _, stats in found}) == 1
    for error, moved, stats in found:
        assert error <= 2
        assert moved > 0
        assert 1.0 <= stats["now"] <= stats["naive"]


def test_a_ring_of_diffusers_that_is_served_by_heads_is_told_once(pool: Get) -> None:
    for said in pool().run(warned, parse("ulysses=2,ring=2")):
        (message,) = said
        assert "heads are shared between all 4 processes of diffusers' ulysses=2,ring=2" in message
    assert not any(pool().run(warned, parse("ulysses=2")))


@pytest.mark.parametrize("setting", ["ulysses=2", "ring=2"])
def test_stats_count_what_this_process_computes(pool: Get, setting: str) -> None:
    for density, sparse in pool().run(counted, parse(setting)):
        assert density == pytest.approx((1 + sparse) / 2, rel=1e-12)  # float64 sums of whole numbers
