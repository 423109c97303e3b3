"""SLA: critical and marginal blocks, the linear branch and its projection by hand, text, limits, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from one_site import DIM, HEADS, Driven, attention, law, tensors
from oracle import assert_identity, run
from torch import Tensor

import vsparse
from vsparse.geometry import kept_blocks
from vsparse.methods.sla import SLA

VIDEO = vsparse.Grid(t=3, h=5, w=7)
TEXT = vsparse.Grid(t=3, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=3, h=5, w=7, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
BLOCK = 8
METHOD = SLA(density=0.2, block=BLOCK)
PAPER = SLA(density=0.2, linear="marginal", negligible=0.3, block=BLOCK)
METHODS = pytest.mark.parametrize("method", [METHOD, PAPER], ids=["all", "marginal"])
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)


def driven(method: SLA, grid: vsparse.Grid, *, projection: bool = True) -> Driven:
    one = Driven(method, grid, LENGTHS if grid.text else None)
    layer: Any = one.module.to_linear
    if projection:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in (layer.weight, layer.bias):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return one


def blocks_of(grid: vsparse.Grid) -> list[Tensor]:
    """Video tokens of each block in raster order."""
    return list((torch.arange(grid.video) + grid.text_before).split(BLOCK))


def ranked(q: Tensor, k: Tensor, grid: vsparse.Grid) -> Tensor:
    """``[B, H, blocks, blocks]``: key blocks of every query block, best first."""
    means = [torch.stack([x[:, tokens].mean(1) for tokens in blocks_of(grid)], 1) for x in (q, k)]
    return torch.einsum("bqhd,bkhd->bhqk", *means).argsort(-1, descending=True)


def among(grid: vsparse.Grid, order: Tensor, part: slice, outside: bool) -> Tensor:
    """``[B, H, N, N]`` bool: the video blocks in a part of the ranking; all other pairs are ``outside``."""
    keep = torch.full((*order.shape[:2], grid.tokens, grid.tokens), outside)
    members = blocks_of(grid)
    for b, h in torch.cartesian_prod(*map(torch.arange, order.shape[:2])).tolist():
        for i, rows in enumerate(members):
            chosen = set(order[b, h, i, part].tolist())
            for j, columns in enumerate(members):
                keep[b, h][rows[:, None], columns] = j in chosen
    return keep


def feature(x: Tensor, name: str) -> Tensor:
    if name == "softmax":
        return x.softmax(-1)
    return torch.where(x > 0, x + 1, x.exp()) if name == "elu" else x.clamp_min(0)


def linear_by_hand(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, name: str) -> Tensor:
    weight = torch.einsum("bqhd,bkhd->bhqk", feature(q, name), feature(k, name)) * keep
    total = weight.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", torch.where(total > 0, weight / total, 0), v)


@GRIDS
@METHODS
@pytest.mark.parametrize("name", ["softmax", "elu", "relu"])
def test_output_by_hand(grid: vsparse.Grid, method: SLA, name: str) -> None:
    """Exact attention in the critical blocks, plus the projected linear attention of the video."""
    q, k, v = tensors(grid, batch=2)
    chosen = method.replace(feature=name)
    assert isinstance(chosen, SLA)
    one = driven(chosen, grid)
    found = one(q, k, v)
    order = ranked(q.double(), k.double(), grid)
    count, blocks = kept_blocks(method.density, order.shape[-1]), order.shape[-1]
    assert 1 < count < blocks
    valid = one.valid()
    critical = among(grid, order, slice(count), True) & valid[:, None, None] & valid[:, None, :, None]
    assert torch.equal(one.keep(), critical)
    part = slice(count, blocks - int(0.3 * blocks)) if method is PAPER else slice(None)
    covered = among(grid, order, part, False)
    layer: Any = one.module.to_linear

    def hand(dtype: torch.dtype) -> Tensor:
        wide = [x.to(dtype) for x in (q, k, v)]
        linear = linear_by_hand(*wide, covered, name) @ layer.weight.detach().to(dtype).T + layer.bias.detach().to(
            dtype
        )
        is_video = torch.zeros(grid.tokens, dtype=torch.bool)
        is_video[grid.text_before : grid.text_before + grid.video] = True
        return attention(*wide, critical) + torch.where(is_video[:, None, None], linear, 0)

    law(found, hand)


@GRIDS
@METHODS
def test_gradients_by_hand(grid: vsparse.Grid, method: SLA) -> None:
    """Through both branches; the choice of blocks is a constant."""
    inputs = tensors(grid, batch=2)
    one = driven(method, grid)
    one.module.double()
    wide = [x.double() for x in inputs]
    one(*wide)
    order = ranked(wide[0], wide[1], grid)
    count, blocks = kept_blocks(method.density, order.shape[-1]), order.shape[-1]
    part = slice(count, blocks - int(0.3 * blocks)) if method is PAPER else slice(None)
    keep, covered = one.keep(), among(grid, order, part, False)
    layer: Any = one.module.to_linear
    is_video = torch.zeros(grid.tokens, dtype=torch.bool)
    is_video[grid.text_before : grid.text_before + grid.video] = True

    def hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        linear = linear_by_hand(q, k, v, covered, "softmax") @ layer.weight.detach().T.to(q.dtype)
        linear = linear + layer.bias.detach().to(q.dtype)
        return attention(q, k, v, keep) + torch.where(is_video[:, None, None], linear, 0)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one.module.to(q.dtype)
        return one(q, k, v)

    assert_identity(ours, hand, inputs)
    run(ours, wide)
    assert all(p.grad is not None and bool(p.grad.any()) for p in one.module.parameters())


@GRIDS
@METHODS
def test_a_zero_projection_is_the_top_k_model(grid: vsparse.Grid, method: SLA) -> None:
    q, k, v = tensors(grid, batch=2)
    one = driven(method, grid, projection=False)
    found = one(q, k, v)
    fine, _ = one.module.core(q, k, v, None, one.call)
    assert torch.equal(found, fine)


@METHODS
def test_everything_critical_is_full_attention(method: SLA) -> None:
    q, k, v = tensors(TEXT, batch=2)
    dense = method.replace(density=1.0)
    assert isinstance(dense, SLA)
    one = driven(dense, TEXT, projection=False)
    found = one(q, k, v)
    keep = (one.valid()[:, None, None] & one.valid()[:, None, :, None]).expand(-1, HEADS, -1, -1)
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep))
    if method is PAPER:
        _, (linear,) = one.module.core(q, k, v, None, one.call)
        assert not bool(linear.any()), "nothing is marginal"


def test_a_short_video_keeps_a_block() -> None:
    """The released code takes ``int(density * blocks)``, which is 0 here, and divides by an empty sum."""
    grid = vsparse.Grid(t=1, h=3, w=4)
    one = driven(SLA(density=0.05, block=4), grid)
    found = one(*tensors(grid))
    assert bool(found.isfinite().all())
    assert int(one.maps[0].count.min()) == 1


def test_the_global_generator_does_not_move() -> None:
    before = torch.get_rng_state()
    driven(METHOD, VIDEO, projection=False)(*tensors(VIDEO))
    assert torch.equal(torch.get_rng_state(), before)


def test_defaults() -> None:
    assert SLA() == SLA(density=0.15, linear="all", negligible=0.1, feature="softmax", block=64)
    assert not SLA.default_schedule.needs_steps
    assert DIM == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "sla: density must be a number in"),
        ({"linear": "some"}, 'sla: linear must be "all" or "marginal", got \'some\''),
        ({"feature": "gelu"}, "sla: feature must be one of softmax, elu, relu, got 'gelu'"),
        ({"negligible": 1.0}, r"sla: negligible must be a number in \[0, 1\), got 1.0"),
        ({"negligible": math.nan}, "sla: negligible"),
        ({"block": 0}, "block"),
    ],
)
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLA(**options)
