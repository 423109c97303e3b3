"""NABLA: pooled softmax, top-p and window by hand, the constant map, bounds, text, refusals."""

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
from vsparse.methods.nabla import NABLA

VIDEO = vsparse.Grid(t=3, h=5, w=7)
TEXT = vsparse.Grid(t=3, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=3, h=5, w=7, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
TILE = (1, 2, 3)
METHOD = NABLA(mass=0.4, window=(1, 3, 1), tile=TILE, block=6)
SPLIT = NABLA(mass=0.4, window=(1, 3, 1), tile=TILE, block=4)
ALONE = NABLA(mass=0.4, window=None, tile=TILE, block=6)
METHODS = pytest.mark.parametrize("method", [METHOD, SPLIT, ALONE], ids=["one block", "two blocks", "no window"])
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)


def driven(method: NABLA, grid: vsparse.Grid) -> Driven:
    one = Driven(method, grid, LENGTHS if grid.text else None)
    one.module.double()
    return one


def window_by_hand(grid: vsparse.Grid, window: tuple[int, int, int] | None) -> Tensor:
    """``[tiles, tiles]`` bool: tiles at most half a window away along every axis, borders or not."""
    counts = [math.ceil(n / size) for n, size in zip((grid.t, grid.h, grid.w), TILE, strict=True)]
    places = list(itertools.product(*map(range, counts)))
    if window is None:
        return torch.zeros(len(places), len(places), dtype=torch.bool)
    return torch.tensor(
        [
            [all(abs(a - b) <= size // 2 for a, b, size in zip(q, k, window, strict=True)) for k in places]
            for q in places
        ]
    )


def shares(q: Tensor, k: Tensor, grid: vsparse.Grid) -> Tensor:
    """``[B, H, tiles, tiles]``: softmax of the products of mean queries and mean keys."""
    means = [torch.stack([x[:, tokens].mean(1) for tokens in tiles(grid, TILE)], 1) for x in (q, k)]
    return (torch.einsum("bqhd,bkhd->bhqk", *means) / math.sqrt(DIM)).softmax(-1)


@GRIDS
@METHODS
def test_selection_by_hand(grid: vsparse.Grid, method: NABLA) -> None:
    """The smallest set of best tiles with the mass, the window, and all text.

    Neither rows nor columns divide by the tile, and the window is cut at the borders.
    """
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    one = driven(method, grid)
    one(q, k, v)
    members, near = tiles(grid, TILE), window_by_hand(grid, method.window)
    share = shares(q, k, grid)
    wanted = torch.zeros(2, HEADS, grid.tokens, grid.tokens, dtype=torch.bool)
    video = torch.zeros(grid.tokens, dtype=torch.bool)
    video[[token for tile in members for token in tile]] = True
    wanted[:] = ~video[:, None] | ~video
    sizes = set()
    for b, h, i in itertools.product(range(2), range(HEADS), range(len(members))):
        order = share[b, h, i].argsort(descending=True)
        total = share[b, h, i][order].cumsum(0)
        assert float((total - method.mass).abs().min()) > 1e-6, "a tie would decide"
        chosen = order[: int((total < method.mass).sum()) + 1]
        assert float(share[b, h, i][chosen].sum()) >= method.mass
        assert float(share[b, h, i][chosen[:-1]].sum()) < method.mass
        sizes.add(len(chosen))
        for j in {*chosen.tolist(), *near[i].nonzero().flatten().tolist()}:
            wanted[b, h][torch.tensor(members[i])[:, None], torch.tensor(members[j])] = True
    assert len(sizes) > 2
    valid = one.valid()
    assert torch.equal(one.keep(), wanted & valid[:, None, None] & valid[:, None, :, None])


@GRIDS
@METHODS
def test_output_and_gradients_with_the_map_fixed(grid: vsparse.Grid, method: NABLA) -> None:
    """The gradient is that of attention under the chosen map; nothing flows through the choice."""
    inputs = tensors(grid, batch=2)
    one = driven(method, grid)
    one(*(x.double() for x in inputs))
    keep = one.keep()
    assert_identity(lambda *x: one(*x), lambda *x: attention(*x, keep), inputs)


@GRIDS
def test_the_whole_mass_is_full_attention(grid: vsparse.Grid) -> None:
    """Even when the softmax of far tiles underflows to nothing."""
    q, k, v = tensors(grid, batch=2, scale=40.0)
    one = Driven(NABLA(mass=1.0, window=None, tile=TILE, block=4), grid, LENGTHS if grid.text else None)
    found = one(q, k, v)
    assert float(one.maps[0].density().min()) == 1.0
    keep = one.valid()[:, None, None] & one.valid()[:, None, :, None]
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep.expand(-1, HEADS, -1, -1)))


@GRIDS
@METHODS
@pytest.mark.parametrize("scale", [0.0, 1e-9, 0.1, 2.0, 16.0])
def test_no_row_outgrows_the_prediction(grid: vsparse.Grid, method: NABLA, scale: float) -> None:
    """Flat scores need most tiles, and stay within the capacity and the predicted density."""
    q, k, v = tensors(grid, batch=2, scale=scale)
    one = Driven(method, grid, LENGTHS if grid.text else None)
    one(q, k, v)
    assert float(one.maps[0].validate().density().max()) <= method.predicted_density(one.layout, one.site)
    assert 0 < method.predicted_density(one.layout, one.site) < 1


def test_the_global_generator_does_not_move() -> None:
    before = torch.get_rng_state()
    one = driven(METHOD, VIDEO)
    one(*(x.double() for x in tensors(VIDEO)))
    assert torch.equal(torch.get_rng_state(), before)


def test_defaults_are_published() -> None:
    assert NABLA() == NABLA(mass=0.4, window=(11, 3, 3), tile=(1, 8, 8), block=64)
    assert NABLA(window=[11, 3, 3]) == NABLA()  # type: ignore[arg-type]
    assert not NABLA.default_schedule.needs_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 0.0}, "nabla: mass must be a number in"),
        ({"mass": 1.5}, "nabla: mass"),
        ({"window": (3, 3)}, "nabla: window must be three integers >= 1 or None"),
        ({"window": (3, 3, 0)}, "nabla: window"),
        ({"window": 3}, "nabla: window"),
        ({"tile": (1, 8)}, "tile"),
    ],
)
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NABLA(**options)
