"""Selectors against sorting by hand: counts, ties, crossing rules, forced sets, budgets, empty blocks, capacity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vsparse import Grid, RasterLayout, TileLayout, select
from vsparse.blocks import BlockMap
from vsparse.geometry import kept_blocks
from vsparse.layouts import Blocking

B, H, Q, K = 2, 3, 5, 7


def scores_of(seed: int, *, ties: bool = False) -> Tensor:
    """``[B, H, Q, K]`` non-negative; with ties only four values occur."""
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 4, (B, H, Q, K), generator=generator).double() / 4
    return torch.rand(B, H, Q, K, generator=generator, dtype=torch.float64)


def sides(seed: int, *, empty: bool = True) -> tuple[Blocking, Blocking]:
    """Query blocks and key blocks of one to four slots; once in a while a key block is empty."""
    k = strategies.blocking(K, 4, seed=seed, lead=(B, 1))
    length = k.length if empty else k.length.clamp_min(1)
    return strategies.blocking(Q, 4, seed=seed), Blocking(length=length, block=4)


def forced_of(seed: int, share: float = 0.3) -> Tensor:
    return torch.rand(1, H, Q, K, generator=torch.Generator().manual_seed(seed + 1)) < share


def rows_of(scores: Tensor, k: Blocking) -> list[tuple[tuple[int, ...], Tensor, list[int]]]:
    """Each row with its place and its key blocks that hold tokens, best first, the lower index first among equals."""
    found = []
    for place in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        row = scores[tuple(place)]
        used = [j for j in range(K) if k.length[place[0], 0, j] > 0]
        found.append((tuple(place), row, sorted(used, key=lambda j: (-float(row[j]), j))))
    return found


def kept(blocks: BlockMap) -> Tensor:
    return blocks.validate().to_mask().expand(B, H, -1, -1)


def assert_rows(blocks: BlockMap, wanted: dict[tuple[int, ...], set[int]]) -> None:
    mask = kept(blocks)
    assert {place: set(mask[place].nonzero().flatten().tolist()) for place in wanted} == wanted


# ---- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "blocks", "count"),
    [
        (0.1, 10, 1),
        (0.1, 30, 3),
        (0.1, 1182, 119),
        (0.2, 5, 1),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (1.0, 9, 9),
        (1e-6, 9, 1),
        (1 / 3, 3, 1),
        (0.101, 10, 2),
    ],
)
def test_budget_rounds_up_but_not_for_rounding_noise(density: float, blocks: int, count: int) -> None:
    assert kept_blocks(density, blocks) == count
    assert int(select.budget(density, blocks)) == count
    assert select.budget(torch.tensor([density], dtype=torch.float64), blocks).tolist() == [count]
    assert select.budget(density, blocks).dtype == torch.int32


@given(steps=st.integers(1, 50), blocks=st.integers(1, 2000))
def test_budget_agrees_with_its_scalar_form(steps: int, blocks: int) -> None:
    density = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    assert select.budget(density, blocks).tolist() == [kept_blocks(d, blocks) for d in density.tolist()]


# ---- top-k -------------------------------------------------------------------------------------------------------


@given(seed=strategies.seeds, count=st.integers(0, K + 1), ties=st.booleans())
def test_top_k(seed: int, count: int, ties: bool) -> None:
    scores, (q, k) = scores_of(seed, ties=ties), sides(seed)
    wanted = {place: set(order[:count]) for place, _, order in rows_of(scores, k)}
    assert_rows(select.top_k(scores, q, k, count=count), wanted)


@given(seed=strategies.seeds)
def test_top_k_with_a_count_per_row(seed: int) -> None:
    scores, (q, k) = scores_of(seed), sides(seed)
    count = torch.randint(0, K + 1, (B, H, Q), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    wanted = {place: set(order[: int(count[place])]) for place, _, order in rows_of(scores, k)}
    assert_rows(select.top_k(scores, q, k, count=count), wanted)
    per_head = count[:1, :, :1]
    wanted = {place: set(order[: int(per_head[0, place[1], 0])]) for place, _, order in rows_of(scores, k)}
    assert_rows(select.top_k(scores, q, k, count=per_head), wanted)


@given(seed=strategies.seeds, count=st.integers(0, K), ties=st.booleans())
def test_forced_blocks_and_the_budget(seed: int, count: int, ties: bool) -> None:
    scores, (q, k), forced = scores_of(seed, ties=ties), sides(seed), forced_of(seed)
    wanted: dict[str, dict[tuple[int, ...], set[int]]] = {"exempt": {}, "compete": {}, "join": {}}
    for place, _, order in rows_of(scores, k):
        mine = set(forced[0, place[1], place[2]].nonzero().flatten().tolist())
        others = [j for j in order if j not in mine]
        wanted["exempt"][place] = mine | set(others[:count])
        wanted["compete"][place] = mine | set(others[: max(0, count - len(mine))])
        wanted["join"][place] = mine | set(order[:count])
    for mode, rows in wanted.items():
        assert_rows(select.top_k(scores, q, k, count=count, forced=forced, forced_budget=mode), rows)  # type: ignore[arg-type]


# ---- top-p -------------------------------------------------------------------------------------------------------


def by_mass(row: Tensor, order: list[int], goal: float, crossing: bool, least: int) -> set[int]:
    """Blocks in order until their sum reaches the goal; every sum is compared exactly, as binary fractions."""
    taken: list[int] = []
    total = 0.0
    for j in order:
        after = total + float(row[j])
        if (total >= goal if crossing else after > goal) and len(taken) >= least:
            break
        taken.append(j)
        total = after
    return set(taken)


@given(
    seed=strategies.seeds,
    mass=st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]),
    crossing=st.booleans(),
    least=st.integers(0, 3),
)
def test_top_p(seed: int, mass: float, crossing: bool, least: int) -> None:
    scores, (q, k) = scores_of(seed, ties=True), sides(seed)
    wanted = {}
    for place, row, order in rows_of(scores, k):
        goal = mass * float(row[order].sum())
        wanted[place] = set(order) if mass == 1.0 else by_mass(row, order, goal, crossing, least)
    options: dict[str, Any] = {"include_crossing": crossing, "least": least}
    assert_rows(select.top_p(scores, q, k, mass=mass, **options), wanted)
    assert_rows(select.top_p(scores, q, k, mass=torch.full((B, 1, 1), mass), **options), wanted)


@given(seed=strategies.seeds, mass=st.floats(0.01, 0.99))
def test_top_p_is_minimal(seed: int, mass: float) -> None:
    """With the crossing block the mass is reached, without its last block it is not; without it, it is not exceeded."""
    scores, (q, k) = scores_of(seed), sides(seed, empty=False)
    share = scores / scores.sum(-1, keepdim=True)
    with_it = kept(select.top_p(share, q, k, mass=mass, include_crossing=True))
    held = torch.where(with_it, share, 0).sum(-1)
    assert bool((held >= mass - 1e-12).all())
    smallest = torch.where(with_it, share, torch.inf).amin(-1)
    assert bool(((held - smallest < mass) | (with_it.sum(-1) == 1)).all())
    without = kept(select.top_p(share, q, k, mass=mass, include_crossing=False, least=0))
    assert bool((torch.where(without, share, 0).sum(-1) <= mass + 1e-12).all())
    assert bool((with_it.sum(-1) - without.sum(-1) <= 1).all())
    best = share.argmax(-1, keepdim=True)
    assert bool(with_it.gather(-1, best).all())


def test_the_rule_for_the_crossing_block_has_no_default() -> None:
    """Published methods differ in it, so that each has to say which one it follows."""
    scores, (q, k) = scores_of(0), sides(0)
    with pytest.raises(TypeError, match="include_crossing"):
        select.top_p(scores, q, k, mass=0.5)  # type: ignore[call-arg]


def test_top_p_of_negligible_shares() -> None:
    """A share that underflows, or vanishes beside the sum, is dropped below the full mass and kept at it."""
    scores = torch.tensor([[[[1.0, 1e-30, 0.0, 1e-9]]]])
    q, k = (Blocking(length=torch.ones(1, 1, n, dtype=torch.int32), block=1) for n in (1, 4))
    for crossing in (True, False):
        full = select.top_p(scores, q, k, mass=1.0, include_crossing=crossing)
        assert full.to_mask().flatten().tolist() == [True] * 4
        assert select.top_p(scores, q, k, mass=0.999, include_crossing=crossing).count.tolist() == [[[1]]]


@given(seed=strategies.seeds, mass=st.sampled_from([0.25, 0.5, 0.75]))
def test_forced_blocks_and_the_mass(seed: int, mass: float) -> None:
    scores, (q, k), forced = scores_of(seed, ties=True), sides(seed), forced_of(seed)
    wanted: dict[str, dict[tuple[int, ...], set[int]]] = {"exempt": {}, "compete": {}, "join": {}}
    for place, row, order in rows_of(scores, k):
        mine = set(forced[0, place[1], place[2]].nonzero().flatten().tolist())
        others = [j for j in order if j not in mine]
        total, rest = float(row[order].sum()), float(row[others].sum())
        first = float(row[[j for j in order if j in mine]].sum())
        wanted["exempt"][place] = mine | by_mass(row, others, mass * rest, True, 0)
        wanted["compete"][place] = mine | by_mass(row, others, mass * total - first, True, 0)
        wanted["join"][place] = mine | by_mass(row, order, mass * total, True, 0)
    for mode, rows in wanted.items():
        found = select.top_p(
            scores,
            q,
            k,
            mass=mass,
            include_crossing=True,
            least=0,
            forced=forced,
            forced_budget=mode,  # type: ignore[arg-type]
        )
        assert_rows(found, rows)


# ---- threshold and head-global -----------------------------------------------------------------------------------


@given(seed=strategies.seeds, value=st.sampled_from([0.0, 0.25, 0.5, 2.0]), least=st.integers(0, 2))
def test_threshold(seed: int, value: float, least: int) -> None:
    scores, (q, k), forced = scores_of(seed, ties=True), sides(seed), forced_of(seed)
    wanted = {}
    for place, row, order in rows_of(scores, k):
        mine = set(forced[0, place[1], place[2]].nonzero().flatten().tolist())
        others = [j for j in order if j not in mine]
        wanted[place] = mine | set(others[:least]) | {j for j in others if float(row[j]) >= value}
    assert_rows(select.threshold(scores, q, k, value=value, least=least, forced=forced), wanted)
    per_head = torch.full((1, H, 1), value, dtype=torch.float64)
    assert_rows(select.threshold(scores, q, k, value=per_head, least=least, forced=forced), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_that_is_a_score_keeps_it(dtype: torch.dtype) -> None:
    scores = torch.tensor([[[[0.1, 0.3, 0.7, 0.0]]]], dtype=dtype)
    q, k = (Blocking(length=torch.ones(1, 1, n, dtype=torch.int32), block=1) for n in (1, 4))
    assert select.threshold(scores, q, k, value=0.3).to_mask().flatten().tolist() == [False, True, True, False]


@given(
    seed=strategies.seeds, density=st.sampled_from([0.05, 0.2, 0.5, 1.0]), least=st.integers(0, 2), ties=st.booleans()
)
def test_head_global(seed: int, density: float, least: int, ties: bool) -> None:
    """The best pairs of each head, whatever their row, and the best of every row."""
    scores, (q, k) = scores_of(seed, ties=ties), sides(seed)
    rows = rows_of(scores, k)
    wanted = {place: set(order[:least]) for place, _, order in rows}
    for b in range(B):
        for h in range(H):
            pairs = [(-float(row[j]), place[2], j) for place, row, order in rows if place[:2] == (b, h) for j in order]
            for _, i, j in sorted(pairs)[: kept_blocks(density, Q * K)]:
                wanted[b, h, i].add(j)
    assert_rows(select.head_global(scores, q, k, density=density, least=least), wanted)
    wide = torch.full((B, H), density, dtype=torch.float64)
    assert_rows(select.head_global(scores, q, k, density=wide, least=least), wanted)


def test_head_global_counts() -> None:
    """Without ties or empty blocks: exactly the budget of each head, forced blocks on top."""
    scores, (q, k) = scores_of(0), sides(1, empty=False)
    density = torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64).expand(B, -1)
    counts = kept(select.head_global(scores, q, k, density=density, least=0)).sum((-1, -2))
    assert counts.tolist() == [[kept_blocks(d, Q * K) for d in (0.1, 0.3, 0.5)]] * B
    forced = forced_of(0)
    counts = kept(select.head_global(scores, q, k, density=0.2, least=0, forced=forced)).sum((-1, -2))
    assert counts.tolist() == [[kept_blocks(0.2, Q * K) + int(n) for n in forced.sum((-1, -2))[0]]] * B


# ---- all of them -------------------------------------------------------------------------------------------------

SELECTORS: dict[str, Any] = {
    "top_k": lambda scores, q, k, **more: select.top_k(scores, q, k, count=3, **more),
    "top_p": lambda scores, q, k, **more: select.top_p(scores, q, k, mass=0.6, include_crossing=True, **more),
    "threshold": lambda scores, q, k, **more: select.threshold(scores, q, k, value=0.4, **more),
    "head_global": lambda scores, q, k, **more: select.head_global(scores, q, k, density=0.4, **more),
}
EACH = pytest.mark.parametrize("selector", SELECTORS)


@EACH
def test_empty_key_blocks_are_never_chosen(selector: str) -> None:
    """However good their score, and though nothing else is left."""
    scores, (q, k) = scores_of(2), sides(1, empty=False)
    length = k.length.clone()
    length[..., 2:5] = 0
    scores[..., 2:5] = 1e6
    found = kept(SELECTORS[selector](scores, q, Blocking(length=length, block=4)))
    assert not bool(found[..., 2:5].any())
    assert bool(found.any(-1).all())
    nothing = kept(SELECTORS[selector](scores, q, Blocking(length=torch.zeros_like(length), block=4)))
    assert not bool(nothing.any())


@EACH
def test_ties_are_settled_alike_every_time(selector: str) -> None:
    """Of equal scores the lower index wins: in the row, or, for a head, in the list of its pairs."""
    q, k = sides(1, empty=False)
    flat = torch.full((B, H, Q, K), 1 / K)
    found = SELECTORS[selector](flat, q, k)
    assert torch.equal(kept(found), kept(SELECTORS[selector](flat, q, k)))
    for row in kept(found).flatten(0, 2):
        assert row.int().diff().max() <= 0, "a higher index was taken before a lower one"


@EACH
def test_scores_are_broadcast(selector: str) -> None:
    """One row of scores for all samples and heads, lengths per sample, forced blocks per head."""
    scores, (q, k), forced = scores_of(3)[:1, :1], sides(2), forced_of(3)
    wide = SELECTORS[selector](scores.expand(B, H, -1, -1), q, k, forced=forced)
    assert torch.equal(kept(SELECTORS[selector](scores, q, k, forced=forced)), kept(wide))


def test_capacity() -> None:
    scores, (q, k) = scores_of(4), sides(1, empty=False)
    blocks = select.top_k(scores, q, k, count=3, capacity=3)
    assert blocks.capacity == 3
    assert torch.equal(kept(blocks), kept(select.top_k(scores, q, k, count=3)))
    assert select.top_k(scores, q, k, count=3, capacity=99).capacity == K
    assert select.top_k(scores, q, k, count=3).capacity == K


@pytest.mark.parametrize("grid", [Grid(t=2, h=2, w=4, text_after=5), Grid(t=2, h=2, w=4, text_before=5)])
def test_forced_text(grid: Grid) -> None:
    blocking = RasterLayout(grid, block=4).bind(torch.tensor([5, 1]))
    text = torch.tensor([block.item() == 0 for block in blocking.segment])
    forced = select.forced_text(blocking)
    assert forced is not None
    assert torch.equal(forced[0, 0], text | text[:, None])
    assert int(text.sum()) == 2
    assert select.forced_text(RasterLayout(Grid(t=2, h=2, w=4), block=4).bind()) is None


@pytest.mark.parametrize("block", [12, 6, 5])
def test_expand_tiles(block: int) -> None:
    grid = Grid(t=3, h=5, w=7, text_after=4)
    blocking = TileLayout(grid, tile=(2, 2, 3), block=block).bind()
    tiles, per_tile = blocking.tiles(), math.ceil(12 / block)
    chosen = strategies.block_map(tiles, tiles, seed=7, lead=(1, 2))
    bias = torch.randn(1, 1, tiles.blocks, generator=torch.Generator().manual_seed(0))
    found = select.expand_tiles(BlockMap(chosen.index, chosen.count, tiles, tiles, bias), blocking)
    of = blocking.layout.tile_of_block  # type: ignore[union-attr]
    assert torch.equal(found.validate().to_mask(), chosen.to_mask()[:, :, of][..., of])
    assert found.key_bias is not None
    assert torch.equal(found.key_bias, bias[..., of])
    assert blocking.blocks == per_tile * tiles.blocks
    assert select.expand_tiles(chosen, blocking).key_bias is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, q, k: select.top_k(s, q, k, count=1, forced_budget="free"), 'must be "exempt", "compete" or "join"'),
        (lambda s, q, k: select.top_p(s, q, k, mass=0.0, include_crossing=True), "mass must lie in .*, got 0.0"),
        (lambda s, q, k: select.top_p(s, q, k, mass=math.nan, include_crossing=True), "mass must lie"),
        (lambda s, q, k: select.head_global(s, q, k, density=1.5), "density must lie in \\(0, 1\\], got 1.5"),
        (lambda s, q, k: select.head_global(s, q, k, density=0), "density must lie"),
    ],
)
def test_refused_in_words(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(scores_of(0), *sides(1))
