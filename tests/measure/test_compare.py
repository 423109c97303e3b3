"""Recall against density: counted right, above chance for every method, and never above the exact choice."""

from __future__ import annotations

import dataclasses as dc
import json
from pathlib import Path
from typing import Any

import one_site
import pytest
import torch
from oracle import assert_identity
from torch import Tensor

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import Blocking
from vsparse.measure import recall_report
from vsparse.measure.compare import Point, Sweep, compare, embedded_samples, recall_at, sweeps
from vsparse.measure.recall import driven, kept_by, key_mass, random_like
from vsparse.measure.selection import selection_cost, selection_summary, selection_table
from vsparse.measure.synthetic import HEADS, structured_sample
from vsparse.methods import Method, get_method, list_methods

GRIDS = (Grid(t=4, h=8, w=12), Grid(t=3, h=8, w=10, text_after=10))
POOLED = ("vsa", "sla", "nabla", "sparge, unguarded", "sparge, density", "xattention", "draft", "jenga")
LINES = {line.name: line for line in sweeps()}


def middle(line: Sweep) -> Method:
    value = line.values[len(line.values) // 2]
    return get_method(line.method)(**{**line.options, **({line.field: value} if line.field else {})})


def test_every_method_that_chooses_has_a_line() -> None:
    assert {line.method for line in LINES.values()} == {key for key, kind in list_methods().items() if kind.chooses}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_method_beats_random_blocks(grid: Grid) -> None:
    sample = structured_sample(grid, width=32)
    for point in compare([sample], list(LINES.values())):
        where = f"{point.line}, {point.field}={point.value}: {point}"
        assert point.density <= point.random_density, where
        assert point.recall > point.random or point.density == 1.0, where


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["vsa", "adaspa", "sta", "vmoba"])
def test_recall_and_density_are_those_of_the_token_mask(name: str, grid: Grid) -> None:
    """Padded slots of ragged blocks are no queries whose recall would enter the mean."""
    sample = structured_sample(grid, heads=one_site.HEADS, width=8)
    method = middle(LINES[name])
    kept = kept_by(method, sample, layer=2)
    site = one_site.Driven(method, grid, layer=2, layers=3)
    hidden = torch.zeros(1, grid.video, site.site.dim)
    site(sample.q, sample.k, sample.v, hidden, phase="search")
    if "search" in method.exact_phases:
        site(sample.q, sample.k, sample.v, hidden, phase="reuse")
    mask = torch.zeros(one_site.HEADS, grid.tokens, grid.tokens, dtype=torch.bool)
    for blocks in site.maps:
        keep = blocks.to_mask()[0].expand(one_site.HEADS, -1, -1)
        where = site.token_blocks()
        rows = site.layout.token_slot[0, 0] if blocks.q.block == 1 else where
        mask |= keep[:, rows][..., where]
    q, k = (x[0].double().transpose(0, 1) for x in (sample.q, sample.k))
    share = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1)
    wanted = torch.where(mask, share, 0).sum(-1)[:, : grid.video].mean(-1)
    mass = key_mass(sample, kept.block, kept.keep.shape[-1])
    torch.testing.assert_close(kept.recall(mass), wanted)
    torch.testing.assert_close(kept.density(), mask.double().mean((1, 2)))


def test_mass_is_that_of_the_op() -> None:
    sample = structured_sample(GRIDS[1], width=32)
    module, call = driven(get_method("vsa")(tile=(2, 2, 4), block=16), sample)
    kept = kept_by(module.method, sample)

    def by_token(q: Tensor, k: Tensor) -> Tensor:
        mass = key_mass(dc.replace(sample, q=q, k=k, v=k), kept.block, kept.keep.shape[-1])
        return torch.zeros_like(kept.keep, dtype=mass.dtype).scatter_add(1, kept.row[..., None].expand_as(mass), mass)

    def by_op(q: Tensor, k: Tensor) -> Tensor:
        q, k = (call.blocking.pack(x) for x in (q, k))
        return ops.search_attention(q, k, k, call.blocking)[2][0]

    assert_identity(by_token, by_op, [sample.q, sample.k], grads=False)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", POOLED)
def test_no_pooled_score_catches_more_than_the_exact_mass(
    name: str, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[tuple[Tensor, Any]] = []
    for selector in ("top_k", "top_p", "head_global"):
        stock = getattr(select, selector)

        def listen(scores: Tensor, q: Any, *rest: Any, stock: Any = stock, **options: Any) -> BlockMap:
            scored.append((scores, q))
            return stock(scores, q, *rest, **options)

        monkeypatch.setattr(select, selector, listen)
    sample = structured_sample(grid, width=32, dtype=torch.float64)
    kept_by(middle(LINES[name]), sample)
    monkeypatch.undo()
    scores, tiles = scored[0]
    q, k, v = (tiles.pack(x) for x in (sample.q, sample.k, sample.v))
    mass = ops.search_attention(q, k, v, tiles)[2].double()
    video = torch.ones(tiles.blocks, dtype=torch.bool) if tiles.text is None else ~tiles.text
    for count in (1, 3, 8):
        best, found = (
            torch.where(select.top_k(x, tiles, count=count, forced=select.forced_text(tiles)).to_mask(), mass, 0)
            for x in (mass, scores)
        )
        # One by one, the largest first: sums would round.
        best, found = (x.sort(-1, descending=True).values[:, :, video] for x in (best, found))
        assert (found <= best).all()
        assert (found < best).any(), "the pooled scores choose as the exact mass does: compare something harder"


def test_adaspa_with_heads_alike_is_the_best_of_its_layout() -> None:
    """Its published rule moves budget between heads, and catches less in the mean than one budget for all may."""
    sample = structured_sample(GRIDS[0], width=32)
    lines = [LINES[name] for name in ("adaspa, heads alike", "adaspa", "sla")]
    points = {(point.line, point.value): point for point in compare([sample], lines)}
    for value in LINES["sla"].values:
        best = points["adaspa, heads alike", value]
        assert points["sla", value].density == best.density
        assert points["sla", value].recall < best.recall


def test_random_blocks_leave_text_alone_and_repeat() -> None:
    sample = structured_sample(GRIDS[1], width=16)
    kept = kept_by(middle(LINES["vsa"]), sample)
    state = torch.random.get_rng_state()
    first, again, other = (random_like(kept, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.keep, again.keep)
    assert not torch.equal(first.keep, other.keep)
    text = kept.text_blocks
    assert int(text.sum()) == len(HEADS)
    assert all(first.keep[head][:, text[head]].all() for head in range(len(HEADS)))


@pytest.mark.parametrize("name", ["vsa", "vmoba", "svg2", "nabla"])
def test_random_rows_have_as_many_tokens_or_a_part_of_a_block_more(name: str) -> None:
    kept = kept_by(middle(LINES[name]), structured_sample(GRIDS[1], width=16), layer=2)
    chance = random_like(kept, 0)
    size = torch.where(kept.text_blocks, 0, kept.sizes)
    wanted, drawn = ((x.keep * size[:, None]).sum(-1) for x in (kept, chance))
    assert (wanted <= drawn).all()
    assert (drawn < wanted + size.amax(-1, keepdim=True)).all()
    assert not torch.equal(chance.keep, kept.keep)


def test_structured_samples_repeat_and_leave_the_generator() -> None:
    state = torch.random.get_rng_state()
    first, again = (structured_sample(GRIDS[1]) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.q, again.q)
    with pytest.raises(ValueError, match="no padded text"):
        kept_by(middle(LINES["vsa"]), dc.replace(first, text_length=torch.tensor([3])))
    with pytest.raises(NotImplementedError, match="no sparse path"):
        kept_by(get_method("dense")(), first)


def test_embedded_samples_are_those_of_every_layer() -> None:
    samples = embedded_samples(steps=2)
    assert len(samples) > 1
    assert {sample.grid for sample in samples} == {Grid(t=5, h=16, w=16)}
    point = compare(samples[:1], [dc.replace(LINES["vsa"], values=(0.2,))])[0]
    assert point.recall > 2 * point.random


def test_selection_cost_takes_its_clocks_away() -> None:
    stock = ops.host_order_attention, Blocking.pack
    costs = selection_cost(grid=Grid(t=4, h=16, w=16), heads=1, width=16, density=0.3, rounds=1)
    assert (ops.host_order_attention, Blocking.pack) == stock
    assert all(cost.select > 0 < cost.attend for cost in costs)
    blocks = 4 * 16 * 16 // 64
    assert {cost.line: cost.density for cost in costs}["sla"] == kept_blocks(0.3, blocks) / blocks
    assert set(selection_summary(costs)) == {cost.line for cost in costs}
    selection_table(costs)


def test_what_is_written(tmp_path: Path) -> None:
    def point(line: str, density: float, recall: float) -> Point:
        chance = {"random": density, "random_density": density}
        return Point(line=line, method="vsa", field="density", value=density, density=density, recall=recall, **chance)

    line = [point("a", 0.25, 0.5), point("a", 0.75, 1.0)]
    assert [recall_at(line, "a", density) for density in (0.2, 0.25, 0.5, 0.75)] == [None, 0.5, 0.75, 1.0]
    sets = {"one": [point("a", 0.05, 0.3), point("a", 0.15, 0.5)], "two": [point("a", 0.1, 0.7), point("b", 0.5, 0.9)]}
    assert "| `a` | 0.40 | – | – | " in recall_report.markdown(sets)
    recall_report.recall_table("one", sets["one"])
    picture = recall_report.plot(tmp_path / "recall.png", sets, title="t", note="n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    recall_report.write_text(tmp_path / "recall.json", recall_report.as_json(recall_report.report(sets, ["x", "y z"])))
    report = json.loads((tmp_path / "recall.json").read_text())
    assert report["command"] == "x 'y z'"
    assert report["sets"]["one"][0]["recall"] == 0.3
    recall_report.record(tmp_path / "all.json", "old", {"x": 1})
    recall_report.record(tmp_path / "all.json", "recall", recall_report.summary(sets, ["x"]))
    kept = json.loads((tmp_path / "all.json").read_text())
    assert kept["old"] == {"x": 1}
    assert kept["recall"]["recall"]["one"]["a"] == [0.4, None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "recall.json", "recall.png"]
