"""DraftAttention: pooled softmax and the best entries of a head by hand, no empty row, the constant map, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from one_site import DIM, HEADS, Driven, attention, law, tensors, tiles
from oracle import assert_identity
from torch import Tensor

import vsparse
from vsparse.geometry import kept_blocks
from vsparse.methods.draft import DraftAttention

VIDEO = vsparse.Grid(t=3, h=5, w=7)
TEXT = vsparse.Grid(t=3, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=3, h=5, w=7, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)
KINDS = {
    "one block": DraftAttention(density=0.15, tile=(1, 2, 3), block=6),
    "two blocks": DraftAttention(density=0.4, tile=(1, 2, 3), block=4),
    "portrait": DraftAttention(density=0.05, tile=(1, 3, 2), block=6),
}
METHODS = pytest.mark.parametrize("method", KINDS.values(), ids=KINDS)


def driven(method: DraftAttention, grid: vsparse.Grid) -> Driven:
    one = Driven(method, grid, LENGTHS if grid.text else None)
    one.module.double()
    return one


def shares(q: Tensor, k: Tensor, members: list[list[int]]) -> Tensor:
    """``[B, H, cells, cells]``: softmax of the products of mean queries and mean keys."""
    means = [torch.stack([x[:, tokens].mean(1) for tokens in members], 1) for x in (q, k)]
    return (torch.einsum("bqhd,bkhd->bhqk", *means) / math.sqrt(DIM)).softmax(-1)


# ---- selection -----------------------------------------------------------------------------------------------------


@GRIDS
@METHODS
def test_selection_by_hand(grid: vsparse.Grid, method: DraftAttention) -> None:
    """The best pairs of a head, the best cell of every row, and all text on top."""
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    one = driven(method, grid)
    one(q, k, v)
    members = tiles(grid, method.tile)
    share = shares(q, k, members)
    video = torch.zeros(grid.tokens, dtype=torch.bool)
    video[[token for cell in members for token in cell]] = True
    wanted = (~video[:, None] | ~video).expand(2, HEADS, -1, -1).clone()
    count = kept_blocks(method.density, len(members) ** 2)
    sizes = set()
    for b, h in itertools.product(range(2), range(HEADS)):
        flat = share[b, h].flatten().sort(descending=True).values
        assert float(flat[count - 1] - flat[count]) > 1e-9, "a tie would decide"
        for i in range(len(members)):
            chosen = {j for j in range(len(members)) if share[b, h, i, j] >= flat[count - 1]}
            sizes.add(len(chosen))
            for j in chosen | {int(share[b, h, i].argmax())}:
                wanted[b, h][torch.tensor(members[i])[:, None], torch.tensor(members[j])] = True
    assert len(sizes) > 2, "rows keep unequal numbers"
    valid = one.valid()
    assert torch.equal(one.keep(), wanted & valid[:, None, None] & valid[:, None, :, None])


@GRIDS
@METHODS
def test_output_and_gradients_with_the_map_fixed(grid: vsparse.Grid, method: DraftAttention) -> None:
    """The gradient is that of attention under the chosen map; nothing flows through the choice."""
    inputs = tensors(grid, batch=2)
    one = driven(method, grid)
    one(*(x.double() for x in inputs))
    keep = one.keep()
    assert_identity(lambda *x: one(*x), lambda *x: attention(*x, keep), inputs)


@GRIDS
def test_the_whole_density_is_full_attention(grid: vsparse.Grid) -> None:
    """Even when the softmax of far cells underflows to nothing."""
    q, k, v = tensors(grid, batch=2, scale=40.0)
    one = Driven(DraftAttention(density=1.0, tile=(1, 2, 3), block=4), grid, LENGTHS if grid.text else None)
    found = one(q, k, v)
    assert float(one.maps[0].density().min()) == 1.0
    keep = one.valid()[:, None, None] & one.valid()[:, None, :, None]
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep.expand(-1, HEADS, -1, -1)))


@METHODS
@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0, 16.0])
def test_the_density_is_the_predicted_one_and_a_cell_per_row(method: DraftAttention, scale: float) -> None:
    one = driven(method, VIDEO)
    one(*(x.double() for x in tensors(VIDEO, batch=2, scale=scale)))
    cells = one.layout.video_tiles
    count = kept_blocks(method.density, cells**2)
    kept = one.maps[0].validate().to_mask()[..., :: one.layout.blocks_per_tile, :: one.layout.blocks_per_tile]
    assert bool((kept.sum((-1, -2)) >= count).all())
    assert bool((kept.sum((-1, -2)) <= count + cells - 1).all())
    assert method.predicted_density(one.layout, one.site) == count / cells**2


@pytest.mark.parametrize("grid", [TEXT, BEFORE], ids=["text", "text before"])
def test_text_is_on_top_of_the_budget(grid: vsparse.Grid) -> None:
    """The same video with and without text: the same pairs of video cells."""
    method = KINDS["one block"]
    alone, joint = driven(method, VIDEO), driven(method, grid)
    inputs = [x.double() for x in tensors(grid, batch=2)]
    first = grid.text_before
    alone(*(x[:, first : first + grid.video] for x in inputs))
    joint(*inputs)
    assert torch.equal(joint.keep()[:, :, first:, first:][:, :, : grid.video, : grid.video], alone.keep())


# ---- faults of the released code -----------------------------------------------------------------------------------


def test_no_row_is_empty() -> None:
    """One threshold for a head may leave a row without a cell, which is NaN in kernels without a guard.

    Here one query cell draws all of the head's best entries; the others still keep their best.
    """
    grid = vsparse.Grid(t=1, h=4, w=4)
    q, k, v = (torch.zeros(1, 16, HEADS, DIM, dtype=torch.float64) for _ in range(3))
    q[:, :2, :, 0], k[:, :2, :, 0], v[:] = 50.0, 50.0, 1.0
    one = Driven(DraftAttention(density=0.01, tile=(1, 1, 2), block=2), grid)
    found = one(q, k, v)
    assert bool((one.maps[0].count >= 1).all())
    assert torch.equal(found, v)


def test_exactly_the_budget_is_kept_though_entries_are_equal() -> None:
    """A threshold that is itself an entry keeps every entry like it; all of them when the scores are flat."""
    grid = vsparse.Grid(t=1, h=4, w=8)
    q, k, v = (torch.ones(1, 32, HEADS, DIM, dtype=torch.float64) for _ in range(3))
    one = Driven(DraftAttention(density=0.5, tile=(1, 2, 2), block=4), grid)
    one(q, k, v)
    count = one.maps[0].to_mask().sum((-1, -2))
    assert bool((count <= 32 + 4).all())
    assert bool((count >= 32).all())


@pytest.mark.parametrize(
    ("grid", "cells"),
    [(vsparse.Grid(t=1, h=9, w=17), [128, 8, 16, 1]), (vsparse.Grid(t=1, h=17, w=9), [72, 72, 9])],
    ids=["landscape", "portrait"],
)
def test_grids_need_not_divide_by_the_cell(grid: vsparse.Grid, cells: list[int]) -> None:
    """9 x 17 positions leave cells of one row, of one column and of one token; upright none is as wide as it could."""
    q, k, v = (x.double() for x in tensors(grid))
    one = Driven(DraftAttention(density=0.5), grid)
    assert one.layout.length[0, 0].tolist() == cells
    found = one(q, k, v)
    assert_identity(lambda *x: one(*x), lambda *x: attention(*x, one.keep()), [q, k, v], grads=False)
    assert found.shape == q.shape


def test_the_global_generator_does_not_move() -> None:
    before = torch.get_rng_state()
    driven(KINDS["one block"], VIDEO)(*(x.double() for x in tensors(VIDEO)))
    assert torch.equal(torch.get_rng_state(), before)


# ---- options -------------------------------------------------------------------------------------------------------


def test_defaults_are_published() -> None:
    assert DraftAttention() == DraftAttention(density=0.1, tile=(1, 8, 16), block=128)
    assert not DraftAttention.default_schedule.needs_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "draft: density must be a number in"),
        ({"density": 1.5}, "draft: density"),
        ({"tile": (8, 16)}, "tile"),
        ({"block": 0}, "block"),
    ],
)
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftAttention(**options)
