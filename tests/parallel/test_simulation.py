"""What processes compute and need of a map, against counting pairs one by one."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vsparse import BlockMap, Grid, RasterLayout, TileLayout
from vsparse.layouts import Blocking
from vsparse.parallel.balance import heads_in_order, imbalance
from vsparse.parallel.simulation import Split, even_split, hop, simulate, simulate_all


def random_map(
    blocks: int, heads: int, *, seed: int, block: int = 4, density: float = 0.3, samples: int = 1
) -> BlockMap:
    """Full blocks, each kept with a probability that falls from head to head."""
    draw = torch.Generator().manual_seed(seed)
    levels = density * torch.linspace(1.5, 0.3, heads)[None, :, None, None]
    keep = torch.rand(samples, heads, blocks, blocks, generator=draw) < levels
    return BlockMap.from_mask(keep, Blocking(length=torch.full((1, 1, blocks), block, dtype=torch.int32), block=block))


def text_map(grid: Grid, heads: int, *, seed: int, tile: tuple[int, int, int], block: int) -> BlockMap:
    """A tile layout with text: its columns always kept, its rows full."""
    blocking = TileLayout(grid, tile=tile, block=block).bind()
    keep = torch.rand(1, heads, blocking.blocks, blocking.blocks, generator=torch.Generator().manual_seed(seed)) < 0.2
    text = blocking.text
    if text is not None:
        keep[..., text] = True
        keep[..., text, :] = True
    return BlockMap.from_mask(keep, blocking)


def counted(blocks: BlockMap, split: Split) -> tuple[Tensor, Tensor]:
    """Pairs and needed slots of every process and shard, one block pair after the other; of one sample."""
    keep = blocks.to_mask()[0].tolist()
    size = [blocks.k.block * int(n > 0) for n in blocks.k.length[0, 0].tolist()]
    text = [False] * len(size)
    if blocks.k.layout is not None and blocks.k.text is not None:
        text = blocks.k.text.tolist()
    R, places = split.ring, range(len(size))
    shard = {j: s for s in range(R) for j in range(*split.bounds[s : s + 2])}
    pairs, needed = ([[[0.0] * R for _ in range(R)] for _ in split.heads] for _ in range(2))
    for u, group in enumerate(split.heads):
        for head in group:
            kept = [(i, j) for i, j in itertools.product(places, places) if keep[head][i][j]]
            for i, j in kept:
                amount = size[i] * size[j]
                if text[i] and text[j]:
                    for s in range(R):
                        pairs[u][s][s] += amount / R
                else:
                    # Rows of text run where the keys are, keys of text are where the rows run.
                    pairs[u][shard[j if text[i] else i]][shard[i if text[j] else j]] += amount
            for s, j in {(shard[i], j) for i, j in kept if not text[i] and not text[j]}:
                needed[u][s][shard[j]] += size[j] * (shard[j] != s)
    return torch.tensor(pairs, dtype=torch.float64), torch.tensor(needed, dtype=torch.float64)


@given(st.integers(4, 9), st.integers(2, 5), st.integers(0, 1000), st.data())
def test_counts_are_those_of_counting(blocks: int, heads: int, seed: int, data: Any) -> None:
    U, R = data.draw(st.integers(1, heads)), data.draw(st.integers(1, blocks))
    found = random_map(blocks, heads, seed=seed)
    split = simulate(found, U, R, shards=data.draw(st.sampled_from(["tokens", "work"])))
    pairs, needed = counted(found, split)
    assert torch.equal(split.pairs, pairs)
    assert torch.equal(split.needed, needed)
    assert float(split.pairs.sum()) == float(found.pairs()[0].sum())


@pytest.mark.parametrize("text", [{"text_after": 5}, {"text_before": 5}, {}])
@pytest.mark.parametrize("ring", [1, 2, 3])
def test_text_stays_and_tiles_hold_together(text: dict[str, int], ring: int) -> None:
    grid = Grid(t=3, h=4, w=5, **text)
    found = text_map(grid, 3, seed=7, tile=(1, 4, 4), block=8)
    split = simulate(found, 2, ring)
    pairs, needed = counted(found, split)
    torch.testing.assert_close(split.pairs, pairs, rtol=1e-12, atol=0)
    assert torch.equal(split.needed, needed)
    of_text = 0 if found.k.text is None else int(found.k.text.sum())
    first = of_text if "text_before" in text else 0
    assert all((bound - first) % 2 == 0 for bound in split.bounds)  # two blocks of eight make a tile
    columns = found.k.blocks - of_text
    assert (split.bounds[0], split.bounds[-1]) == (first, first + columns)
    empty = (found.k.length[0, 0, first : first + columns] == 0).sum()
    assert float(split.slots.sum()) == 8 * (columns - int(empty))


def test_full_map_needs_everything() -> None:
    split = simulate(BlockMap.full(RasterLayout(Grid(t=4, h=4, w=4), block=4).bind()), 2, 4, heads=4)
    assert (split.union, split.union_most, split.skipped) == (1.0, 1.0, 0)
    assert (split.balanced, split.naive) == (1.0, 1.0)
    assert float(split.pairs.sum()) == 4 * 64**2
    assert torch.equal(split.needed.sum(-1), split.dense)
    assert torch.equal(split.dense, torch.full((2, 4), 2 * 48.0, dtype=torch.float64))


def test_own_blocks_alone_need_nothing() -> None:
    keep = torch.eye(8, dtype=torch.bool)[None, None]
    split = simulate(BlockMap.from_mask(keep, Blocking(length=torch.full((1, 1, 8), 2), block=2)), 1, 4)
    assert (split.union, split.union_most, split.skipped) == (0.0, 0.0, 3)


def test_union_is_more_than_the_density_of_a_row() -> None:
    """Every row keeps one block of the other shard, each another one: a quarter of the pairs, all of the blocks."""
    keep = torch.zeros(8, 8, dtype=torch.bool)
    for row in range(8):
        keep[row, row] = keep[row, (row + 4) % 8] = True
    found = BlockMap.from_mask(keep[None, None], Blocking(length=torch.full((1, 1, 8), 2), block=2))
    split = simulate(found, 1, 2)
    assert float(found.density()) == 0.25
    assert split.union == 1.0


def test_exchanges_are_counted_by_distance() -> None:
    """Each shard of one block needs the next one and no other."""
    keep = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, 1)
    split = simulate(BlockMap.from_mask(keep[None, None], Blocking(length=torch.full((1, 1, 4), 2), block=2)), 1, 4)
    assert split.skipped == 2
    assert [hop(split.needed, i).tolist() for i in range(4)] == [[[0.0] * 4], [[2.0] * 4], [[0.0] * 4], [[0.0] * 4]]
    assert split.union == split.union_most == pytest.approx(1 / 3)


def test_the_process_that_needs_most() -> None:
    keep = torch.eye(3, dtype=torch.bool)
    keep[1] = True
    split = simulate(BlockMap.from_mask(keep[None, None], Blocking(length=torch.full((1, 1, 3), 2), block=2)), 1, 3)
    assert (split.union, split.union_most) == (pytest.approx(1 / 3), 1.0)


def test_a_row_is_not_cut() -> None:
    side = {size: Blocking(length=torch.full((1, 1, 24 // size), size), block=size) for size in (8, 2)}
    split = simulate(BlockMap.full(side[8], side[2]), 1, 2)
    assert split.bounds in ((0, 4, 12), (0, 8, 12))


def test_balance_of_heads_is_that_of_their_pairs() -> None:
    found = random_map(12, 8, seed=3)
    split = simulate(found, 4, 1)
    loads = found.pairs()[0][0].tolist()
    assert split.balanced == pytest.approx(imbalance(loads, split.heads))
    assert split.naive == pytest.approx(imbalance(loads, heads_in_order(8, 4)))
    assert split.naive > 1.2 > 1.1 > split.balanced


def test_shards_of_equal_work() -> None:
    """Rows at the end keep more, so shards of equal tokens are uneven and shards of equal work are not."""
    keep = torch.arange(32)[None, :] <= torch.arange(32)[:, None]
    found = BlockMap.from_mask(keep[None, None], Blocking(length=torch.full((1, 1, 32), 2), block=2))
    tokens, work = (simulate(found, 1, 4, shards=how) for how in ("tokens", "work"))  # type: ignore[arg-type]
    assert tokens.balanced == tokens.naive == work.naive == pytest.approx(1.75, abs=0.05)
    assert work.balanced < 1.1
    assert tokens.bounds == (0, 8, 16, 24, 32)
    assert work.slots.tolist() == [2.0 * (b - a) for a, b in itertools.pairwise(work.bounds)]


def test_maps_side_by_side_samples_and_repeated_heads() -> None:
    one, two = random_map(6, 2, seed=1), random_map(6, 2, seed=2)
    both = BlockMap.from_mask(torch.cat([one.to_mask(), two.to_mask()], 1), one.q)
    apart, joined = simulate([one, two], 2, 3), simulate(both, 2, 3)
    assert apart.heads == joined.heads
    assert torch.equal(apart.pairs, joined.pairs)
    batch = BlockMap.from_mask(torch.cat([one.to_mask(), two.to_mask()]), one.q)
    mean = (simulate(one, 1, 3).needed + simulate(two, 1, 3).needed) / 2
    assert torch.equal(simulate(batch, 1, 3).needed, mean)
    assert torch.equal(simulate(batch, 1, 3).pairs, (simulate(one, 1, 3).pairs + simulate(two, 1, 3).pairs) / 2)
    repeated = simulate(one, 1, 3, heads=5)
    assert sum(map(len, repeated.heads)) == 5
    by_head = [simulate(BlockMap.from_mask(one.to_mask()[:, i : i + 1], one.q), 1, 3).pairs for i in (0, 1)]
    assert torch.equal(repeated.pairs, 3 * by_head[0] + 2 * by_head[1])


def test_several_factors_at_once_are_the_same() -> None:
    found = random_map(8, 4, seed=5)
    factors = [(1, 1), (2, 2), (4, 2), (1, 4)]
    for (u, r), split in zip(factors, simulate_all(found, factors), strict=True):
        alone = simulate(found, u, r)
        assert (split.ulysses, split.ring, split.heads) == (u, r, alone.heads)
        assert torch.equal(split.pairs, alone.pairs)


def test_rows_of_other_sizes_than_columns() -> None:
    for rows, columns in ((8, 2), (2, 8)):
        sides = [Blocking(length=torch.full((1, 1, 32 // b), b), block=b) for b in (rows, columns)]
        draw = torch.Generator().manual_seed(rows)
        keep = torch.rand(1, 1, sides[0].blocks, sides[1].blocks, generator=draw) < 0.4
        found = BlockMap.from_mask(keep, *sides)
        split = simulate(found, 1, 2)
        half = keep[0, 0].unflatten(0, (2, -1)).unflatten(2, (2, -1)).double()  # [2, rows, 2, columns]
        assert torch.equal(split.pairs[0], half.sum((1, 3)) * rows * columns)
        union = half.amax(1).sum(2) * columns
        assert split.needed[0].tolist() == [[0.0, float(union[0, 1])], [float(union[1, 0]), 0.0]]


def test_blocks_that_start_anywhere_run_on_heads_alone() -> None:
    side = strategies.blocking(5, 4, seed=4, ragged=True)
    draw = torch.Generator().manual_seed(0)
    found = BlockMap.from_mask(torch.rand(1, 3, 5, 5, generator=draw) < 0.5, side)
    split = simulate(found, 3, 1)
    assert sorted(split.pairs.flatten().tolist()) == sorted(found.pairs()[0][0].tolist())  # tokens, not slots
    with pytest.raises(ValueError, match=r"ring must be 1 where blocks start anywhere.*got 2"):
        simulate(found, 1, 2)


@given(st.integers(1, 100), st.integers(1, 8), st.integers(1, 6), st.data())
def test_even_split_is_even(tokens: int, heads: int, ring: int, data: Any) -> None:
    U = data.draw(st.integers(1, heads))
    density, union = data.draw(st.floats(0.01, 1)), data.draw(st.floats(0, 1))
    split = even_split(tokens, heads, U, ring, density=density, union=union)
    assert float(split.pairs.sum()) == pytest.approx(density * heads * tokens**2)
    assert split.union == pytest.approx(union if ring > 1 else 0.0)
    assert split.balanced == split.naive == pytest.approx(-(-heads // U) * U / heads)


def test_full_map_is_an_even_split() -> None:
    full = simulate(BlockMap.full(RasterLayout(Grid(t=4, h=4, w=4), block=4).bind()), 3, 4, heads=4)
    even = even_split(64, 4, 3, 4)
    for name in ("pairs", "needed", "slots", "dense"):
        assert sorted(getattr(full, name).flatten().tolist()) == sorted(getattr(even, name).flatten().tolist())


MAP = random_map(4, 2, seed=0)
ERRORS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no maps": (lambda: simulate([], 1, 1), ("maps", "at least one BlockMap", "none")),
    "two layouts": (lambda: simulate([MAP, random_map(5, 2, seed=0)], 1, 1), ("share one layout", "4", "5")),
    "shards": (lambda: simulate(MAP, 1, 1, shards="rows"), ("shards", "'tokens' or 'work'", "'rows'")),  # type: ignore[arg-type]
    "too many shards": (lambda: simulate(MAP, 1, 5), ("ring", "1 to the 4 video blocks", "got 5")),
    "no shard": (lambda: simulate(MAP, 1, 0), ("ring", "got 0")),
    "too many places": (lambda: simulate(MAP, 3, 1), ("processes", "heads, which are 2", "got 3")),
    "density": (lambda: even_split(8, 2, 1, 2, density=0.0), ("density", "share", "0.0")),
    "union": (lambda: even_split(8, 2, 1, 2, union=1.1), ("union", "share", "1.1")),
    "tokens": (lambda: even_split(0, 2, 1, 2), ("tokens", ">= 1", "got 0")),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_came_and_what_is_accepted(case: str) -> None:
    call, words = ERRORS[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_more_shards_need_more_in_all() -> None:
    """What was own becomes another's: head-slots that move grow with the shards."""
    found = random_map(16, 2, seed=random.Random(1).randint(0, 99), density=0.1)
    moved = [float(simulate(found, 1, ring).needed.sum()) for ring in (1, 2, 4, 8, 16)]
    assert moved == sorted(moved)
    assert moved[0] == 0 < moved[1]
