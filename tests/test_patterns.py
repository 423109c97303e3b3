"""Patterns: every rule and combination against loops over the lattice, block form, bounds, text, caches, refusals."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_rules import KINDS, blocks_of, combined, earlier, halving, holds, mixed, places, rules
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vsparse
from vsparse import CurveLayout, Grid, RasterLayout, TileLayout, patterns
from vsparse.blocks import BlockMap
from vsparse.layouts import Layout
from vsparse.patterns import Box, Pattern, algebra

MANY = settings(max_examples=120)


def mask(blocks: BlockMap) -> Tensor:
    return blocks.validate().to_mask()[0, 0]


# ---- meaning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), grid=strategies.grids(text=3))
def test_every_rule_token_by_token(kind: str, data: st.DataObject, grid: Grid) -> None:
    pattern = data.draw(KINDS[kind])
    assert torch.equal(pattern.token_mask(grid, text="pattern"), holds(pattern, grid))


@MANY
@pytest.mark.parametrize("kind", ["rule", "combined", "mixed"])
@given(data=st.data())
def test_block_form_is_any_kept_pair_of_tokens(kind: str, data: st.DataObject) -> None:
    """Whether its differences are few and tried one by one, or judged by boxes."""
    grid = data.draw(strategies.grids(text=4))
    pattern = data.draw({"rule": rules, "combined": combined, "mixed": mixed}[kind])
    layout = data.draw(strategies.layouts(grid))
    text = data.draw(st.sampled_from(["always", "pattern"]))
    keep = holds(pattern, grid)
    is_text = torch.tensor([place is None for place in places(grid)])
    if text == "always":
        keep = keep | is_text | is_text[:, None]
    wanted = blocks_of(keep, layout)
    algebra._block_mask.cache_clear()
    with mock.patch.object(algebra, "_FEW", data.draw(st.sampled_from([-1, 128]))):
        found = mask(pattern.block_map(layout, text=text))
    used = layout.length[0, 0] > 0
    full = wanted[:, used].all(-1) & used
    assert torch.equal(found, wanted | full[:, None])
    assert torch.equal(pattern.token_mask(grid, text=text), keep)


@settings(max_examples=80)
@pytest.mark.parametrize("kind", [*KINDS, "combined", "mixed"])
@given(data=st.data(), grid=strategies.grids(), seed=strategies.seeds)
def test_bounds_hold_over_boxes(kind: str, data: st.DataObject, grid: Grid, seed: int) -> None:
    """What is certain is so, and nothing that is ruled out occurs; rules are exact, and so is all on single tokens."""
    pattern = data.draw({"combined": combined, "mixed": mixed, **KINDS}[kind])
    keep = pattern.token_mask(grid, text="pattern")
    video = slice(grid.text_before, grid.text_before + grid.video)
    keep = keep[video, video].reshape(grid.t, grid.h, grid.w, grid.t, grid.h, grid.w)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([grid.t, grid.h, grid.w] * 2)[:, None]
    ends = (torch.rand(2, 6, 12, generator=generator) * sizes).long().sort(0).values
    ends[1, :, :4] = ends[0, :, :4]
    q, k = Box(ends[0, :3], ends[1, :3]), Box(ends[0, 3:], ends[1, 3:])
    found = [x.expand(12).tolist() for x in pattern.bounds(q, k, grid)]
    for i, (some, maybe, every, nearly) in enumerate(zip(*found, strict=True)):
        inside = keep[tuple(slice(int(a), int(b) + 1) for a, b in ends[:, :, i].T)]
        assert some <= bool(inside.any()) <= maybe
        assert every <= bool(inside.all()) <= nearly
        assert kind not in KINDS or (some == maybe and every == nearly)
        assert i >= 4 or some == maybe == every == nearly


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (patterns.Window(size=3), [(0, 3), (0, 3), (1, 4), (2, 5), (2, 5)]),
        (patterns.Window(size=3, border="cut"), [(0, 2), (0, 3), (1, 4), (2, 5), (3, 5)]),
        (patterns.Window(size=4), [(0, 4), (0, 4), (0, 4), (1, 5), (1, 5)]),
        (patterns.Window(size=9), [(0, 5)] * 5),
        (patterns.Window(size=1, unit=2), [(0, 2), (0, 2), (2, 4), (2, 4), (4, 5)]),
        (patterns.Window(size=3, stride=2), [(0, 3), (0, 3), (2, 5), (2, 5), (2, 5)]),
        (patterns.Window(size=1, stride=2, border="cut"), [(1, 2), (1, 2), (3, 4), (3, 4), (4, 5)]),
        (patterns.Cells(size=2), [(0, 2), (0, 2), (2, 4), (2, 4), (4, 5)]),
        (patterns.Cells(size=2, shift=1), [(0, 1), (1, 3), (1, 3), (3, 5), (3, 5)]),
        (patterns.Cells(size=2, halo=1), [(0, 3), (0, 3), (1, 5), (1, 5), (3, 5)]),
        (patterns.Offset(low=(0, 0, -1), high=(0, 0, 0)), [(0, 1), (0, 2), (1, 3), (2, 4), (3, 5)]),
        (patterns.Offset(low=(0, 0, 1), high=(0, 0, 1)), [(1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]),
        (patterns.Band(width=1), [(0, 2), (0, 3), (1, 4), (2, 5), (3, 5)]),
    ],
    ids=repr,
)
def test_examples_in_one_dimension(pattern: Pattern, kept: list[tuple[int, int]]) -> None:
    wanted = torch.tensor([[low <= k < high for k in range(5)] for low, high in kept])
    assert torch.equal(pattern.token_mask(Grid(t=1, h=1, w=5)), wanted)


def test_known_patterns_can_be_said() -> None:
    """Rules of published systems in the algebra, by the keys that one query sees."""
    grid = Grid(t=3, h=4, w=4)

    def seen(pattern: Pattern, t: int, h: int, w: int) -> set[tuple[int, ...]]:
        row = pattern.token_mask(grid)[(t * 4 + h) * 4 + w].view(3, 4, 4)
        return {tuple(x) for x in row.nonzero().tolist()}

    divided = patterns.same_frame | patterns.same_position
    assert seen(divided, 1, 2, 3) == {(1, h, w) for h in range(4) for w in range(4)} | {(t, 2, 3) for t in range(3)}
    stripes = patterns.Cells(size=(None, 2, None))
    assert {h for _, h, _ in seen(stripes, 0, 3, 0)} == {2, 3}
    grid_attention = patterns.Stride(step=(1, 2, 2)) & patterns.same_frame
    assert seen(grid_attention, 1, 1, 0) == {(1, h, w) for h in (1, 3) for w in (0, 2)}
    earlier_neighbours = patterns.Offset(low=(0, -1, -1), high=(0, 0, 0))
    assert seen(earlier_neighbours, 1, 1, 1) == {(1, h, w) for h in (0, 1) for w in (0, 1)}
    causal = patterns.Offset(high=(0, None, None)) | patterns.KeyFrames(frames=(-1,))
    assert {t for t, _, _ in seen(causal, 0, 0, 0)} == {0, 2}
    shifted_chunks = patterns.Offset(low=(0, 1, 0), high=(0, 1, 0), unit=(3, 2, 4))
    assert {h for _, h, _ in seen(shifted_chunks, 0, 1, 0)} == {2, 3}
    temporal_head = patterns.FrameBand(width=1)
    assert seen(temporal_head, 0, 1, 0) == {(t, *place) for t in range(3) for place in ((0, 3), (1, 0), (1, 1))}


# ---- algebra -----------------------------------------------------------------------------------------------------


@given(grid=strategies.grids(most=3), a=rules, b=rules)
def test_laws_of_the_algebra(grid: Grid, a: Pattern, b: Pattern) -> None:
    def of(pattern: Pattern) -> Tensor:
        return pattern.token_mask(grid, text="pattern")

    assert torch.equal(of(a | b), of(a) | of(b))
    assert torch.equal(of(a & b), of(a) & of(b))
    assert torch.equal(of(~a), ~of(a))
    assert torch.equal(of(a.T), of(a).T)
    assert torch.equal(of(~(a & b)), of(~a | ~b))
    assert ~~a == a
    assert a.T.T == a  # noqa: SIM300
    assert a | a == a
    assert (a | b) | a == a | b
    assert hash(a & b) == hash(a & b)


@given(pattern=combined)
def test_what_repr_writes_can_be_read(pattern: Pattern) -> None:
    if "<function" in repr(pattern):
        with pytest.raises(ValueError, match="is not a pattern"):
            patterns.parse(repr(pattern))
    else:
        assert patterns.parse(repr(pattern)) == pattern


def test_repr_says_what_was_said() -> None:
    window = patterns.Window(size=(3, None, 5), unit=2)
    assert repr(window) == "Window(size=(3, None, 5), unit=(2, 2, 2))"
    assert repr(~(window | patterns.everything) & patterns.text_keys.T) == (
        "(~(Window(size=(3, None, 5), unit=(2, 2, 2)) | Everything()) & Text(side='key').T)"
    )
    assert repr((~window).T) == f"(~{window!r}).T"
    assert patterns.parse("same_frame | ~Band(width=3) & text_keys.T") == (
        patterns.same_frame | (~patterns.Band(width=3) & patterns.text_keys.T)
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Window",
        "Window(3)",
        "Window(size=0)",
        "Window(siez=3)",
        "Window(**{'size': 3})",
        "same_frame()",
        "Axis(axis='h', rule=earlier)",
        "print(size=3)",
        "Band(width=1) + Band(width=2)",
        "not Band(width=1)",
        "Band(width=1).part",
        "Band(width=__import__('os').getpid())",
        "everything; nothing",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a pattern"):
        patterns.parse(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patterns.Window(size=0), "Window: size must be integers >= 1 or None"),
        (lambda: patterns.Window(size=(1, 2)), "three \\(frames, rows, columns\\), got \\(1, 2\\)"),
        (lambda: patterns.Window(size=True), "Window: size"),
        (lambda: patterns.Window(size=3, border="wrap"), 'border must be "shift" or "cut", got'),
        (lambda: patterns.Window(size=3, dilation=0), "Window: dilation"),
        (lambda: patterns.Window(size=3, unit=(1, None, 1)), "Window: unit"),
        (lambda: patterns.Cells(size=3, halo=-1), "Cells: halo must be integers >= 0"),
        (lambda: patterns.Offset(low="a"), "Offset: low must be integers or None"),
        (lambda: patterns.Stride(step=(0, 1, 1)), "Stride: step"),
        (lambda: patterns.KeyStride(step=2, offset=2), "KeyStride: offset must be below step"),
        (lambda: patterns.KeyFrames(frames=0), "KeyFrames: frames must be a tuple of integers, got 0"),
        (lambda: patterns.KeyFrames(frames=(0.5,)), "KeyFrames: frames"),
        (lambda: patterns.Axis(axis="x", rule=earlier), 'Axis: axis must be "t", "h" or "w"'),
        (lambda: patterns.Axis(axis="t", rule=3), "Axis: rule must map"),
        (lambda: patterns.Axis(axis="t", rule=lambda q, k: q).token_mask(Grid(t=2, h=1, w=1)), "return a bool tensor"),
        (lambda: patterns.Band(width=-1), "Band: width must be an integer >= 0 or a function of the grid, got -1"),
        (lambda: patterns.Band(width=1, order="time"), 'Band: order must be "frame" or "position", got \'time\''),
        (lambda: patterns.FrameBand(width=(1, 2.5)), "FrameBand: width"),
        (lambda: patterns.Text(side="both"), 'Text: side must be "query" or "key"'),
        (lambda: patterns.block_map((), RasterLayout(Grid(t=1, h=1, w=1))), "one Pattern per head, got \\(\\)"),
        (lambda: patterns.block_map("everything", RasterLayout(Grid(t=1, h=1, w=1))), "must be a Pattern"),
        (lambda: patterns.everything.block_map(RasterLayout(Grid(t=1, h=1, w=1)), text="never"), "text must be"),
    ],
)
def test_refused_in_words(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_only_patterns_combine() -> None:
    with pytest.raises(TypeError):
        patterns.everything | True  # type: ignore[operator]


# ---- block form --------------------------------------------------------------------------------------------------


def test_heads_have_patterns_of_their_own() -> None:
    layout = RasterLayout(Grid(t=2, h=3, w=4, text_after=2), block=4)
    heads = (patterns.same_frame, patterns.everything, patterns.Band(width=0), patterns.same_frame)
    found = patterns.block_map(heads, layout)
    assert found.index.shape[:3] == (1, 4, layout.blocks)
    for head, pattern in enumerate(heads):
        assert torch.equal(found.validate().to_mask()[0, head], mask(pattern.block_map(layout)))
    one = patterns.block_map((patterns.same_frame,), layout)
    assert one.index.shape[1] == 1


def test_capacity_is_the_longest_row_that_is_not_full() -> None:
    grid = Grid(t=3, h=4, w=4, text_after=3)
    blocks = patterns.same_frame.block_map(RasterLayout(grid, block=4))
    assert blocks.capacity == 4 + 1  # four blocks of the frame, one of text; the text row is full
    assert blocks.count[0, 0].tolist() == [5] * 12 + [13]
    assert patterns.everything.block_map(RasterLayout(grid, block=4)).capacity == 0
    assert patterns.everything.block_map(TileLayout(grid, tile=(2, 3, 3), block=4)).capacity == 0


def test_an_order_per_head_is_refused() -> None:
    layout = RasterLayout(Grid(t=2, h=2, w=2), block=2)
    values = {f: getattr(layout, f) for f in ("grid", "block", "token_slot", "length", "segment", "text_offset")}
    heads = Layout(key=("heads",), slot_token=layout.slot_token.expand(1, 2, -1), **values)
    with pytest.raises(NotImplementedError, match="an order that all samples and heads share"):
        patterns.everything.block_map(heads)


def test_equal_patterns_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    stock = algebra.kept_pairs

    def counted(*args: Any) -> Tensor:
        built.append(args)
        return stock(*args)

    monkeypatch.setattr(algebra, "kept_pairs", counted)
    algebra._block_mask.cache_clear()
    grid = Grid(t=3, h=5, w=7)
    for _ in range(2):
        patterns.block_map((patterns.Window(size=3),) * 5, TileLayout(grid, tile=(2, 2, 2)))
    assert len(built) == 1
    patterns.Window(size=3).block_map(TileLayout(grid, tile=(2, 2, 3)))
    patterns.Window(size=3).block_map(TileLayout(grid, tile=(2, 2, 2)), text="pattern")
    assert len(built) == 3


def test_equal_lists_are_made_once() -> None:
    """A plan asks for the maps of every layer."""
    layout = TileLayout(Grid(t=3, h=5, w=7), tile=(2, 2, 2))
    algebra._lists.cache_clear()
    for _ in range(3):
        patterns.block_map((patterns.Window(size=3), patterns.Window(size=5)), layout)
    assert algebra._lists.cache_info().misses == 2


@pytest.mark.parametrize("mode", ["inference", "fake", "device", "no_grad"])
def test_maps_are_ordinary_tensors_in_every_mode(mode: str) -> None:
    pattern = patterns.Window(size=3) | patterns.FrameBand(width=("inference", "fake", "device", "no_grad").index(mode))
    layout = TileLayout(Grid(t=3, h=4, w=5, text_after=2), tile=(2, 2, 2))
    context = {
        "inference": torch.inference_mode,
        "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
        "device": lambda: torch.device("meta"),
        "no_grad": torch.no_grad,
    }[mode]
    with context():
        found = pattern.block_map(layout)
    assert type(found.index) is Tensor
    assert not found.index.is_inference()
    assert found.index.device.type == "cpu"
    assert torch.equal(mask(found), blocks_of(pattern.token_mask(layout.grid), layout))


@pytest.mark.parametrize("side", ["text_before", "text_after"])
def test_text_of_each_sample(side: str) -> None:
    """With the blockings of a batch, empty text blocks count for nothing and the rest is as before."""
    grid = Grid(t=2, h=4, w=4, **{side: 10})
    layout = TileLayout(grid, tile=(1, 2, 2))
    static = patterns.same_frame.block_map(layout)
    lengths = torch.tensor([10, 5, 0])
    bound = layout.bind(lengths)
    computed, possible = BlockMap(static.index, static.count, bound, bound).pairs()
    video, frame = 32, 16
    assert possible[:, 0].tolist() == [(video + n) ** 2 for n in lengths.tolist()]
    assert computed[:, 0].tolist() == [video * (frame + n) + n * (video + n) for n in lengths.tolist()]


# ---- real sizes --------------------------------------------------------------------------------------------------

WAN, HUNYUAN = Grid(t=21, h=45, w=80), Grid(t=33, h=45, w=80, text_after=256)
REAL = [
    (WAN, RasterLayout(WAN), patterns.FrameBand(width=halving) | patterns.KeyFrames(frames=(0,))),
    (WAN, TileLayout(WAN, tile=(6, 8, 8), block=64), patterns.Window(size=(3, 3, 3), unit=(6, 8, 8))),
    (WAN, TileLayout(WAN), patterns.Band(width=5000) & patterns.Stride(step=2)),
    (WAN, RasterLayout(WAN, break_at="frame"), ~patterns.Window(size=(9, 21, 21)) & patterns.Cells(size=(None, 9, 16))),
    (HUNYUAN, RasterLayout(HUNYUAN), patterns.Window(size=(5, 11, 11)) | patterns.same_position),
    (HUNYUAN, CurveLayout(HUNYUAN), patterns.Offset(low=(-1, -1, -1), high=(1, 1, 1))),
]


@pytest.mark.parametrize(
    ("grid", "layout", "pattern"), REAL, ids=["radial", "sta", "stride", "cells", "hunyuan", "jenga"]
)
def test_real_sizes(grid: Grid, layout: Layout, pattern: Pattern) -> None:
    """Random block pairs of long videos token by token; half of them from the border between kept and not."""
    found = mask(pattern.block_map(layout))
    video = layout.segment != 0
    rows = torch.arange(layout.blocks)[video]
    generator = torch.Generator().manual_seed(0)
    border = (found[1:, 1:] != found[:-1, 1:]) & video[1:, None] & video[1:] & video[:-1, None]
    pick = border.nonzero()[torch.randperm(int(border.sum()), generator=generator)[:60]] + 1
    pairs = torch.cat((pick, rows[torch.randint(0, len(rows), (60, 2), generator=generator)]))
    lattice = Box.lattice(grid)
    tokens = [layout.slot_token[0, 0].view(-1, layout.block)[b] for b in range(layout.blocks)]
    for i, j in pairs.tolist():
        q, k = (lattice.at(tokens[b][tokens[b] >= 0] - grid.text_before) for b in (i, j))
        inside = pattern.bounds(q.at(slice(None), None), k.at(None), grid).some
        assert bool(inside.any()) == bool(found[i, j]), (i, j)


def test_public_names() -> None:
    assert vsparse.patterns is patterns
    kinds = [value for value in vars(patterns).values() if isinstance(value, type) and issubclass(value, Pattern)]
    assert all(kind.__name__ in patterns.__all__ for kind in kinds)
    assert list(itertools.chain(patterns.__all__)) == sorted(patterns.__all__, key=lambda name: (name.islower(), name))
