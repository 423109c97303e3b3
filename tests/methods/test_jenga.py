"""Jenga: pooled softmax, the larger budget and the touching blocks by hand, text bias, faults of the released code."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from one_site import DIM, HEADS, Driven, attention, law, tensors
from oracle import assert_identity
from torch import Tensor

import vsparse
from vsparse.geometry import kept_blocks
from vsparse.methods.jenga import Jenga

VIDEO = vsparse.Grid(t=5, h=5, w=7)
TEXT = vsparse.Grid(t=5, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=5, h=5, w=7, text_before=10)
CONDITION = vsparse.Grid(t=5, h=3, w=4, condition_frames=2)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)
KINDS = {
    "by mass": Jenga(density=0.01, mass=0.5, block=6),
    "by count": Jenga(density=0.2, mass=0.01, block=6),
    "either": Jenga(density=0.1, mass=0.3, block=4),
}
METHODS = pytest.mark.parametrize("method", KINDS.values(), ids=KINDS)


def driven(method: Jenga, grid: vsparse.Grid) -> Driven:
    one = Driven(method, grid, LENGTHS if grid.text else None)
    one.module.double()
    return one


def members(one: Driven) -> dict[int, list[int]]:
    """Tokens of each video block."""
    first = one.grid.text_before
    found: dict[int, list[int]] = {}
    for token in range(first, first + one.grid.video):
        found.setdefault(int(one.token_blocks()[token]), []).append(token)
    return found


def touch(a: list[int], b: list[int], grid: vsparse.Grid) -> bool:
    """Do two blocks hold positions at most one apart along every axis?"""

    def place(token: int) -> tuple[int, int, int]:
        n = token - grid.text_before
        return n // grid.frame, n // grid.w % grid.h, n % grid.w

    pairs = itertools.product(map(place, a), map(place, b))
    return any(all(abs(x - y) <= 1 for x, y in zip(p, q, strict=True)) for p, q in pairs)


# ---- selection -----------------------------------------------------------------------------------------------------


@GRIDS
@METHODS
def test_selection_by_hand(grid: vsparse.Grid, method: Jenga) -> None:
    """As many of the best as the larger budget says, the touching blocks, and all text."""
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    one = driven(method, grid)
    one(q, k, v)
    blocks = members(one)
    tokens = [torch.tensor(x) for x in blocks.values()]
    near = [[touch(a, b, grid) for b in blocks.values()] for a in blocks.values()]
    means = [torch.stack([x[:, own].mean(1) for own in tokens], 1) for x in (q, k)]
    share = (torch.einsum("bqhd,bkhd->bhqk", *means) / math.sqrt(DIM)).softmax(-1)
    video = torch.zeros(grid.tokens, dtype=torch.bool)
    video[torch.cat(tokens)] = True
    wanted = (~video[:, None] | ~video).expand(2, HEADS, -1, -1).clone()
    least, by_mass = kept_blocks(method.density, len(tokens)), 0
    for b, h, i in itertools.product(range(2), range(HEADS), range(len(tokens))):
        order = share[b, h, i].argsort(descending=True)
        total = share[b, h, i][order].cumsum(0)
        assert float((total - method.mass).abs().min()) > 1e-7, "a tie would decide"
        needed = int((total <= method.mass).sum()) + 1
        by_mass += needed > least
        for j in {*order[: max(least, needed)].tolist(), *(j for j, hit in enumerate(near[i]) if hit)}:
            wanted[b, h][tokens[i][:, None], tokens[j]] = True
    assert (by_mass > 0) is (method.mass > 0.1)
    valid = one.valid()
    assert torch.equal(one.keep(), wanted & valid[:, None, None] & valid[:, None, :, None])


@pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE, CONDITION], ids=["video", "text", "text before", "condition"])
@pytest.mark.parametrize("block", [3, 8, 100])
def test_touching_blocks_by_hand(grid: vsparse.Grid, block: int) -> None:
    """Along the curve, and of frames that have a curve of their own."""
    method = Jenga(block=block)
    one = driven(method, grid)
    blocks = members(one)
    keep = method.static_map(one.layout, one.site).validate().to_mask()[0, 0]  # type: ignore[union-attr]
    near = [[touch(a, b, grid) for b in blocks.values()] for a in blocks.values()]
    assert keep[list(blocks)][:, list(blocks)].tolist() == near
    text = torch.ones(one.layout.blocks, dtype=torch.bool)
    text[list(blocks)] = False
    assert bool(keep[text].all() and keep[:, text].all())


@GRIDS
@METHODS
def test_output_and_gradients_with_the_map_fixed(grid: vsparse.Grid, method: Jenga) -> None:
    """The gradient is that of attention under the chosen map; nothing flows through the choice."""
    inputs = tensors(grid, batch=2)
    one = driven(method, grid)
    one(*(x.double() for x in inputs))
    keep = one.keep()
    assert_identity(lambda *x: one(*x), lambda *x: attention(*x, keep), inputs)


def biased(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
    """Attention under a mask with ``bias [N]`` on the logits of the keys."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(DIM) + bias.to(q.dtype)).masked_fill(~keep, -torch.inf)
    return (torch.nan_to_num(scores.softmax(-1), nan=0.0) @ v).transpose(1, 2)


@pytest.mark.parametrize("grid", [TEXT, BEFORE], ids=["text", "text before"])
def test_text_bias_is_natural_log_on_the_keys_of_text(grid: vsparse.Grid) -> None:
    """Output and gradients; a bias of ln 2 counts every text key twice."""
    inputs = tensors(grid, batch=2)
    one = driven(Jenga(density=0.1, mass=0.1, text_bias=math.log(2.0), block=6), grid)
    one(*(x.double() for x in inputs))
    keep = one.keep()
    bias = torch.full((grid.tokens,), math.log(2.0), dtype=torch.float32).double()
    bias[grid.text_before : grid.text_before + grid.video] = 0.0
    assert_identity(lambda *x: one(*x), lambda *x: biased(*x, keep, bias), inputs)


@GRIDS
@pytest.mark.parametrize("options", [{"density": 1.0}, {"mass": 1.0}])
def test_everything_is_full_attention(grid: vsparse.Grid, options: dict[str, Any]) -> None:
    """Even when the softmax of far blocks underflows to nothing."""
    q, k, v = tensors(grid, batch=2, scale=40.0)
    one = Driven(Jenga(block=4, **options), grid, LENGTHS if grid.text else None)
    found = one(q, k, v)
    assert float(one.maps[0].density().min()) == 1.0
    keep = one.valid()[:, None, None] & one.valid()[:, None, :, None]
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep.expand(-1, HEADS, -1, -1)))


@GRIDS
@METHODS
@pytest.mark.parametrize("scale", [0.0, 1e-9, 0.1, 2.0, 16.0])
def test_no_row_outgrows_the_prediction(grid: vsparse.Grid, method: Jenga, scale: float) -> None:
    """Flat scores need most blocks, and stay within the capacity and the predicted density.

    At 1e-9 the logits differ and their softmax does not: both budgets must go by one ranking.
    """
    one = driven(method, grid)
    one(*(x.double() for x in tensors(grid, batch=2, scale=scale)))
    density = one.maps[0].validate().density()
    predicted = method.predicted_density(one.layout, one.site)
    assert 0 < predicted < 1
    assert float(density.max()) <= predicted


# ---- faults of the released code -----------------------------------------------------------------------------------


def test_tokens_after_the_last_whole_block_take_part() -> None:
    """175 tokens in blocks of 128: the rest is a block of 47 whose mean is that of its tokens."""
    one = driven(Jenga(), VIDEO)
    assert one.layout.length[0, 0].tolist() == [128, 47]
    inputs = tensors(VIDEO)
    one(*(x.double() for x in inputs))
    keep = one.keep()
    assert_identity(lambda *x: one(*x), lambda *x: attention(*x, keep), inputs)


def test_text_leaves_the_choice_of_video_as_it_is() -> None:
    """The same video with and without text: the same pairs of video tokens, however strong the text."""
    method = KINDS["either"]
    alone, joint = driven(method, VIDEO), driven(method, TEXT)
    inputs = [x.double() for x in tensors(TEXT, batch=2)]
    inputs[1][:, VIDEO.video :] *= 100.0
    alone(*(x[:, : VIDEO.video] for x in inputs))
    joint(*inputs)
    assert torch.equal(joint.keep()[:, :, : VIDEO.video, : VIDEO.video], alone.keep())


def test_the_global_generator_does_not_move() -> None:
    before = torch.get_rng_state()
    driven(KINDS["either"], VIDEO)(*(x.double() for x in tensors(VIDEO)))
    assert torch.equal(torch.get_rng_state(), before)


# ---- options -------------------------------------------------------------------------------------------------------


def test_defaults_are_published() -> None:
    assert Jenga() == Jenga(density=0.25, mass=0.3, text_bias=0.0, block=128)
    schedule = Jenga.default_schedule
    assert [schedule.phase(step=i, steps=50, layer=0, filled=False) for i in (4, 5)] == ["dense", "search"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "jenga: density must be a number in"),
        ({"mass": 1.5}, "jenga: mass"),
        ({"text_bias": math.inf}, "jenga: text_bias must be a finite number"),
        ({"text_bias": "no"}, "jenga: text_bias"),
        ({"block": 0}, "block"),
    ],
)
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Jenga(**options)


def test_a_bias_without_text_is_refused() -> None:
    one = Driven(Jenga(text_bias=0.5, block=8), VIDEO)
    with pytest.raises(ValueError, match=r"jenga: text_bias=0\.5 for site, whose sequence holds no text"):
        one(*tensors(VIDEO))
