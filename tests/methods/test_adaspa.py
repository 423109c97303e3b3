"""AdaSpa at one site: the exact search, budgets per head, forced text, reuse and refresh from the cached state."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_site import DIM, HEADS, Driven, attention, law, tensors
from torch import Tensor

import vsparse
from vsparse import ops
from vsparse.blocks import BlockMap
from vsparse.geometry import kept_blocks
from vsparse.methods import budgets
from vsparse.methods.adaspa import AdaSpa, head_densities

VIDEO = vsparse.Grid(t=3, h=5, w=7)
TEXT = vsparse.Grid(t=3, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=3, h=5, w=7, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
EVEN = AdaSpa(density=0.3, block=8, head_adaptive=False)
ADAPTIVE = AdaSpa(density=0.3, block=8, recall=0.3)
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)


def driven(method: AdaSpa, grid: vsparse.Grid, heads: int = HEADS) -> Driven:
    return Driven(method, grid, LENGTHS if grid.text else None, heads=heads)


def probabilities(q: Tensor, k: Tensor, valid: Tensor, lse: Tensor | None = None) -> Tensor:
    """``[B, H, N, N]``: softmax over valid keys, or with a given LSE; rows and columns of padding are 0."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DIM)
    scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1) if lse is None else lse
    return torch.where(valid[:, None, :, None], (scores - lse[..., None]).exp(), 0)


def mass_by_hand(p: Tensor, blocks: Tensor) -> Tensor:
    """``[B, H, K, K]``: probabilities summed over the tokens of each pair of blocks."""
    member = torch.nn.functional.one_hot(blocks).to(p.dtype)
    return torch.einsum("bhnm,nq,mk->bhqk", p, member, member)


def is_text(one: Driven) -> Tensor:
    """``[K]``: blocks that hold text."""
    text = one.call.blocking.text
    return torch.zeros(one.layout.blocks, dtype=torch.bool) if text is None else text


def chosen_by_hand(mass: Tensor, one: Driven, densities: Tensor) -> Tensor:
    """``[B, H, K, K]``: for each row the video blocks of highest mass, by each head's density; text in full, its
    empty blocks included."""
    text = is_text(one)
    keep = torch.zeros(mass.shape, dtype=torch.bool)
    video = int((~text).sum())
    for b in range(mass.shape[0]):
        for h in range(mass.shape[1]):
            count = kept_blocks(float(densities[b, h]), video)
            ranked = mass[b, h].masked_fill(text[None], -torch.inf)
            for i in range(mass.shape[2]):
                keep[b, h, i, ranked[i].topk(count).indices] = True
            keep[b, h, text] = True
            keep[b, h, :, text] = True
    return keep


def kept(one: Driven) -> Tensor:
    """``[B, H, K, K]``: the map of the last call."""
    (blocks,) = one.maps
    return blocks.validate().to_mask()


def known(one: Driven) -> Tensor:
    """``[B, H, K, K]``: the map that the state holds."""
    bits = one.module.state.version("default")["bits"]
    return BlockMap.from_bits(bits, one.call.blocking).to_mask()


# ---- search ------------------------------------------------------------------------------------------------------


@GRIDS
def test_the_search_is_exact_attention(grid: vsparse.Grid) -> None:
    q, k, v = tensors(grid, batch=2)
    one = driven(ADAPTIVE, grid)
    found = one(q, k, v)
    valid = one.valid()
    keep = valid[:, None, None] & valid[:, None, :, None]
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep))
    assert bool(kept(one).all())


@GRIDS
def test_mass_sums_to_the_valid_rows(grid: vsparse.Grid) -> None:
    """Every valid query hands out one unit of mass, so a block row sums to its valid length; by hand pair by pair.

    The paper's listing leaves out the division by the sum, and writes a logarithm where it means the exponential.
    """
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    one = driven(ADAPTIVE, grid)
    blocking = one.call.blocking
    _, _, mass = ops.search_attention(*(blocking.pack(x) for x in (q, k, v)), blocking)
    rows = blocking.length.expand(2, HEADS, -1).double()
    slack = torch.finfo(torch.float64).eps * grid.tokens
    assert float((mass.sum(-1) - rows).abs().max()) <= slack * one.layout.block
    by_hand = mass_by_hand(probabilities(q, k, one.valid()), one.token_blocks())
    assert float((mass - by_hand).abs().max()) <= slack * one.layout.block


@GRIDS
@pytest.mark.parametrize("method", [EVEN, ADAPTIVE], ids=["even", "adaptive"])
def test_selection_by_hand(grid: vsparse.Grid, method: AdaSpa) -> None:
    """The state after a search: top blocks by exact mass, text forced, and a density for each head from its recall."""
    heads = 4
    generator = torch.Generator().manual_seed(2)
    shape = (2, grid.tokens, heads, DIM)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    q *= torch.tensor([0.3, 2.5, 0.6, 4.0], dtype=torch.float64)[:, None]  # flat heads recall little, sharp ones much
    even = torch.full((2, heads), method.density, dtype=torch.float64)
    one = driven(method, grid, heads)
    mass = mass_by_hand(probabilities(q, k, one.valid()), one.token_blocks())
    densities = even
    if method.head_adaptive:
        kept, rows = mass * chosen_by_hand(mass, one, even), ~is_text(one)
        recall = kept[:, :, rows].sum((-1, -2)) / mass[:, :, rows].sum((-1, -2))
        # A level just above the second best recall: text rows, always full, would lift that head over it, if counted.
        best, second = recall[0].topk(2).values
        lifted = (kept.sum((-1, -2)) / mass.sum((-1, -2)))[0].topk(2).values[1]
        assert bool(lifted > second) is bool(grid.text)
        level = float((second + (torch.minimum(best, lifted) if grid.text else best)) / 2)
        one = driven(method.replace(recall=level), grid, heads)  # type: ignore[arg-type]
        densities = densities_by_hand(recall, one.method)  # type: ignore[arg-type]
        assert len(densities.unique()) > 1
    one.module.double()
    one(q, k, v)
    assert torch.equal(known(one), chosen_by_hand(mass, one, densities))


def densities_by_hand(recall: Tensor, method: AdaSpa) -> Tensor:
    """Paper, section 4.3: the heads of best recall give half of their density to as many of the worst."""
    found = torch.full(recall.shape, method.density, dtype=torch.float64)
    shift = min(method.density / 2, 1 - method.density)
    for b, row in enumerate(recall.tolist()):
        order = sorted(range(len(row)), key=lambda h: (-row[h], h))
        n = min(sum(x > method.recall for x in row), len(row) // 2)
        for h in order[:n]:
            found[b, h] -= shift
        for h in order[len(row) - n :]:
            found[b, h] += shift
    return found


@given(
    recall=st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=3),
    density=st.floats(0.01, 1.0),
    level=st.floats(0.01, 1.0),
)
def test_head_densities_keep_the_mean_and_stay_in_range(
    recall: list[list[float]], density: float, level: float
) -> None:
    """At most half of the heads give: were there more, heads that give and heads that receive would overlap."""
    method = AdaSpa(density=density, recall=level)
    found = head_densities(torch.tensor(recall, dtype=torch.float64), budgets.as_tensor(density), level)
    assert torch.equal(found, densities_by_hand(torch.tensor(recall, dtype=torch.float64), method))
    slack = 8 * torch.finfo(torch.float64).eps
    assert float((found.mean(-1) - density).abs().max()) <= slack
    assert float(found.min()) > 0
    assert float(found.max()) <= 1 + slack
    assert float(found.min()) >= density - density / 2 - slack


@pytest.mark.parametrize(("density", "moved"), [(0.2, 0.1), (0.9375, 0.0625), (1.0, 0.0)])
def test_what_heads_give_stops_at_the_ends(density: float, moved: float) -> None:
    recall = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = head_densities(recall, budgets.as_tensor(density), 0.8)
    assert found.tolist() == [[density - moved, density + moved]]


def test_densities_of_heads_are_not_adapted() -> None:
    with pytest.raises(ValueError, match=r"head_adaptive=False, too, or one density; got \(0.2, 0.4\)"):
        AdaSpa(density=(0.2, 0.4))


# ---- reuse and refresh -------------------------------------------------------------------------------------------


@GRIDS
def test_reuse_computes_under_the_searched_map(grid: vsparse.Grid) -> None:
    """Other queries, keys and values; the map, bit by bit, is the one that was found; the state does not change."""
    one = driven(ADAPTIVE, grid)
    one(*tensors(grid, batch=2))
    found, before = known(one), one.module.state.version("default")
    q, k, v = tensors(grid, batch=2, seed=1)
    out = one(q, k, v, phase="reuse")
    assert torch.equal(kept(one), found)
    assert one.module.state.version("default") is before
    law(out, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), one.keep()))
    assert not torch.equal(one.keep(), torch.ones_like(one.keep()))


@GRIDS
def test_a_cached_search_of_the_same_tensors_finds_the_same_map(grid: vsparse.Grid) -> None:
    one = driven(ADAPTIVE, grid)
    q, k, v = tensors(grid, batch=2)
    one(q, k, v)
    found = known(one)
    one.module.state.clear()
    one(q, k, v)
    assert torch.equal(known(one), found)
    out = one(q, k, v, phase="refresh")
    assert torch.equal(known(one), found)
    assert torch.equal(out, one(q, k, v, phase="reuse"))


@GRIDS
def test_a_cached_search_uses_the_old_lse(grid: vsparse.Grid) -> None:
    """With other tensors the mass is ``exp(S_new - LSE_old)``: its rows need not sum to anything; the LSE stays."""
    one = driven(EVEN, grid)
    one.module.double()
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    one(q, k, v)
    old, lse = known(one), one.module.state.version("default")["lse"]
    # A fresh search would rank keys within each row alike, so give rows of a block very different scales.
    change = torch.linspace(0.2, 3.0, grid.tokens, dtype=torch.float64)[None, :, None, None]
    moved = [x.double() for x in tensors(grid, batch=2, seed=6)]
    moved[0] = moved[0] * change
    out = one(*moved, phase="refresh")
    valid = one.valid()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DIM)
    old_lse = scores.masked_fill(~valid[:, None, None], -torch.inf).logsumexp(-1)
    mass = mass_by_hand(probabilities(moved[0], moved[1], valid, old_lse), one.token_blocks())
    even = torch.full((2, HEADS), EVEN.density, dtype=torch.float64)
    found = chosen_by_hand(mass, one, even)
    fresh = chosen_by_hand(mass_by_hand(probabilities(moved[0], moved[1], valid), one.token_blocks()), one, even)
    assert not torch.equal(found, fresh), "the test would not see a fresh LSE"
    assert torch.equal(known(one), found)
    assert torch.equal(kept(one), found)
    assert not torch.equal(found, old)
    assert one.module.state.version("default")["lse"] is lse
    assert torch.equal(out, one(*moved, phase="reuse"))


@pytest.mark.parametrize("grid", [TEXT, BEFORE], ids=["text", "text before"])
@pytest.mark.parametrize("phase", ["reuse", "refresh"])
def test_text_rows_and_text_keys_are_forced(grid: vsparse.Grid, phase: str) -> None:
    """Text rows are full rows (no list), text keys stand in every row, on top of the budget."""
    one = driven(EVEN, grid)
    q, k, v = tensors(grid, batch=2)
    one(q, k, v)
    out = one(q, k, v, phase=phase)
    keep, text = kept(one), is_text(one)
    length = one.call.blocking.length.expand(2, 1, -1)[:, 0]
    blocks = one.maps[0]
    for b in range(2):
        used = length[b] > 0
        assert bool(keep[b][:, text][..., used].all())
        assert bool(keep[b][..., text & used].all())
        per_row = keep[b][:, ~text][..., ~text].sum(-1)
        assert per_row.unique().tolist() == [kept_blocks(EVEN.density, int((~text).sum()))]
    assert int(blocks.count.max()) <= blocks.k.blocks
    valid = one.valid()
    law(out, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), one.keep()))
    rows = torch.nonzero(text[one.token_blocks()]).squeeze(1)
    assert torch.equal(
        one.keep()[:, :, rows], (valid[:, None, None] & valid[:, None, rows, None]).expand(2, HEADS, -1, -1)
    )


@pytest.mark.parametrize("phase", ["search", "refresh", "reuse"])
@GRIDS
def test_capacity_holds_every_list(grid: vsparse.Grid, phase: str) -> None:
    """Whatever the heads' recall, no row outgrows the one shared capacity."""
    for method in (AdaSpa(density=0.1, block=8, recall=0.01), AdaSpa(density=0.6, block=4, recall=0.01), ADAPTIVE):
        one = driven(method, grid)
        q, k, v = tensors(grid, batch=2)
        one(q, k, v)
        one(q, k, v, phase=phase)
        blocks = one.maps[0].validate()
        assert phase == "search" or blocks.capacity == min(one.module._capacity(one.call.blocking), one.layout.blocks)  # type: ignore[operator]


def test_padded_text_never_counts() -> None:
    q, k, v = tensors(TEXT, batch=2)
    one = driven(ADAPTIVE, TEXT)
    valid = one.valid()
    clean = [one(q, k, v, phase=phase) for phase in ("search", "reuse", "refresh")]
    bits = known(one)
    for junk in (1e4, float("nan")):
        dirty = [torch.where(valid[..., None, None], x, junk) for x in (q, k, v)]
        again = [one(*dirty, phase=phase) for phase in ("search", "reuse", "refresh")]
        assert all(torch.equal(x[valid], y[valid]) for x, y in zip(again, clean, strict=True))
        assert torch.equal(known(one), bits)


def test_keys_that_a_reused_map_omits_do_not_matter() -> None:
    """NaN in every key block that no row of the head keeps: the output does not move by a bit."""
    method = AdaSpa(density=0.05, block=4, head_adaptive=False)
    one = Driven(method, VIDEO)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 1, HEADS, DIM, generator=generator).expand(1, VIDEO.tokens, -1, -1).contiguous()
    _, k, v = tensors(VIDEO)
    one(q, k, v)  # one direction for all queries: all rows agree on their keys
    clean = one(q, k, v, phase="reuse")
    unused = ~kept(one).any(-2)[:, :, one.token_blocks()].transpose(1, 2)
    assert 0.5 < float(unused.double().mean()) < 1
    dirty = [torch.where(unused[..., None], torch.nan, x) for x in (k, v)]
    assert torch.equal(one(q, *dirty, phase="reuse"), clean)


@pytest.mark.parametrize("phase", ["search", "reuse", "refresh"])
@GRIDS
def test_gradients_by_finite_differences(grid: vsparse.Grid, phase: str) -> None:
    one = driven(ADAPTIVE, grid)
    inputs = [x.double() for x in tensors(grid, batch=2)]
    one(*inputs)
    version = dict(one.module.state.version("default"))
    if phase == "refresh":
        version["lse"] = version["lse"].double()

    def run(*inputs: Tensor) -> Tensor:
        one.module.state._versions["default"] = version
        return one(*inputs, phase=phase)

    assert torch.autograd.gradcheck(run, [x.clone().requires_grad_() for x in inputs], fast_mode=True)


@pytest.mark.parametrize("prepare", [lambda x: x, lambda x: x.bfloat16()], ids=["fp32", "bf16"])
def test_state_is_as_declared(prepare: Callable[[Tensor], Tensor]) -> None:
    one = driven(ADAPTIVE, TEXT)
    one(*(prepare(x) for x in tensors(TEXT, batch=2)))
    declared = ADAPTIVE.state(one.layout, one.site, 2, torch.float32)
    held = one.module.state.version("default")
    assert {name: (tuple(x.shape), x.dtype) for name, x in held.items()} == dict(declared)
    sizes = [math.prod(shape) * torch.empty(0, dtype=dtype).element_size() for shape, dtype in declared.values()]
    assert one.module.state.nbytes() == sum(sizes)


def test_published_defaults() -> None:
    method = AdaSpa()
    assert (method.density, method.block, method.recall) == (0.2, 64, 0.8)
    assert method.default_schedule.searches(50) == (9, 29)
