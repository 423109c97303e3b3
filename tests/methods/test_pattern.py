"""The pattern method: any pattern over any layout, per head, as text, shared by layers, refused in words."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import pytest
import rows
import torch
from one_site import HEADS, Driven, attention, law, tensors
from token_rules import blocks_of, holds
from torch import Tensor

import vsparse
from vsparse import patterns
from vsparse.layouts import RasterLayout, TileLayout
from vsparse.methods import Call, Method, Paper, Site, SparseAttention
from vsparse.methods.pattern import StaticMethod, StaticPattern

VIDEO = vsparse.Grid(t=3, h=5, w=7)
TEXT = vsparse.Grid(t=3, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=3, h=5, w=7, text_before=10)
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)
WINDOW = patterns.Window(size=3) | patterns.KeyFrames(frames=(0,))
DIVIDED = patterns.same_frame | patterns.same_position
ORDERS: dict[str, dict[str, Any]] = {
    "raster": {"block": 8},
    "frames": {"block": 8, "break_at": "frame"},
    "tiles": {"tile": (2, 2, 3), "block": 4},
}


@pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pattern", [WINDOW, (WINDOW, DIVIDED)], ids=["one", "per head"])
def test_attention_by_hand(grid: vsparse.Grid, order: str, pattern: Any) -> None:
    q, k, v = tensors(grid, batch=2)
    one = Driven(StaticPattern(pattern=pattern, **ORDERS[order]), grid, LENGTHS if grid.text else None)
    found = one(q, k, v)
    heads = pattern if isinstance(pattern, tuple) else (pattern,) * HEADS
    where, valid = one.token_blocks(), one.valid()
    text = (torch.arange(grid.tokens) < grid.text_before) | (torch.arange(grid.tokens) >= grid.text_before + grid.video)
    keep = torch.stack([blocks_of(holds(p, grid) | text | text[:, None], one.layout)[where][:, where] for p in heads])
    wanted = keep & valid[:, None, None] & valid[:, None, :, None]
    assert torch.equal(one.keep(), wanted)
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), wanted))
    blocks = one.maps[0]
    pairs = wanted.double().sum((-1, -2))
    possible = valid.double().sum(-1)[:, None] ** 2
    assert torch.equal(blocks.density().expand(pairs.shape), pairs / possible)


def test_layouts() -> None:
    one = Driven(StaticPattern(tile=(2, 2, 2), block=4), VIDEO)
    assert one.layout.key == TileLayout(VIDEO, tile=(2, 2, 2), block=4).key
    one = Driven(StaticPattern(block=4, break_at="frame"), VIDEO)
    assert one.layout.key == RasterLayout(VIDEO, block=4, break_at="frame").key


def test_text_and_patterns_say_the_same() -> None:
    said = StaticPattern(pattern=("Window(size=3) | KeyFrames(frames=(0,))", DIVIDED))
    assert said == StaticPattern(pattern=(WINDOW, DIVIDED))
    assert said.options() == {
        "pattern": (repr(WINDOW), repr(DIVIDED)),
        "by": "head",
        "tile": None,
        "block": 64,
        "break_at": None,
    }
    assert StaticPattern(**StaticPattern(pattern=WINDOW).options()) == StaticPattern(pattern=WINDOW)


def test_a_function_cannot_be_written_down() -> None:
    method = StaticPattern(pattern=patterns.Axis(axis="t", rule=lambda q, k: q == k))
    with pytest.raises(ValueError, match="is not a pattern"):
        method.options()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": 3}, "pattern: pattern must be a Pattern or a tuple of them, got 3"),
        ({"pattern": ()}, "pattern: pattern must be"),
        ({"pattern": "Windows(size=3)"}, "'Windows\\(size=3\\)' is not a pattern"),
        ({"break_at": "row"}, 'break_at must be "frame" or None'),
        ({"tile": (1, 2, 2), "break_at": "frame"}, "break_at='frame' is for raster order, got tile=\\(1, 2, 2\\), too"),
        ({"block": 0}, "block"),
    ],
)
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StaticPattern(**options)


@pytest.mark.parametrize(
    ("pattern", "grid", "words"),
    [
        (patterns.nothing, VIDEO, "the pattern leaves 14 of 14 query blocks without a key, the first of them block 0"),
        (
            patterns.Offset(low=(1, None, None)),
            VIDEO,
            "the pattern leaves 5 of 14 query blocks without a key, .* block 9;",
        ),
        (patterns.KeyFrames(frames=(2,)), vsparse.Grid(t=2, h=4, w=4), "leaves 4 of 4 query blocks"),
        ((WINDOW, patterns.nothing), VIDEO, "the pattern of head 1 leaves 14 of 14 query blocks"),
    ],
    ids=["nothing", "the next frames only", "a frame that the video does not have", "one head"],
)
def test_a_pattern_that_leaves_a_row_empty_is_refused(pattern: Any, grid: vsparse.Grid, words: str) -> None:
    """Attention over no key would be 0 without a word. With joint text every row has the text."""
    method = StaticPattern(pattern=pattern, block=8)
    with pytest.raises(ValueError, match=rf"pattern: on Grid\(t={grid.t}, .*{words}.*add keys that every query has"):
        Driven(method, grid)
    Driven(method, dc.replace(grid, text_after=10))(*tensors(dc.replace(grid, text_after=10)))


def test_apply_refuses_another_number_of_heads() -> None:
    model, _ = rows.build("wan")
    mark = rows.footprint(model)
    with pytest.raises(ValueError, match=r"pattern: 3 patterns for blocks.0.attn1, which has 2 heads"):
        vsparse.apply(model, "pattern", pattern=(WINDOW,) * 3)
    assert rows.footprint(model) == mark


# ---- static maps in a host ---------------------------------------------------------------------------------------


@dc.dataclass(frozen=True, kw_only=True)
class Alternating(StaticMethod):
    """Another pattern in every second layer, over the same layout."""

    key = "alternating"
    paper = Paper(title="a test", arxiv="", trained=False)

    def layout(self, grid: vsparse.Grid, site: Site) -> RasterLayout:
        return RasterLayout(grid, block=8)

    def static_pattern(self, site: Site) -> patterns.Pattern:
        return patterns.same_position if site.layer % 2 else patterns.same_frame


def calls_of(method: Method) -> list[Call | None]:
    model, inputs = rows.build("wan", layers=4)
    with vsparse.apply(model, method) as patch:
        rows.forward(model, rows.prompt("wan", inputs))
        rows.forward(model, rows.prompt("wan", inputs))
        return [site.call for site in patch.sites]


def test_layers_with_equal_patterns_share_a_map() -> None:
    calls = calls_of(Alternating())
    assert len({id(call) for call in calls}) == 2
    assert calls[0] is calls[2]
    maps = [call.static for call in calls if call is not None]
    assert not torch.equal(maps[0].to_mask(), maps[1].to_mask())  # type: ignore[union-attr]
    assert len({id(call) for call in calls_of(StaticPattern(pattern=WINDOW))}) == 1


def test_maps_are_built_once_per_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from vsparse.methods import base

    built: list[Any] = []
    stock = base.block_map

    def counted(*args: Any) -> Any:
        built.append(args)
        return stock(*args)

    monkeypatch.setattr(base, "block_map", counted)
    model, inputs = rows.build("hunyuan_video")
    with vsparse.apply(model, "pattern", pattern=WINDOW, block=8) as patch:
        for seed, grid in enumerate(((2, 6, 7), (2, 6, 7), (3, 4, 5), (2, 6, 7))):
            rows.forward(model, rows.prompt("hunyuan_video", inputs, grid, seed=seed))
        assert len(built) == 2
        lengths = [site.call.static.k.length for site in patch.sites]  # type: ignore[union-attr]
        assert all(length is site.call.blocking.length for length, site in zip(lengths, patch.sites, strict=True))  # type: ignore[union-attr]


def test_a_method_without_a_static_map_has_none() -> None:
    model, inputs = rows.build("wan")
    with vsparse.apply(model, "vsa") as patch:
        rows.forward(model, rows.prompt("wan", inputs))
        assert all(isinstance(site, SparseAttention) and site.call.static is None for site in patch.sites)  # type: ignore[union-attr]


def test_prediction_is_what_runs() -> None:
    """Full text, ragged blocks: the density of the plan is that of the calls."""
    model, inputs = rows.build("wan")
    options: dict[str, Any] = {"pattern": (WINDOW, DIVIDED), "tile": (2, 3, 4), "block": 8}
    made = vsparse.plan(model, "pattern", height=112, width=96, num_frames=9, **options)
    assert made.grid == vsparse.Grid(t=3, h=7, w=6)
    with vsparse.apply(model, "pattern", **options) as patch:
        rows.forward(model, inputs(1, (3, 7, 6)))
        assert patch.stats()["sparse_density"] == pytest.approx(made.density, abs=1e-12)


def test_omitted_blocks_may_hold_anything() -> None:
    """NaN in every key and value that the pattern omits for all queries."""
    q, k, v = tensors(VIDEO)
    one = Driven(StaticPattern(pattern=patterns.KeyFrames(frames=(1,)), block=5, break_at="frame"), VIDEO)
    wanted = one(q, k, v)
    hidden = torch.arange(VIDEO.tokens) // VIDEO.frame != 1
    k[:, hidden], v[:, hidden] = torch.nan, torch.nan
    found: Tensor = one(q, k, v)
    assert torch.equal(found, wanted)
