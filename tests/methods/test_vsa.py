"""VSA at one site: selection, fine and coarse branch by hand, gate, text, ramp."""

from __future__ import annotations

import math
from typing import Any

import pytest
import rows
import torch
from one_site import DIM, HEADS, Driven, attention, law, linear, tensors, tiles
from oracle import check
from torch import Tensor

import vsparse
from vsparse.geometry import kept_blocks
from vsparse.methods.vsa import VSA, density_ramp

FULL = vsparse.Grid(t=2, h=4, w=6)
RAGGED = vsparse.Grid(t=3, h=5, w=7)
TEXT = vsparse.Grid(t=3, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=3, h=5, w=7, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [FULL, RAGGED, TEXT, BEFORE], ids=["full", "ragged", "text", "text before"])
METHOD = VSA(density=0.3, tile=(2, 2, 3), block=12)
SPLIT = VSA(density=0.3, tile=(2, 2, 3), block=4)


def lengths(grid: vsparse.Grid) -> Tensor | None:
    return torch.tensor([7, 2], dtype=torch.int32) if grid.text else None


def hidden_of(grid: vsparse.Grid, batch: int, seed: int = 3) -> Tensor:
    return torch.randn(batch, grid.video, HEADS * DIM, generator=torch.Generator().manual_seed(seed))


def gate(driven: Driven, seed: int = 4) -> tuple[Tensor, Tensor]:
    """A gate that is not zero."""
    layer: Any = driven.module.to_gate_compress
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layer.weight.detach(), layer.bias.detach()


def pooled(x: Tensor, grid: vsparse.Grid, tile: tuple[int, int, int]) -> Tensor:
    """``[B, tiles, H, D]``: means over the video tokens of each tile."""
    return torch.stack([x[:, tokens].mean(1) for tokens in tiles(grid, tile)], 1)


def coarse_scores(q: Tensor, k: Tensor, grid: vsparse.Grid, tile: tuple[int, int, int]) -> Tensor:
    """``[B, H, tiles, tiles]``: scaled products of the means."""
    return torch.einsum("bqhd,bkhd->bhqk", pooled(q, grid, tile), pooled(k, grid, tile)) / math.sqrt(DIM)


@GRIDS
@pytest.mark.parametrize("method", [METHOD, SPLIT], ids=["one block", "three blocks"])
def test_selection_by_hand(grid: vsparse.Grid, method: VSA) -> None:
    """Every video token attends to the tiles of highest mean score, to all valid text, and to nothing else."""
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    driven = Driven(method, grid, lengths(grid))
    driven.module.double()
    driven(q, k, v, hidden_of(grid, 2).double())
    members = tiles(grid, method.tile)
    count = kept_blocks(method.density, len(members))
    assert 1 < count < len(members)
    video = torch.zeros(grid.tokens, dtype=torch.bool)
    video[[token for tile in members for token in tile]] = True
    wanted = (~video[:, None] | ~video[None]).expand(2, HEADS, -1, -1).clone()
    best = coarse_scores(q, k, grid, method.tile).topk(count, -1).indices
    for b in range(2):
        for h in range(HEADS):
            for i, tile in enumerate(members):
                kept = [token for j in best[b, h, i].tolist() for token in members[j]]
                wanted[b, h][torch.tensor(tile)[:, None], torch.tensor(kept)] = True
    valid = driven.valid()
    assert torch.equal(driven.keep(), wanted & valid[:, None, None] & valid[:, None, :, None])


@GRIDS
@pytest.mark.parametrize("method", [METHOD, SPLIT], ids=["one block", "three blocks"])
def test_a_zero_gate_is_the_top_k_model(grid: vsparse.Grid, method: VSA) -> None:
    """As built, the output is exact attention under the chosen map: to the bit without the coarse branch, too."""
    q, k, v = tensors(grid, batch=2)
    driven = Driven(method, grid, lengths(grid))
    found = driven(q, k, v, hidden_of(grid, 2))
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), driven.keep()))
    fine, _ = driven.module.core(q, k, v, None, driven.call)
    assert torch.equal(found, fine)


@GRIDS
def test_coarse_branch_by_hand(grid: vsparse.Grid) -> None:
    """Gate times the softmax over the means of the video tiles, the same for all tokens of a tile; none on the text."""
    q, k, v = tensors(grid, batch=2)
    hidden = hidden_of(grid, 2)
    driven = Driven(SPLIT, grid, lengths(grid))
    weight, bias = gate(driven)
    found = driven(q, k, v, hidden)
    keep = driven.keep()

    def hand(dtype: torch.dtype) -> Tensor:
        wide = [x.to(dtype) for x in (q, k, v)]
        out = attention(*wide, keep)
        scores = coarse_scores(wide[0], wide[1], grid, SPLIT.tile).softmax(-1)
        coarse = torch.einsum("bhqk,bkhd->bqhd", scores, pooled(wide[2], grid, SPLIT.tile))
        gates = linear(hidden.to(dtype), weight.to(dtype), bias.to(dtype))
        for tile, row in zip(tiles(grid, SPLIT.tile), coarse.unbind(1), strict=True):
            video = torch.tensor(tile) - grid.text_before
            out[:, tile] += gates[:, video] * row[:, None]
        return out

    law(found, hand)


def test_tiles_of_one_token_make_the_coarse_branch_full_attention() -> None:
    q, k, v = tensors(RAGGED)
    driven = Driven(VSA(density=0.05, tile=(1, 1, 1), block=1), RAGGED)
    with torch.no_grad():
        driven.module.to_gate_compress.bias.fill_(1.0)  # type: ignore[union-attr, operator]
    found = driven(q, k, v, hidden_of(RAGGED, 1))
    keep = driven.keep()
    assert keep.sum(-1).unique().tolist() == [kept_blocks(0.05, RAGGED.video)]

    def hand(dtype: torch.dtype) -> Tensor:
        wide = [x.to(dtype) for x in (q, k, v)]
        return attention(*wide, keep) + attention(*wide)

    law(found, hand)


@GRIDS
def test_gradients_by_finite_differences(grid: vsparse.Grid) -> None:
    """Of q, k, v, the attention input and the gate; scores lie further apart than the differences, so the map stays.

    A gated branch that is added to the saved output in place would show here.
    """
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    driven = Driven(METHOD, grid, lengths(grid))
    driven.module.double()
    inputs = [q, k, v, hidden_of(grid, 2).double(), *gate(driven)]
    assert torch.autograd.gradcheck(
        lambda *inputs: _call(driven, inputs), [x.clone().requires_grad_() for x in inputs], fast_mode=True
    )


class _Fixed(torch.nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.values = (weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, *self.values)


def _call(driven: Driven, inputs: Any) -> Tensor:
    """The module as a function of everything that has a gradient."""
    q, k, v, hidden, weight, bias = inputs
    layer = driven.module._modules["to_gate_compress"]
    driven.module._modules["to_gate_compress"] = _Fixed(weight, bias)
    try:
        return driven(q, k, v, hidden)
    finally:
        driven.module._modules["to_gate_compress"] = layer


def test_the_gate_learns_through_the_coarse_branch_alone() -> None:
    """Its gradient is that of ``sum gate * coarse``: the fine branch does not depend on it."""
    q, k, v = tensors(RAGGED)
    hidden = hidden_of(RAGGED, 1)
    driven = Driven(METHOD, RAGGED)
    cotangent = torch.randn(1, RAGGED.tokens, HEADS, DIM, generator=torch.Generator().manual_seed(9))
    (driven(q, k, v, hidden) * cotangent).sum().backward()
    layer: Any = driven.module.to_gate_compress
    assert float(layer.weight.grad.abs().max()) > 0
    _, (coarse,) = driven.module.core(q, k, v, None, driven.call)
    arriving = (driven.call.blocking.tiles().expand(coarse) * cotangent).flatten(2)
    law(layer.bias.grad, lambda dtype: arriving.to(dtype).sum((0, 1)).detach())
    law(layer.weight.grad, lambda dtype: (arriving[0].to(dtype).T @ hidden[0].to(dtype)).detach())


@pytest.mark.parametrize("grid", [TEXT, BEFORE], ids=["text", "text before"])
def test_text_is_exempt(grid: vsparse.Grid) -> None:
    """Text rows are full attention whatever the gate; video rows keep all text on top of their budget."""
    q, k, v = tensors(grid, batch=2)
    driven = Driven(METHOD, grid, lengths(grid))
    gate(driven)
    found = driven(q, k, v, hidden_of(grid, 2))
    valid = driven.valid()
    full = attention(q.double(), k.double(), v.double(), valid[:, None, None] & valid[:, None, :, None])
    first = 0 if grid.text_before else grid.video
    for b, n in enumerate(lengths(grid).tolist()):  # type: ignore[union-attr]
        text = slice(first, first + n)
        check("text rows", found[b, text].detach(), attention(q, k, v, valid[:, None, None])[b, text], full[b, text])
        kept = driven.keep()[b, :, grid.text_before : grid.text_before + grid.video]
        assert bool(kept[..., text].all())
        members = tiles(grid, METHOD.tile)
        per_row = torch.stack([kept[..., tile[0]] for tile in members], -1).sum(-1)
        assert per_row.unique().tolist() == [kept_blocks(METHOD.density, len(members))]


def test_padded_text_never_counts() -> None:
    """Whatever stands in padded text, values of another scale or NaN, the valid rows do not move by a bit.

    Means are over valid tokens, and padding is zero after the host's bias and rotation, as it is packed after them.
    """
    q, k, v = tensors(TEXT, batch=2)
    driven = Driven(METHOD, TEXT, lengths(TEXT))
    gate(driven)
    found = driven(q, k, v, hidden_of(TEXT, 2))
    valid = driven.valid()
    for junk in (1e4, float("nan")):
        dirty = [torch.where(valid[..., None, None], x, junk) for x in (q, k, v)]
        again = driven(*dirty, hidden_of(TEXT, 2))
        assert torch.equal(again[valid], found[valid])


def test_samples_do_not_mix() -> None:
    q, k, v = tensors(TEXT, batch=2)
    driven = Driven(METHOD, TEXT, lengths(TEXT))
    gate(driven)
    together = driven(q, k, v, hidden_of(TEXT, 2))
    for b in range(2):
        alone = Driven(METHOD, TEXT, lengths(TEXT)[b : b + 1])  # type: ignore[index]
        gate(alone)
        out = alone(*(x[b : b + 1] for x in (q, k, v)), hidden_of(TEXT, 2)[b : b + 1])
        valid = alone.valid()
        assert torch.equal(alone.keep()[0], driven.keep()[b])
        torch.testing.assert_close(out[valid], together[b : b + 1][valid], rtol=0, atol=_ulps(together))


def _ulps(x: Tensor) -> float:
    """What a sum of as many terms as there are tokens may differ by in another order."""
    return torch.finfo(x.dtype).eps * float(x.detach().abs().max()) * math.sqrt(x.shape[1])


def test_mirrored_video_gives_the_mirrored_result() -> None:
    """Where tiles divide the grid, flipping an axis permutes tiles and tokens and changes nothing else."""
    q, k, v = tensors(FULL)
    hidden = hidden_of(FULL, 1)
    driven = Driven(VSA(density=0.5, tile=(1, 2, 3), block=6), FULL)
    gate(driven)
    order = torch.arange(FULL.tokens).view(2, 4, 6).flip(0, 1, 2).flatten()
    found, mirrored = driven(q, k, v, hidden), driven(q[:, order], k[:, order], v[:, order], hidden[:, order])
    torch.testing.assert_close(mirrored, found[:, order], rtol=0, atol=_ulps(found))


def test_the_attention_input_must_be_the_video() -> None:
    q, k, v = tensors(TEXT)
    driven = Driven(METHOD, TEXT)
    with pytest.raises(ValueError, match=r"the attention input has 115 tokens, .* has 105 of video"):
        driven(q, k, v, torch.zeros(1, TEXT.tokens, HEADS * DIM))
    with pytest.raises(ValueError, match="vsa: this call brings no attention input"):
        driven(q, k, v)


# ---- density and its ramp ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "interval", "rate"), [(0.2, 50, 0.03), (0.1, 30, 0.03), (0.1, 30, 0.1), (0.125, 7, 0.25), (1.0, 1, 0.5)]
)
def test_the_ramp_lands_on_its_target(target: float, interval: int, rate: float) -> None:
    """Exactly: floor division of floats stops FastVideo's ramp at 0.22 for 0.2, as 0.8 // 0.03 is 26."""
    ramp = density_ramp(target, interval=interval, rate=rate)
    drops = math.ceil((1.0 - target) / rate - 1e-9)
    assert [ramp(step) for step in range(interval)] == [1.0] * interval
    values = [ramp(i * interval) for i in range(drops + 3)]
    assert values == sorted(values, reverse=True)
    assert values[drops:] == [target] * 3
    assert drops == 0 or values[drops - 1] > target
    assert ramp(interval) == max(target, 1.0 - rate)


@pytest.mark.parametrize(
    "options", [{"target": 0.0}, {"target": 2.0}, {"interval": 0}, {"rate": 0.0}, {"rate": 1.5}, {"rate": float("nan")}]
)
def test_the_ramp_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="density_ramp"):
        density_ramp(**{"target": 0.5, **options})


def test_training_with_a_ramp_needs_the_training_step() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    schedule = vsparse.Schedule(ramp=density_ramp(0.2, interval=2, rate=0.4))
    with vsparse.apply(model, "vsa", tile=(2, 2, 2), block=8, density=0.5, schedule=schedule) as patch:
        rows.forward(model, values)  # evaluation runs at the method's density
        model.train()
        with pytest.raises(ValueError, match=r"this schedule has a density ramp: call patch.training_step\(i\) before"):
            rows.forward(model, values)
        kept = []
        for step in (0, 1, 2, 4, 9):
            patch.training_step(step)
            rows.forward(model, values)
            call = patch.sites[0].call
            assert call is not None
            kept.append(kept_blocks(float(call.density), call.layout.video_tiles))
        tiles = call.layout.video_tiles
        assert kept == [tiles, tiles, kept_blocks(0.6, tiles), *[kept_blocks(0.2, tiles)] * 2]
        model.eval()
        rows.forward(model, values)
        assert float(patch.sites[0].call.density) == 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize("density", [1.0, 0.7, 0.1])
def test_a_ramp_computes_what_its_density_says(density: float) -> None:
    """More than the method's own density, too: lists have room for what a ramp starts with."""
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    model.train()
    options = {"tile": (2, 2, 2), "block": 8}
    with vsparse.apply(model, "vsa", density=density, **options):
        wanted = rows.forward(model, values)
    with vsparse.apply(
        model, "vsa", density=0.2, schedule=vsparse.Schedule(ramp=lambda i: density), **options
    ) as patch:
        patch.training_step(0)
        assert torch.equal(rows.forward(model, values), wanted)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_ramp_out_of_range_is_refused_when_it_is_read(value: float) -> None:
    model, inputs = rows.build("wan")
    model.train()
    with vsparse.apply(model, "vsa", schedule=vsparse.Schedule(ramp=lambda step: value)) as patch:
        patch.training_step(3)
        with pytest.raises(ValueError, match=f"the ramp gave density {value!r} at training step 3"):
            rows.forward(model, rows.prompt("wan", inputs))


def test_published_defaults() -> None:
    method = VSA()
    assert (method.density, method.tile, method.block) == (0.125, (4, 4, 4), 64)
    # 16 x 32 x 32 tokens are 256 tiles, of which 32 are kept.
    assert (
        kept_blocks(
            method.density, method.layout(vsparse.Grid(t=16, h=32, w=32), Driven(method, FULL).site).video_tiles
        )
        == 32
    )
