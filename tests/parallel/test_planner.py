"""Predictions by hand, against published formulas and against counting every byte; and what is chosen of them."""

from __future__ import annotations

import dataclasses as dc
import io
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vsparse import BlockMap
from vsparse.layouts import Blocking
from vsparse.parallel.balance import heads_in_order
from vsparse.parallel.planner import Attention, Choice, How, Prediction, choose, factorisations, predict
from vsparse.parallel.rates import LINKS, Cluster, Link, Rate, assumed_rate, fit_compute, fit_rate
from vsparse.parallel.simulation import Split, even_split, hop, simulate


def cluster(
    *, per_node: int = 64, latency: float = 0.0, bandwidth: float = 1.0, flops: float = 1.0, overhead: float = 0.0,
    between: Link | None = None, memory: float = 1e18,
) -> Cluster:  # fmt: skip
    """One byte and one FLOP per second unless told otherwise."""
    inside = Link(latency=latency, bandwidth=bandwidth, origin="test")
    rate = Rate(flops=flops, overhead=overhead, origin="test")
    return Cluster(name="test", per_node=per_node, memory=memory, rate=rate, inside=inside, between=between)


def attention(tokens: int, heads: int, **more: Any) -> Attention:
    return Attention(tokens=tokens, heads=heads, head_dim=2, **more)


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_ulysses_by_hand() -> None:
    """8 tokens, 3 heads of 2 on 2 places: (0, 1) and (2)."""
    found = predict(attention(8, 3), cluster(), even_split(8, 3, 2, 1, density=0.5), "ulysses")
    # The place with two heads gets half of the 8 tokens of 2 heads of 2 elements of 2 bytes, four tensors of them.
    assert found.exchange == 4 * 2 * 8 / 2 * 2 * 2
    assert found.compute == 4 * 2 * 0.5 * 3 * 64 / 2
    assert found.imbalance == 4 * 2 * 0.5 * 64 * (2 - 1.5)
    assert (found.blocks, found.hidden, found.choosing) == (0, 0, 0)
    assert found.memory == 4 * 4 * 3 * 4 + 4 * 8 * 2 * 4
    assert found.seconds == found.exchange + found.compute + found.imbalance
    assert (found.name, found.sent, found.union) == ("ulysses 2", found.exchange, 0.0)


def test_gather_by_hand() -> None:
    """8 tokens, 2 heads, 4 shards of 2 tokens, of the 6 others a third is needed."""
    split = even_split(8, 2, 1, 4, density=0.5, union=1 / 3)
    found = predict(attention(8, 2), cluster(latency=0.25), split, "gather")
    fetched = 2 * 2 * (6 / 3) * 2 * 2  # K and V, heads, tokens, elements, bytes
    assert found.blocks == pytest.approx(0.25 + 0.25 + fetched)
    assert found.sent == pytest.approx(fetched)
    assert found.compute == 4 * 2 * 0.5 * 2 * 64 / 4
    assert found.memory == pytest.approx(4 * 2 * 2 * 4 + fetched)
    assert found.exchange == found.imbalance == found.hidden == 0
    assert found.name == "gather 4"


@pytest.mark.parametrize("bandwidth", [0.5, 4.0, 32.0])
def test_ring_of_equal_exchanges_is_the_published_model(bandwidth: float) -> None:
    """db-SP: ``max(C, X) (R - 1) + C``, with the transfer slower than the computation, equal and faster."""
    found = predict(attention(8, 2), cluster(bandwidth=bandwidth), even_split(8, 2, 1, 4), "ring")
    C, X = 4.0 * 2 * 2 * 2 * 2, 2 * 2 * 2 * 2 * 2 / bandwidth
    assert found.seconds == pytest.approx(max(C, X) * 3 + C)
    assert found.compute == pytest.approx(4 * C)
    assert found.blocks == pytest.approx(3 * max(0.0, X - C))
    assert found.hidden == pytest.approx(3 * min(C, X))
    assert found.blocks + found.hidden == pytest.approx(3 * X)
    assert found.memory == 4 * 2 * 2 * 4 + 2 * (2 * 2 * 2 * 4) + 2 * 2 * 3 * 4


def test_ring_exchange_by_exchange() -> None:
    """Uneven shards: the slowest of each exchange counts, and an exchange that nobody needs is left out."""
    pairs = torch.zeros(1, 4, 4, dtype=torch.float64)
    pairs[0] += torch.diag(torch.tensor([10.0, 4, 4, 4]))  # own
    pairs[0, 0, 1], pairs[0, 1, 2] = 5.0, 3.0  # exchange 1
    pairs[0, 3, 2] = 7.0  # exchange 3; nobody needs anything in exchange 2
    needed = (pairs > 0).double() * 2 * (1 - torch.eye(4))
    needed[0, 3, 2] = 20.0
    split = Split(
        heads=((0,),),
        bounds=(),
        slots=torch.full((4,), 20.0, dtype=torch.float64),
        pairs=pairs,
        needed=needed,
        naive=1.0,
    )
    assert split.skipped == 1
    one = Attention(tokens=80, heads=1, head_dim=1, bytes=1)
    found = predict(one, cluster(latency=1.0, overhead=0.5), split, "ring")
    own, first, third = 4 * 10 + 0.5, 4 * 5 + 0.5, 4 * 7 + 0.5
    into_first, into_third = 1 + 2 * 2, 1 + 2 * 20.0
    total = 1 + max(own, into_first) + max(first, into_third) + third  # 1: counts and numbers
    assert found.seconds == pytest.approx(total)
    assert found.blocks == pytest.approx(1 + into_third - first)
    assert found.compute == pytest.approx(0.5 + float(pairs.sum()))  # 4 D over 4 processes
    assert found.imbalance == pytest.approx(own + first + third - found.compute)
    assert found.hidden == pytest.approx(into_first + first)


def test_merging_by_hand() -> None:
    """Three merges of 2 heads of 2 tokens: 2 elements and an LSE in float32, read and written; 2 elements, read."""
    machine = cluster(bandwidth=64.0)
    held = dc.replace(machine, rate=dc.replace(machine.rate, memory=8.0))
    free, found = (predict(attention(8, 2), x, even_split(8, 2, 1, 4), "ring") for x in (machine, held))
    assert (free.merging, found.merging) == (0.0, 3 * 2 * 2 * (2 * 3 * 4 + 2 * 2) / 8)
    assert found.seconds == free.seconds + found.merging
    assert predict(attention(8, 2), held, even_split(8, 2, 1, 4), "gather").merging == 0
    covered = cluster(bandwidth=0.25)  # transfers are slower, so two of three merges are done while they go on
    slow = dc.replace(covered, rate=dc.replace(covered.rate, memory=8.0))
    before, after = (predict(attention(8, 2), x, even_split(8, 2, 1, 4), "ring") for x in (covered, slow))
    assert after.seconds == pytest.approx(before.seconds + found.merging / 3)


def test_choosing_is_divided_and_pooled_keys_travel() -> None:
    a = attention(8, 4, choosing=240.0, pooled=6)
    found = predict(a, cluster(latency=0.5), even_split(8, 4, 2, 3), "gather")
    pooled = 2 * 6 * 2 * 2 * 2 / 3  # two heads, six blocks, two elements of two bytes, two thirds of it from others
    assert found.choosing == pytest.approx(240 / 6 + 0.5 + pooled)
    assert predict(a, cluster(latency=0.5), even_split(8, 4, 4, 1), "ulysses").choosing == 60
    without = predict(attention(8, 4), cluster(latency=0.5), even_split(8, 4, 2, 3), "gather")
    assert found.sent - without.sent == pytest.approx(pooled)


def test_samples_tensors_and_bytes_scale() -> None:
    split = even_split(8, 4, 2, 2)
    base = predict(attention(8, 4), cluster(), split, "gather")
    twice = predict(attention(8, 4, samples=2), cluster(), split, "gather")
    for name in ("exchange", "blocks", "compute", "memory", "sent"):
        assert getattr(twice, name) == 2 * getattr(base, name), name
    wide = predict(attention(8, 4, bytes=4), cluster(), split, "gather")
    assert (wide.exchange, wide.compute, wide.memory) == (2 * base.exchange, base.compute, 2 * base.memory)
    gated = predict(attention(8, 4, tensors=5), cluster(), split, "gather")
    assert gated.exchange == base.exchange * 5 / 4


@pytest.mark.parametrize(("how", "times"), [("ring", 3), ("gather", 2)])
def test_training(how: How, times: int) -> None:
    split = even_split(8, 4, 2, 2)
    slow = cluster(flops=1e6, bandwidth=1.0)  # transfers cover everything
    base, both = (predict(attention(8, 4), slow, split, how, passes=x) for x in ("forward", "training"))  # type: ignore[arg-type]
    assert both.compute == pytest.approx(3.5 * base.compute)
    assert both.exchange == 2 * base.exchange
    assert both.blocks + both.hidden == pytest.approx(times * (base.blocks + base.hidden))
    assert both.memory == 2 * base.memory
    assert both.sent - both.exchange == pytest.approx(times * (base.sent - base.exchange))


# ---- against counting --------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_exchange_of_heads_is_every_byte_that_changes_places(U: int, R: int, each: int, data: Any) -> None:
    """Printed as ``4 H_i (S/N) ((N-1)/N) D``; counted, it is ``4 h (S/R) ((U-1)/U) D``, for the slowest process."""
    heads = data.draw(st.integers(U, 6))
    tokens = U * R * each
    split = even_split(tokens, heads, U, R)
    how = "ulysses" if R == 1 else "gather"
    found = predict(attention(tokens, heads), cluster(), split, how)
    places = {head: u for u, group in enumerate(split.heads) for head in group}
    moved = [[0, 0] for _ in range(U * R)]  # of one tensor that goes from tokens to heads: what comes, what leaves
    for token, head in itertools.product(range(tokens), range(heads)):
        owner = token // each
        user = owner // U * U + places[head]
        if owner != user:
            moved[user][0] += 2 * 2
            moved[owner][1] += 2 * 2
    assert found.exchange == pytest.approx(4 * max(max(pair) for pair in moved))  # the output goes the other way
    assert found.exchange == pytest.approx(4 * max(map(len, split.heads)) * tokens / R * (U - 1) / U * 2 * 2)


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(2, 4))
def test_fetched_bytes_are_those_of_the_blocks_that_rows_need(seed: int, U: int, R: int) -> None:
    keep = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) < 0.2
    keep |= torch.eye(8, dtype=torch.bool)
    split = simulate(BlockMap.from_mask(keep, Blocking(length=torch.full((1, 1, 8), 4), block=4)), U, R)
    found = predict(attention(32, 3), cluster(), split, "gather")
    most = 0
    for group, s in itertools.product(split.heads, range(R)):
        rows = range(*split.bounds[s : s + 2])
        wanted = {(h, j) for h in group for i in rows for j in range(8) if keep[0, h, i, j] and j not in rows}
        most = max(most, len(wanted) * 4 * 2 * 2 * 2)  # slots, K and V, elements, bytes
    assert found.blocks == most
    assert found.sent - found.exchange == pytest.approx(most)
    assert found.compute + found.imbalance == 4 * 2 * float(split.pairs.sum(-1).max())


@given(st.integers(0, 1000), st.integers(2, 5))
def test_ring_takes_between_its_bounds(seed: int, R: int) -> None:
    """Never less than computing, never less than moving, never more than one after the other."""
    keep = torch.rand(1, 2, 10, 10, generator=torch.Generator().manual_seed(seed)) < 0.3
    split = simulate(BlockMap.from_mask(keep, Blocking(length=torch.full((1, 1, 10), 4), block=4)), 2, R)
    found = predict(attention(40, 2), cluster(flops=16.0), split, "ring")
    ring = found.seconds - found.exchange
    moving = sum(float(hop(split.needed, i).max()) for i in range(1, R)) * 2 * 2 * 2
    assert ring >= max(found.compute + found.imbalance, moving) - 1e-9
    assert ring <= found.compute + found.imbalance + moving + 1e-9
    assert found.hidden == pytest.approx(found.compute + found.imbalance + moving - ring)


# ---- two tiers ---------------------------------------------------------------------------------------------------


def test_head_groups_stay_in_a_node_and_sequence_groups_leave_it() -> None:
    slow = Link(latency=0.0, bandwidth=0.1, origin="test")
    two, one = cluster(per_node=2, between=slow), cluster(per_node=64)
    split = even_split(8, 2, 2, 2)
    near, far = (predict(attention(8, 2), x, split, "gather") for x in (one, two))
    assert far.exchange == near.exchange
    assert far.blocks == pytest.approx(10 * near.blocks)
    wide = even_split(8, 4, 4, 1)
    near, far = (predict(attention(8, 4), x, wide, "ulysses") for x in (one, two))
    # Of three others one is near; the other two thirds take the slow link, at the same time.
    assert far.exchange == pytest.approx(10 * near.exchange * 2 / 3)


def test_every_head_group_counts() -> None:
    """Nodes of three: ranks 0 and 1 are in one, ranks 2 and 3 are not."""
    machine = cluster(per_node=3, between=Link(latency=0.0, bandwidth=0.1, origin="test"))
    near, far = (predict(attention(8, 2), x, even_split(8, 2, 2, 2), "gather") for x in (cluster(), machine))
    assert far.exchange == pytest.approx(10 * near.exchange)


def test_ranks_run_through_head_groups_first() -> None:
    """Only rank 2, place 0 of shard 1, needs anything, from rank 0 in the other node of two."""
    machine = cluster(per_node=2, between=Link(latency=0.0, bandwidth=0.1, origin="test"))
    split = even_split(8, 2, 2, 2)
    split.needed.zero_()[0, 1, 0] = 1.0
    assert predict(attention(8, 2), machine, split, "gather").blocks == pytest.approx(2 * 2 * 2 / 0.1)
    assert predict(attention(8, 2), machine, split, "ring").hidden == pytest.approx(2 * 2 * 2 / 0.1)


def test_two_exchanges_of_heads() -> None:
    quick, late = (predict(attention(8, 2), cluster(latency=x), even_split(8, 2, 2, 1), "ulysses") for x in (0.0, 0.5))
    assert late.exchange == quick.exchange + 2 * 0.5


def test_ranks_without_a_link_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ranks 0 and 2 are in two nodes of 2.*between"):
        predict(attention(8, 2), cluster(per_node=2), even_split(8, 2, 2, 2), "gather")


def test_messages_of_a_ring_have_their_own_rate() -> None:
    split = even_split(8, 2, 1, 4)
    plain = cluster(flops=1e6)
    apart = dc.replace(plain, inside_ring=Link(latency=0.0, bandwidth=0.25, origin="test"))
    ring, gather = ([predict(attention(8, 2), x, split, how) for x in (plain, apart)] for how in ("ring", "gather"))
    assert ring[1].blocks + ring[1].hidden == pytest.approx(4 * (ring[0].blocks + ring[0].hidden))
    assert gather[0] == gather[1]
    assert apart.assumptions()[2] == "inside a node, ring: test"


# ---- what is chosen ----------------------------------------------------------------------------------------------


def all_splits(processes: int, heads: int, tokens: int, **more: float) -> list[Split]:
    return [even_split(tokens, heads, u, r, **more) for u, r in factorisations(processes, heads)]


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(1, 4), st.floats(0.05, 1))
def test_the_fastest_of_all_ways_is_chosen(bandwidth: float, flops: float, per_node: int, union: float) -> None:
    slow = Link(latency=0.1, bandwidth=bandwidth / 8, origin="test")
    machine = cluster(per_node=per_node, bandwidth=bandwidth, flops=flops, between=slow)
    splits = all_splits(8, 6, 48, density=0.3, union=union)
    a = attention(48, 6)
    chosen = choose(a, machine, splits)
    tried = []
    for split in splits:
        ways: tuple[How, ...] = ("ring", "gather") if split.ring > 1 else ("ulysses",)
        tried += [predict(a, machine, split, how) for how in ways]
    assert chosen.best.seconds == min(one.seconds for one in tried)
    assert len(chosen.tried) == len(tried) == 6  # 4x2, 2x4 and 1x8, two ways each; eight places are more than the heads
    assert [one.seconds for one in chosen.tried] == sorted(one.seconds for one in tried)


def test_memory_is_a_bound() -> None:
    a, machine = attention(48, 8), cluster(bandwidth=1e3)
    splits = all_splits(8, 8, 48)
    free = choose(a, machine, splits)
    needs = sorted({one.memory for one in free.tried})
    for bound in needs:
        best = choose(a, machine, splits, memory=bound).best
        assert best.memory <= bound
        assert best.seconds == min(one.seconds for one in free.tried if one.memory <= bound)
    assert choose(a, machine, splits, memory=needs[0]).best != free.best
    with pytest.raises(ValueError, match=r"memory of .* holds no way on 8 processes; the smallest, .*, needs"):
        choose(a, machine, splits, memory=needs[0] - 1)
    with pytest.raises(ValueError, match="holds no way"):
        choose(a, cluster(memory=1.0), splits)


def test_what_is_known_of_the_ways() -> None:
    """Calls that cost something and quick links: heads. Few heads: shards beside them. Slow links and little needed: a
    ring. And without a cost of calls, a ring that computes longer than it sends is as good as free, and wins.
    """
    quick = cluster(bandwidth=1e3, flops=10.0, overhead=5.0)
    assert choose(attention(64, 8), quick, all_splits(8, 8, 64, union=0.9)).best.ulysses == 8
    few = choose(attention(64, 2), quick, all_splits(8, 2, 64, union=0.9)).best
    assert (few.ulysses, few.ring) == (2, 4)
    slow = cluster(bandwidth=1e-2, flops=1e3)
    assert choose(attention(64, 8), slow, all_splits(8, 8, 64, union=0.01)).best.ring == 8
    free = cluster(bandwidth=1e3, flops=10.0)
    assert choose(attention(64, 8), free, all_splits(8, 8, 64, union=0.9)).best.name == "ring 8"


def test_factorisations() -> None:
    assert factorisations(8, 12) == [(8, 1), (4, 2), (2, 4), (1, 8)]
    assert factorisations(8, 3) == [(2, 4), (1, 8)]
    assert factorisations(6, 6) == [(6, 1), (3, 2), (2, 3), (1, 6)]
    assert heads_in_order(12, 8)[-1] == (11,)  # U need not divide the heads


def test_table_says_what_it_is() -> None:
    machine = Cluster(
        name="eight GPUs", per_node=8, memory=1e18, rate=assumed_rate("a GPU", 1e12, 0.5), inside=LINKS["nvlink4"],
        between=LINKS["ndr400"],
    )  # fmt: skip
    found = choose(attention(64, 8, layers=3), machine, all_splits(16, 8, 64), memory=3000.0)
    out = io.StringIO()
    Console(file=out, width=80).print(found.tables())
    text = out.getvalue()
    assert "…" not in text, "80 columns are enough"
    assert "predicted, not measured" in text
    for words in ("assumed: 50% of 1 TFLOP/s", "NVLink 4, data sheet, 450 GB/s", "NDR, data sheet, 400 Gb/s"):
        assert words in " ".join(text.split())
    for one in found.tried:
        assert one.name in text
    assert (found.split.ulysses, found.split.ring) == (found.best.ulysses, found.best.ring)
    assert found.setting.size == 16
    assert (found.setting.ulysses, found.setting.rows) == (found.best.ulysses, found.best.ring)
    assert "too large" in text
    assert sum(line.startswith("│ *") for line in text.splitlines()) == 1
    assert isinstance(found, Choice)
    assert isinstance(found.best, Prediction)


# ---- rates -------------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e-3), st.floats(1e9, 1e12))
def test_fit_finds_what_made_the_times(latency: float, bandwidth: float) -> None:
    sizes = [2.0**n for n in range(12, 30, 3)]
    found = fit_rate(sizes, [latency + size / bandwidth for size in sizes])
    assert found.latency == pytest.approx(latency, rel=1e-6)
    assert found.bandwidth == pytest.approx(bandwidth, rel=1e-6)
    assert found.origin == "fitted to 6 measurements, off by at most 0%"


def test_fit_is_the_least_of_the_relative_errors() -> None:
    sizes, times = [1e3, 1e5, 1e7, 1e8], [1.1e-5, 1.0e-5, 1.2e-4, 9e-4]
    found = fit_rate(sizes, times)

    def error(latency: float, bandwidth: float) -> float:
        return sum(((latency + s / bandwidth) / t - 1) ** 2 for s, t in zip(sizes, times, strict=True))

    least = error(found.latency, found.bandwidth)
    for a, b in itertools.product((0.98, 1.0, 1.02), repeat=2):
        assert error(found.latency * a, found.bandwidth * b) >= least
    worst = max(abs(found.seconds(s) / t - 1) for s, t in zip(sizes, times, strict=True))
    assert f"at most {worst:.0%}" in found.origin


def test_fit_never_finds_a_negative_latency() -> None:
    found = fit_rate([1.0, 2.0, 4.0], [0.5, 1.5, 4.0])
    assert found.latency == 0
    each = (2 + 4 / 3 + 1) / (4 + 16 / 9 + 1)  # sum s/t over sum (s/t)^2
    assert found.bandwidth == pytest.approx(1 / each)


def test_fit_of_computation() -> None:
    found = fit_compute([1e9, 1e12], [2e-5 + 1e9 / 3e14, 2e-5 + 1e12 / 3e14])
    assert (found.flops, found.overhead) == pytest.approx((3e14, 2e-5))
    assert found.seconds(0) == 0.0
    assert found.seconds(3e14) == pytest.approx(1 + 2e-5)


def test_data_sheets() -> None:
    assert {name: link.bandwidth for name, link in LINKS.items()} == {"nvlink4": 450e9, "pcie5": 64e9, "ndr400": 50e9}
    assert all(link.origin.startswith("assumed: ") and "data sheet" in link.origin for link in LINKS.values())
    assert assumed_rate("X", 100e12, 0.3).flops == 30e12


GOOD = {"latency": 0.0, "bandwidth": 1.0, "origin": "test"}
TWO = [even_split(8, 2, 1, 2)]
ERRORS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "latency": (lambda: Link(**{**GOOD, "latency": -1.0}), ("Link", "latency", ">= 0", "-1.0")),  # type: ignore[arg-type]
    "bandwidth": (lambda: Link(**{**GOOD, "bandwidth": 0.0}), ("Link", "bandwidth", "positive", "0.0")),  # type: ignore[arg-type]
    "origin": (lambda: Link(**{**GOOD, "origin": " "}), ("Link", "origin", "where the figures come from", "' '")),  # type: ignore[arg-type]
    "rate": (lambda: Rate(flops=float("nan"), origin="test"), ("Rate", "flops", "positive", "nan")),
    "share": (lambda: assumed_rate("X", 1.0, 1.5), ("share", "(0, 1]", "1.5")),
    "node": (lambda: cluster(per_node=0), ("Cluster", "per_node", ">= 1", "got 0")),
    "memory": (lambda: cluster(memory=0), ("Cluster", "memory", "positive", "got 0")),
    "one size": (lambda: fit_rate([1, 1], [1, 2]), ("fit_rate", "sizes", "at least two different")),
    "lengths": (lambda: fit_rate([1, 2], [1]), ("fit_rate", "got 2 and 1")),
    "times": (lambda: fit_compute([1, 2], [1, 0]), ("fit_compute", "seconds", "positive", "got 0")),
    "falling": (lambda: fit_compute([1, 2], [4, 1]), ("seconds must grow with flops", "[4, 1]")),
    "tokens": (lambda: attention(0, 1), ("Attention", "tokens", ">= 1", "got 0")),
    "choosing": (lambda: attention(1, 1, choosing=-1.0), ("Attention", "choosing", ">= 0", "-1.0")),
    "processes": (lambda: factorisations(0, 1), ("processes", ">= 1", "got 0")),
    "heads": (lambda: predict(attention(8, 3), cluster(), TWO[0], "ring"), ("split", "3 heads", "got 2")),
    "how": (lambda: predict(attention(8, 2), cluster(), TWO[0], "ulysses"), ("how", "('ring', 'gather')", "'ulysses'")),
    "passes": (
        lambda: predict(attention(8, 2), cluster(), TWO[0], "ring", passes="both"),  # type: ignore[arg-type]
        ("passes", "'forward' or 'training'", "'both'"),
    ),
    "no splits": (lambda: choose(attention(8, 2), cluster(), []), ("splits", "at least one", "[]")),
    "several": (
        lambda: choose(attention(8, 2), cluster(), [*TWO, even_split(8, 2, 2, 2)]),
        ("one number of processes", "[2, 4]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_came_and_what_is_accepted(case: str) -> None:
    call, words = ERRORS[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert not [word for word in words if word not in str(error.value)], str(error.value)
