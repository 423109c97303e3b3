"""DSV: choice by the predictor, its loss and its profile by hand, stages, budgets of heads, text, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from one_site import DIM, HEADS, Driven, attention, law, tensors, tiles
from oracle import assert_identity, check
from torch import Tensor

import vsparse
from vsparse.geometry import kept_blocks
from vsparse.methods import chance
from vsparse.methods.dsv import DSV

VIDEO = vsparse.Grid(t=3, h=5, w=7)
TEXT = vsparse.Grid(t=3, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=3, h=5, w=7, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
TILE = (2, 2, 3)
FIXED = DSV(density=0.3, adaptive=False, stage="sparse", rank=4, rows=7, tile=TILE, block=12)
SPLIT = FIXED.replace(block=4)
TOKEN = FIXED.replace(granularity="token")
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)


def hidden_of(grid: vsparse.Grid, batch: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(batch, grid.video, HEADS * DIM, generator=torch.Generator().manual_seed(seed))


def driven(method: Any, grid: vsparse.Grid, *, train: bool = False) -> Driven:
    one = Driven(method, grid, LENGTHS if grid.text else None)
    one.module.train(train)
    return one


def progress(one: Driven) -> Tensor:
    """Training calls, loss, shares of the heads."""
    return dict(one.module.own_tensors())["progress"]


def predicted(one: Driven, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, video, H, rank]`` each: the linear layer by hand."""
    weight = one.module.predictor.weight.detach().to(hidden.dtype)  # type: ignore[union-attr]
    rank = one.method.rank  # type: ignore[attr-defined]
    low = (hidden @ weight.T).unflatten(-1, (2, HEADS, rank))
    return low[:, :, 0], low[:, :, 1]


def middle(tile: list[int]) -> int:
    return tile[len(tile) // 2]


def kept(one: Driven) -> Tensor:
    """``[B, H, N, N]`` bool of the last call, keys by block or by token."""
    (blocks,) = one.maps
    if blocks.k.block > 1:
        return one.keep()
    mask = blocks.validate().to_mask().expand(2, HEADS, -1, -1)
    slot = one.layout.token_slot[0, 0]
    tile = slot // blocks.q.block
    return mask[:, :, tile][..., slot] & one.valid()[:, None, None] & one.valid()[:, None, :, None]


@GRIDS
@pytest.mark.parametrize("method", [FIXED, SPLIT, TOKEN], ids=["one block", "three blocks", "tokens"])
def test_selection_by_hand(grid: vsparse.Grid, method: Any) -> None:
    """The middle token's predicted query against mean predicted keys, or single ones; all valid text."""
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    hidden = hidden_of(grid).double()
    one = driven(method, grid)
    one.module.double()
    one(q, k, v, hidden)
    members = tiles(grid, TILE)
    q_low, k_low = predicted(one, hidden)
    shift = grid.text_before
    video = torch.zeros(grid.tokens, dtype=torch.bool)
    video[shift : shift + grid.video] = True
    wanted = (~video[:, None] | ~video[None]).expand(2, HEADS, -1, -1).clone()
    single = method.granularity == "token"
    columns = [[token] for token in range(shift, shift + grid.video)] if single else members
    count = kept_blocks(method.density, len(columns))
    for b, h in itertools.product(range(2), range(HEADS)):
        keys = torch.stack([k_low[b, [t - shift for t in column], h].mean(0) for column in columns])
        for tile in members:
            best = (keys @ q_low[b, middle(tile) - shift, h]).topk(count).indices.tolist()
            chosen = [token for j in best for token in columns[j]]
            wanted[b, h][torch.tensor(tile)[:, None], torch.tensor(chosen)] = True
    valid = one.valid()
    assert torch.equal(kept(one), wanted & valid[:, None, None] & valid[:, None, :, None])


@GRIDS
@pytest.mark.parametrize("method", [FIXED, TOKEN], ids=["blocks", "tokens"])
def test_output_and_gradients_with_the_map_fixed(grid: vsparse.Grid, method: Any) -> None:
    """Of q, k and v; nothing of it reaches the predictor or the attention input."""
    inputs, hidden = tensors(grid, batch=2), hidden_of(grid).requires_grad_()
    one = driven(method, grid)
    one(*inputs, hidden)
    keep = kept(one)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one.module.to(q.dtype)
        return one(q, k, v, hidden.to(q.dtype))

    assert_identity(ours, lambda *x: attention(*x, keep), inputs)
    assert hidden.grad is None
    assert all(p.grad is None for p in one.module.parameters())


# ---- learning ----------------------------------------------------------------------------------------------------


def sampled(one: Driven, step: int) -> Tensor:
    """Video tokens of a training call: one from each of equal parts."""
    rows, video = one.method.rows, one.grid.video  # type: ignore[attr-defined]
    drawn = chance.integers(rows, salt=one.module.salt, step=torch.tensor(step))  # type: ignore[arg-type]
    edge = [i * video // rows for i in range(rows + 1)]
    return torch.tensor([a + int(x) % (b - a) for a, b, x in zip(edge, edge[1:], drawn, strict=False)])


@GRIDS
@pytest.mark.parametrize("half", [False, True], ids=["", "autocast"])
def test_loss_by_hand(grid: vsparse.Grid, half: bool) -> None:
    """Direction and size of the logits of sampled queries, over the video; it reaches the predictor only."""
    q, k, v = (x.requires_grad_() for x in tensors(grid, batch=2))
    hidden = hidden_of(grid).requires_grad_()
    one = driven(FIXED, grid, train=True)
    rows = sampled(one, 0)
    with torch.autocast("cpu", enabled=half):
        one(q, k, v, hidden)
    assert one.loss is not None

    def hand(dtype: torch.dtype) -> Tensor:
        video = slice(grid.text_before, grid.text_before + grid.video)
        q_low, k_low = predicted(one, hidden.detach().to(dtype))
        true = torch.einsum("brhd,bkhd->bhrk", q.detach().to(dtype)[:, video][:, rows], k.detach().to(dtype)[:, video])
        guess = torch.einsum("brhd,bkhd->bhrk", q_low[:, rows], k_low)
        along = torch.nn.functional.cosine_similarity(guess, true, dim=-1)
        size = guess.norm(dim=-1) / true.norm(dim=-1)
        return (0.95 * (1 - along) + 0.05 * (size - 1) ** 2).mean()

    check("loss", one.loss.detach(), hand(torch.float32), hand(torch.float64))
    one.loss.backward()
    weight: Any = one.module.predictor.weight
    assert bool(weight.grad.any())
    assert all(x.grad is None for x in (q, k, v, hidden))


def shares_by_hand(q: Tensor, k: Tensor, one: Driven, rows: Tensor) -> Tensor:
    """``[H]``: mean share of the tiles that hold the mass."""
    grid, members = one.grid, tiles(one.grid, TILE)
    shift, found = grid.text_before, torch.zeros(HEADS, dtype=torch.float64)
    video = slice(shift, shift + grid.video)
    for b, h, r in itertools.product(range(2), range(HEADS), rows.tolist()):
        weight = (k[b, video, h].double() @ q[b, shift + r, h].double() / math.sqrt(DIM)).softmax(-1)
        by_tile = sorted((float(weight[[t - shift for t in tile]].sum()) for tile in members), reverse=True)
        total, count = 0.0, 0
        while total < one.method.mass:  # type: ignore[attr-defined]
            total, count = total + by_tile[count], count + 1
        found[h] += count
    return found / (2 * len(rows)) / len(members)


@GRIDS
def test_profile_by_hand(grid: vsparse.Grid) -> None:
    """The first call sets the averages, later ones move them by a tenth; other queries are drawn each time."""
    one = driven(FIXED.replace(momentum=0.9), grid, train=True)
    one.module.double()
    wanted, losses = torch.zeros(HEADS, dtype=torch.float64), 0.0
    drawn = set()
    for call in range(3):
        q, k, v = (x.double() for x in tensors(grid, batch=2, seed=call))
        rows = sampled(one, call)
        drawn.add(tuple(rows.tolist()))
        one(q, k, v, hidden_of(grid, seed=call).double())
        assert one.loss is not None
        fresh, loss = shares_by_hand(q, k, one, rows), float(one.loss.detach())
        wanted = fresh if call == 0 else 0.9 * wanted + (1.0 - 0.9) * fresh
        losses = loss if call == 0 else 0.9 * losses + (1.0 - 0.9) * loss
        found = progress(one)
        assert found.tolist() == [call + 1, losses, *wanted.tolist()]
    assert len(drawn) == 3
    one.module.eval()
    one(q, k, v, hidden_of(grid).double())
    assert torch.equal(progress(one), found), "nothing is learnt outside training"


def test_the_predictor_learns_what_the_logits_are() -> None:
    """Logits that are a low-rank function of the attention input: the loss falls, and the layer turns sparse."""
    grid = vsparse.Grid(t=2, h=6, w=6)
    generator = torch.Generator().manual_seed(0)
    one = driven(DSV(density=0.5, rank=8, rows=24, tile=(1, 3, 3), block=9, ready=0.05, mass=0.5), grid, train=True)
    maps = [torch.randn(HEADS * DIM, HEADS * DIM, generator=generator) / 4 for _ in range(2)]
    optimizer = torch.optim.Adam(one.module.parameters(), lr=0.02)
    densities = []
    for step in range(400):
        hidden = hidden_of(grid, seed=100 + step)
        q, k = ((hidden @ m).unflatten(-1, (HEADS, DIM)) for m in maps)
        one(q, k, torch.randn(q.shape, generator=generator), hidden)
        assert one.loss is not None
        densities.append(float(one.maps[0].density().mean()))
        optimizer.zero_grad()
        one.loss.backward()
        optimizer.step()
    assert densities[0] == 1.0, "stage one is full attention"
    assert densities[-1] < 1.0, f"the loss is {float(progress(one)[1])}"


# ---- stages and budgets ------------------------------------------------------------------------------------------


def with_progress(method: Any, calls: float, loss: float, shares: tuple[float, float]) -> Driven:
    one = driven(method, TEXT)
    progress(one).copy_(torch.tensor([calls, loss, *shares], dtype=torch.float64))
    q, k, v = tensors(TEXT, batch=2)
    found = one(q, k, v, hidden_of(TEXT))
    keep = kept(one)
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep))
    return one


def kept_tiles(one: Driven) -> list[int]:
    """Video tiles that the first row of each head keeps, in the first sample."""
    (blocks,) = one.maps
    mask = blocks.to_mask()[0, :, 0]
    text = blocks.k.text
    assert text is not None
    return mask[:, ~text].sum(-1).tolist()


@pytest.mark.parametrize("block", [12, 4])
def test_stages_and_budgets(block: int) -> None:
    """Full until the predictor is good; then each head by its profile, dense where that is above the density."""
    method = DSV(density=0.5, least=0.2, rank=4, tile=TILE, block=block)
    parts = TILE[0] * TILE[1] * TILE[2] // block
    total = len(tiles(TEXT, TILE)) * parts
    auto = {"stage": "auto"}
    for options, calls, loss, shares, wanted in [
        (auto, 0.0, 0.0, (0.0, 0.0), [total, total]),  # nothing learnt yet
        (auto, 9.0, 0.01, (0.3, 0.4), [total, total]),  # not below the limit
        (auto, 9.0, 0.009, (0.3, 0.4), [kept_blocks(x, total // parts) * parts for x in (0.3, 0.4)]),
        (auto, 9.0, 0.009, (0.1, 0.6), [kept_blocks(0.2, total // parts) * parts, total]),
        ({"stage": "dense"}, 9.0, 0.0, (0.3, 0.4), [total, total]),
        ({"stage": "sparse"}, 0.0, 9.0, (0.3, 0.4), [kept_blocks(x, total // parts) * parts for x in (0.3, 0.4)]),
        ({"adaptive": False}, 9.0, 0.0, (0.1, 0.9), [kept_blocks(0.5, total // parts) * parts] * 2),
    ]:
        one = with_progress(method.replace(**options), calls, loss, shares)
        assert kept_tiles(one) == wanted, (options, calls, loss, shares)


@pytest.mark.parametrize("keys", [1, 3, 7, 27])
def test_filled_list_slots_add_nothing_to_the_denominator(keys: int) -> None:
    """Lists of odd length are filled up in the released code with zero keys, each of which adds ``exp(-max)``."""
    q, k, v = (x.double() for x in tensors(VIDEO, batch=2))
    one = driven(TOKEN.replace(density=keys / VIDEO.video, least=1e-6), VIDEO)
    one.module.double()
    found = one(q, k, torch.ones_like(v), hidden_of(VIDEO).double())
    assert one.maps[0].count.unique().tolist() == [keys]
    assert torch.equal(found.float(), torch.ones_like(v).float())


def test_single_keys_and_dense_heads() -> None:
    one = with_progress(DSV(density=0.4, rank=4, tile=TILE, block=12, granularity="token"), 9.0, 0.0, (0.3, 0.9))
    assert one.maps[0].k.block == 1
    keep = kept(one)[0]
    assert bool(keep[1][one.valid()[0]][:, one.valid()[0]].all()), "a head above the density is dense"
    assert not bool(keep[0][: TEXT.video, : TEXT.video].all())


def test_the_global_generator_does_not_move() -> None:
    before = torch.get_rng_state()
    one = driven(FIXED, VIDEO, train=True)
    one(*tensors(VIDEO), hidden_of(VIDEO, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_predictors_differ_by_layer_and_follow_the_seed() -> None:
    def weight(seed: int, layer: int) -> Tensor:
        one = Driven(DSV(seed=seed), VIDEO, layer=layer, layers=2)
        return one.module.predictor.weight.detach()  # type: ignore[union-attr, return-value]

    assert torch.equal(weight(0, 0), weight(0, 0))
    assert not torch.equal(weight(0, 0), weight(0, 1))
    assert not torch.equal(weight(0, 0), weight(1, 0))


def test_averages_survive_a_cast_of_the_host() -> None:
    one = driven(FIXED, VIDEO)
    progress(one).copy_(torch.tensor([3.0, 0.0123456789, 0.2, 0.3], dtype=torch.float64))
    one.module.to(torch.bfloat16)
    assert float(progress(one)[1]) == 0.0123456789


# ---- defaults, refusals ------------------------------------------------------------------------------------------


def test_hidden_states_of_another_length_are_refused() -> None:
    one = driven(FIXED, TEXT)
    with pytest.raises(ValueError, match=r"dsv: the attention input has 104 tokens, .* has 105 of video"):
        one(*tensors(TEXT), hidden_of(TEXT, 1)[:, 1:])


def test_a_call_without_hidden_states_is_refused() -> None:
    with pytest.raises(ValueError, match="dsv: this call brings no attention input"):
        driven(FIXED, TEXT)(*tensors(TEXT))


def test_defaults() -> None:
    assert DSV() == DSV(
        density=0.2, adaptive=True, least=0.02, mass=0.9, stage="auto", ready=0.01, rank=16, rows=32, cosine=0.95,
        momentum=0.9, granularity="block", tile=(4, 4, 4), block=64, seed=0,
    )  # fmt: skip
    assert DSV.requires == {"hidden"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "dsv: density must be a number in"),
        ({"least": 0.3}, "dsv: least must not exceed density=0.2, got 0.3"),
        ({"mass": math.nan}, "dsv: mass"),
        ({"stage": "two"}, "dsv: stage must be one of auto, dense, sparse, got 'two'"),
        ({"granularity": "tile"}, "dsv: granularity must be one of block, token, got 'tile'"),
        ({"cosine": 1.5}, r"dsv: cosine must be a number in \[0, 1\], got 1.5"),
        ({"ready": -1.0}, "dsv: ready must be a number >= 0"),
        ({"rank": 0}, "dsv: rank must be an integer >= 1, got 0"),
        ({"rows": True}, "dsv: rows"),
        ({"adaptive": 1}, "dsv: adaptive must be True or False, got 1"),
        ({"tile": (1, 2)}, "tile"),
    ],
)
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSV(**options)
