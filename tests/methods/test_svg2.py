"""SVG2: k-means, the choice of clusters by hand, the order, centroids over steps, text, limits, refusals."""

from __future__ import annotations

import dataclasses as dc
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_site import DIM, HEADS, Driven, attention, law, tensors
from oracle import assert_identity, check
from torch import Tensor

import vsparse
from vsparse import ClusterLayout, ops
from vsparse.layouts import arrange
from vsparse.methods.svg2 import SVG2

VIDEO = vsparse.Grid(t=3, h=5, w=7)
TEXT = vsparse.Grid(t=3, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=3, h=5, w=7, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
METHOD = SVG2(mass=0.6, query_clusters=5, key_clusters=11, first_iterations=4)
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)


def driven(method: SVG2, grid: vsparse.Grid, **site: Any) -> Driven:
    one = Driven(method, grid, LENGTHS if grid.text else None, **site)
    module = one.module

    def tally(blocks: vsparse.BlockMap, batch: int, *more: vsparse.BlockMap) -> None:
        one.maps = [blocks, *more]

    module.tally = tally  # type: ignore[method-assign]
    return one


def token_clusters(blocking: Any) -> Tensor:
    """``[B, H, N]``: the block of every token."""
    start, length = blocking.start.long(), blocking.length.long()
    slot = blocking.order[1][..., None]
    inside = (slot >= start[..., None, :]) & (slot < (start + length)[..., None, :])
    return torch.where(inside.any(-1), inside.int().argmax(-1), -1)


def kept_tokens(one: Driven) -> Tensor:
    """``[B, H, N, N]`` bool: which token attended to which key in the last call."""
    (blocks,) = one.maps
    mask = blocks.validate().to_mask()
    q, k = token_clusters(blocks.q), token_clusters(blocks.k)
    lead = torch.broadcast_shapes(mask.shape[:2], q.shape[:2])
    mask, q, k = mask.expand(*lead, -1, -1), q.expand(*lead, -1), k.expand(*lead, -1)
    by_row = mask.gather(2, q.clamp_min(0)[..., None].expand(*q.shape, mask.shape[-1]))
    pairs = by_row.gather(3, k.clamp_min(0)[:, :, None].expand(*q.shape, k.shape[-1]))
    return pairs & (q >= 0)[..., None] & (k >= 0)[:, :, None]


def means_by_hand(x: Tensor, labels: Tensor) -> dict[int, Tensor]:
    return {c: x[labels == c].mean(0) for c in labels.unique().tolist()}


# ---- the choice --------------------------------------------------------------------------------------------------


@GRIDS
def test_selection_by_hand(grid: vsparse.Grid) -> None:
    """The smallest set of best clusters with the mass, weighted by size; all valid text."""
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    one = driven(METHOD, grid)
    one(q, k, v)
    (blocks,) = one.maps
    sides = token_clusters(blocks.q), token_clusters(blocks.k)
    video = torch.zeros(grid.tokens, dtype=torch.bool)
    video[grid.text_before : grid.text_before + grid.video] = True
    valid = one.valid().expand(2, -1)
    wanted = torch.zeros(2, HEADS, grid.tokens, grid.tokens, dtype=torch.bool)
    wanted[:] = ~video[:, None] | ~video
    sizes = set()
    for b, h in itertools.product(range(2), range(HEADS)):
        rows, columns = (side[b, h, video] for side in sides)
        q_means, k_means = means_by_hand(q[b, video, h], rows), means_by_hand(k[b, video, h], columns)
        names = sorted(k_means)
        size = torch.tensor([float((columns == j).sum()) for j in names], dtype=torch.float64)
        for i, mean in q_means.items():
            score = torch.stack([k_means[j] @ mean for j in names]) / math.sqrt(DIM)
            share = size * score.exp()
            share = share / share.sum()
            order = share.argsort(descending=True)
            total = share[order].cumsum(0)
            assert float((total - METHOD.mass).abs().min()) > 1e-9, "a tie would decide"
            count = max(int((total < METHOD.mass).sum()) + 1, math.ceil(METHOD.least * METHOD.key_clusters))
            sizes.add(count)
            chosen = [names[j] for j in order[:count].tolist()]
            pairs = (rows == i)[:, None] & torch.isin(columns, torch.tensor(chosen))
            whole = wanted[b, h][video]
            whole[:, video] |= pairs
            wanted[b, h][video] = whole
    assert len(sizes) > 1
    assert torch.equal(kept_tokens(one), wanted & valid[:, None, None] & valid[:, None, :, None])


@GRIDS
def test_output_and_gradients_with_the_map_fixed(grid: vsparse.Grid) -> None:
    """The permutation of every head is undone; nothing flows through clusters and choice."""
    inputs = tensors(grid, batch=2)
    one = driven(METHOD, grid)
    one(*(x.double() for x in inputs))
    (keep, chosen) = kept_tokens(one), one.maps[0]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = ops.block_sparse_attention(chosen.q.pack(q), chosen.k.pack(k), chosen.k.pack(v), chosen)
        return chosen.q.unpack(out)

    assert_identity(ours, lambda *x: attention(*x, keep), inputs)
    found = one(*inputs)
    keep = kept_tokens(one)
    law(found, lambda dtype: attention(*(x.to(dtype) for x in inputs), keep))


@GRIDS
def test_the_whole_mass_is_full_attention(grid: vsparse.Grid) -> None:
    q, k, v = tensors(grid, batch=2, scale=20.0)
    one = driven(METHOD.replace(mass=1.0), grid)  # type: ignore[arg-type]
    found = one(q, k, v)
    keep = one.valid()[:, None, None] & one.valid()[:, None, :, None]
    assert torch.equal(kept_tokens(one), keep.expand(2, HEADS, -1, -1))
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep.expand(-1, HEADS, -1, -1)))


@pytest.mark.parametrize("alike", [1, 3])
def test_empty_clusters_do_no_harm(alike: int) -> None:
    """Fewer different tokens than clusters: most run empty, and attention stays what the rest says."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(alike, DIM, generator=generator)
    x = rows[torch.arange(VIDEO.video) % alike][None, :, None].expand(1, -1, HEADS, -1).contiguous()
    v = torch.randn(x.shape, generator=generator)
    one = driven(METHOD, VIDEO)
    found = one(x, x, v)
    assert bool(found.isfinite().all())
    assert int((one.maps[0].k.length == 0).sum()) >= HEADS * (METHOD.key_clusters - alike)
    keep = kept_tokens(one)
    assert bool(keep.any(-1).all())
    law(found, lambda dtype: attention(x.to(dtype), x.to(dtype), v.to(dtype), keep))


def test_a_video_smaller_than_the_clusters_has_one_for_each_token() -> None:
    grid = vsparse.Grid(t=1, h=2, w=3)
    q, k, v = tensors(grid)
    one = driven(SVG2(mass=0.5), grid)
    one(q, k, v)
    assert one.layout.video_tiles == grid.video
    assert bool((one.maps[0].k.length == 1).all())


# ---- centroids ---------------------------------------------------------------------------------------------------


def test_centroids_go_on_from_the_last_step() -> None:
    """search: from tokens; refresh: from the centroids of the step before; reuse: they stay."""
    q, k, v = tensors(VIDEO)
    one = driven(METHOD, VIDEO)
    one(q, k, v, phase="search")
    state = one.module.state
    first = dict(state.version("default"))
    for name, clusters in (("q_centroids", 5), ("k_centroids", 11)):
        assert first[name].shape == (1, HEADS, clusters, DIM)
        assert METHOD.state(one.layout, one.site, 1, torch.float32)[name][0] == first[name].shape
    one(q + 0.1, k + 0.1, v, phase="refresh")
    second = dict(state.version("default"))
    _, wanted = ops.cluster_tokens(k + 0.1, first["k_centroids"], iterations=METHOD.iterations)
    assert torch.equal(second["k_centroids"], wanted)
    one(q, k, v, phase="reuse")
    assert torch.equal(state.version("default")["k_centroids"], second["k_centroids"])


def test_phases() -> None:
    """The first sparse step searches, later ones refresh; without a known step nothing is taken over."""
    schedule = SVG2.default_schedule
    assert schedule == vsparse.Schedule(dense_steps=0.2, dense_layers=1)
    known = {"steps": 50, "layer": 3}
    assert METHOD.phase(schedule, step=9, filled=False, **known) == "dense"
    assert METHOD.phase(schedule, step=10, filled=False, **known) == "search"
    assert METHOD.phase(schedule, step=11, filled=True, **known) == "refresh"
    assert METHOD.phase(vsparse.Schedule(), step=None, steps=None, layer=0, filled=True) == "search"


def test_first_centroids_follow_step_layer_and_seed_alone() -> None:
    q, k, v = tensors(VIDEO)
    before = torch.get_rng_state()
    seen = []
    for seed, layer, step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        found = []
        for _ in range(2):
            one = driven(METHOD.replace(seed=seed), VIDEO, layer=layer, layers=2)  # type: ignore[arg-type]
            one.call = dc.replace(one.call, step=torch.tensor(step))
            one(q, k, v)
            found.append(one.module.state.version("default")["k_centroids"])
        assert torch.equal(*found)
        seen.append(found[0])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    assert torch.equal(torch.get_rng_state(), before)


# ---- k-means -----------------------------------------------------------------------------------------------------


def lloyd(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """One head, loop by loop."""
    means, labels = centroids.clone(), torch.zeros(len(x), dtype=torch.int64)
    for _ in range(max(1, iterations)):
        for i, token in enumerate(x):
            distance = [float((token - mean).square().sum()) for mean in means]
            labels[i] = distance.index(min(distance))
        if iterations:
            for c in range(len(means)):
                if bool((labels == c).any()):
                    means[c] = x[labels == c].mean(0)
    return labels, means


@pytest.mark.parametrize("half", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_k_means_by_hand(iterations: int, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 40, 3, 5, generator=generator)
    start = torch.randn(2, 3, 6, 5, generator=generator)
    start[:, :, 4] = 99.0  # nothing comes near it
    monkeypatch.setattr("vsparse.ops.cluster._PART", 2 * 3 * 6 * 7)  # seven tokens at once
    with torch.autocast("cpu", enabled=half):
        labels, means = ops.cluster_tokens(x, start, iterations=iterations)
    for b, h in itertools.product(range(2), range(3)):
        working, truth = (lloyd(x[b, :, h].to(t), start[b, h].to(t), iterations) for t in (x.dtype, torch.float64))
        assert torch.equal(labels[b, h], truth[0])
        check("centroids", means[b, h], working[1], truth[1])
    assert torch.equal(means[:, :, 4], start[:, :, 4])


def test_k_means_op() -> None:
    x, start = torch.randn(1, 12, 2, 4), torch.randn(1, 2, 3, 4)
    torch.library.opcheck(torch.ops.vsparse.cluster_tokens, (x, start, 2))
    for bad, message in (
        ({"centroids": start[:, :1]}, r"centroids must be \[B, H, C, D\]"),
        ({"centroids": start.double()}, "centroids must be torch.float32"),
        ({"iterations": -1}, "iterations must be an integer >= 0"),
        ({"x": x[0]}, r"x must be a floating tensor \[B, N, H, D\]"),
    ):
        options: dict[str, Any] = {"x": x, "centroids": start, "iterations": 1, **bad}
        with pytest.raises(ValueError, match=message):
            ops.cluster_tokens(options.pop("x"), options.pop("centroids"), **options)


# ---- the order ---------------------------------------------------------------------------------------------------


@given(
    t=st.integers(1, 3), h=st.integers(1, 4), w=st.integers(1, 4), text=st.integers(0, 6), side=st.booleans(),
    clusters=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_arranged_tokens(t: int, h: int, w: int, text: int, side: bool, clusters: int, seed: int) -> None:
    """Every cluster is one run of slots in host order, text stays outside, and unpacking undoes packing."""
    grid = vsparse.Grid(t=t, h=h, w=w, **{"text_before" if side else "text_after": text})
    layout = ClusterLayout(grid, clusters=clusters)
    generator = torch.Generator().manual_seed(seed)
    count = layout.video_tiles
    assert count == min(clusters, grid.video)
    labels = torch.randint(0, count, (2, 3, grid.video), generator=generator)
    valid = torch.randint(0, text + 1, (2,), generator=generator) if text else None
    blocking = arrange(layout, labels, valid)
    x = torch.randn(2, grid.tokens, 3, 4, generator=generator)
    packed = blocking.pack(x)
    first = 1 if grid.text_before else 0
    for b, head, c in itertools.product(range(2), range(3), range(count)):
        where = (labels[b, head] == c).nonzero().squeeze(1) + grid.text_before
        start, length = (int(y[b, head, c + first]) for y in (blocking.start, blocking.length))
        assert length == len(where)
        assert torch.equal(packed[b, start : start + length, head], x[b, where, head])
    shown = torch.ones(2, grid.tokens, dtype=torch.bool)
    if valid is not None:
        place = torch.arange(text)
        texts = slice(0, text) if side else slice(grid.video, None)
        shown[:, texts] = place < valid[:, None]
    assert torch.equal(blocking.unpack(packed), torch.where(shown[..., None, None], x, 0))
    assert int(blocking.length.sum()) == 3 * int(shown.sum())
    with pytest.raises(ValueError, match="an order found from data"):
        blocking.expand(torch.zeros(2, layout.blocks, 3, 4))


def test_as_it_stands_the_layout_is_host_order() -> None:
    layout = ClusterLayout(TEXT, clusters=4, query_clusters=3)
    assert layout.identity
    assert layout.length.flatten().tolist() == [27, 26, 26, 26, 10]
    assert layout.queries is not None
    assert layout.queries.blocks == 4
    assert layout.key != ClusterLayout(TEXT, clusters=4).key
    moved = layout.to("meta")
    assert moved.queries is not None
    assert moved.queries.length.device.type == "meta"
    with pytest.raises(ValueError, match="clusters must be a positive integer, got 0"):
        ClusterLayout(TEXT, clusters=0)


# ---- defaults, refusals ------------------------------------------------------------------------------------------


def test_defaults_are_published() -> None:
    assert SVG2() == SVG2(
        mass=0.9, query_clusters=300, key_clusters=1000, least=0.1, first_iterations=50, iterations=2, seed=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 0.0}, "svg2: mass must be a number in"),
        ({"least": 1.5}, "svg2: least"),
        ({"query_clusters": 0}, "svg2: query_clusters must be an integer >= 1, got 0"),
        ({"key_clusters": 2.0}, "svg2: key_clusters"),
        ({"iterations": True}, "svg2: iterations"),
        ({"seed": -1}, "svg2: seed must be an integer >= 0"),
    ],
)
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVG2(**options)
