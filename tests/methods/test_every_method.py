"""What no method may get wrong, on the awkward inputs that published code gets wrong: one contract for all of them."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from one_site import DIM, HEADS, Driven, attention, law, tensors
from torch import Tensor

import vsparse
from vsparse import patterns

RAGGED = vsparse.Grid(t=3, h=5, w=7)
PORTRAIT = vsparse.Grid(t=2, h=11, w=3)
ONE_FRAME = vsparse.Grid(t=1, h=5, w=7)
TEXT = vsparse.Grid(t=3, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=3, h=5, w=7, text_before=10)
# The second sample has no valid text at all.
LENGTHS = torch.tensor([7, 0], dtype=torch.int32)


@dc.dataclass(frozen=True, kw_only=True)
class Row:
    """A method at its tightest, and with nothing left out.

    Args:
        key: Registry key. least: options with which it computes as few pairs as it can. whole: options with which it
            keeps everything on a grid smaller than its tiles; those not named have their defaults. layer: of the site.
    """

    key: str
    least: Mapping[str, Any]
    whole: Mapping[str, Any] = dc.field(default_factory=dict)
    layer: int = 0

    def method(self, options: Mapping[str, Any]) -> vsparse.methods.Method:
        """The method with options."""
        return vsparse.list_methods()[self.key](**options)

    def driven(self, options: Mapping[str, Any], grid: vsparse.Grid, lengths: Tensor | None = None) -> Driven:
        """A site in float64."""
        one = Driven(self.method(options), grid, lengths, layer=self.layer, layers=3)
        one.module.double()
        return one


TILE = (2, 2, 3)
FRAME_TILE = (1, 2, 3)
TINY = 1e-6
_VMOBA = {"frames": 1, "patch": (2, 3), "cube": (1, 2, 3), "top_k": (1, 1, 1)}
_VSA = {"density": TINY, "tile": TILE, "block": 6}
ROWS = {
    "vsa": Row(key="vsa", least=_VSA, whole={"density": TINY}),
    "adaspa": Row(key="adaspa", least={"density": TINY, "block": 8}, whole={"density": TINY}),
    **{f"vmoba {d}d": Row(key="vmoba", least=_VMOBA, layer=d - 1) for d in (1, 2, 3)},
    "vmoba threshold": Row(
        key="vmoba",
        least={**_VMOBA, "select": "threshold", "scope": "head_global", "threshold": TINY},
        whole={"select": "threshold"},
        layer=2,
    ),
    "dsv": Row(
        key="dsv",
        least={"density": TINY, "least": TINY, "stage": "sparse", "adaptive": False, "rank": 3, "tile": TILE},
        whole={"stage": "sparse", "adaptive": False, "density": TINY, "least": TINY},
    ),
    "dsv tokens": Row(
        key="dsv",
        least={
            "density": TINY,
            "least": TINY,
            "stage": "sparse",
            "adaptive": False,
            "rank": 3,
            "tile": TILE,
            "block": 12,
            "granularity": "token",
        },
        whole={"stage": "sparse", "adaptive": False, "density": 1.0},
    ),
    "sta": Row(key="sta", least={"window": (1, 1, 1), "tile": TILE, "block": 4}),
    "radial": Row(key="radial", least={"decay_factor": 0.0, "adjacent": 0.0, "sink_frames": 0, "least": 1, "block": 1}),
    "svg": Row(key="svg", least={"density": TINY, "rows": 5, "sink_frames": 0, "block": 1}, whole={"density": TINY}),
    "svg2": Row(
        key="svg2",
        least={"mass": TINY, "least": TINY, "query_clusters": 5, "key_clusters": 11, "first_iterations": 2},
        whole={"mass": 1.0},
    ),
    "attention_tile": Row(key="attention_tile", least={"global_frames": 1, "block": 4}),
    "sla": Row(key="sla", least={"density": TINY, "block": 8}, whole={"density": TINY}),
    "sla marginal": Row(
        key="sla",
        least={"density": TINY, "block": 8, "linear": "marginal", "negligible": 0.9},
        whole={"linear": "marginal"},
    ),
    "nabla": Row(key="nabla", least={"mass": TINY, "window": None, "tile": FRAME_TILE, "block": 4}),
    "sparge": Row(key="sparge", least={"mass": TINY, "similarity": 0.0, "block": 8}, whole={"mass": TINY}),
    "sparge guarded": Row(key="sparge", least={"mass": TINY, "similarity": 0.12, "block": 8}),
    "sparge density": Row(
        key="sparge", least={"select": "density", "density": TINY, "block": 8}, whole={"select": "density"}
    ),
    "xattention": Row(key="xattention", least={"mass": TINY, "stride": 4, "block": 8}, whole={"mass": TINY}),
    "draft": Row(
        key="draft",
        least={"density": TINY, "tile": FRAME_TILE, "block": 4},
        whole={"tile": (8, 8, 16), "density": TINY},
    ),
    "jenga": Row(key="jenga", least={"density": TINY, "mass": TINY, "block": 4}, whole={"density": TINY, "mass": TINY}),
    "pattern": Row(key="pattern", least={"pattern": patterns.Window(size=1), "block": 4}),
    "unicp": Row(key="unicp", least={"inner": vsparse.list_methods()["vsa"](**_VSA)}),
    "by_layer": Row(key="by_layer", least={"parts": {"0-": ("vsa", _VSA)}}, whole={"parts": {"0-": "nabla"}}),
}
METHODS = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def test_every_method_has_a_row() -> None:
    assert {row.key for row in ROWS.values()} | {"dense"} == set(vsparse.list_methods())


def run(one: Driven, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sparse call in float64; a method whose search is exact uses the map that it found."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(q.shape[0], one.grid.video, HEADS * DIM, generator=generator).double()
    out = one(*(x.double() for x in (q, k, v)), hidden)
    return one(*(x.double() for x in (q, k, v)), hidden, phase="reuse") if one.method.key == "adaspa" else out


def lengths(grid: vsparse.Grid) -> Tensor | None:
    return LENGTHS if grid.text else None


@METHODS
@pytest.mark.parametrize("scale", [0.0, 8.0])
@pytest.mark.parametrize("grid", [RAGGED, PORTRAIT, ONE_FRAME, TEXT, BEFORE], ids=str)
def test_at_the_least_budget_no_row_is_empty_and_no_padding_takes_weight(
    row: Row, grid: vsparse.Grid, scale: float
) -> None:
    """Values of one come out as one: an empty row would give 0 or NaN, a padded key would take a share for its 0.

    Equal scores (scale 0), portrait grids, a single frame and a sample without text are among the inputs.
    """
    q, k, v = tensors(grid, batch=2, scale=scale)
    one = row.driven(row.least, grid, lengths(grid))
    out = run(one, q, k, torch.ones_like(v)).float()
    valid = one.valid().expand(2, -1)
    assert torch.equal(out[valid], torch.ones_like(out[valid]))


SMALL = {
    "one token": vsparse.Grid(t=1, h=1, w=1),
    "one frame": vsparse.Grid(t=1, h=3, w=4),
    "one column": vsparse.Grid(t=3, h=4, w=1),
    "one frame and text": vsparse.Grid(t=1, h=3, w=4, text_after=4),
}


@METHODS
@pytest.mark.parametrize("grid", SMALL.values(), ids=SMALL)
def test_a_grid_smaller_than_tile_window_and_clusters_is_full_attention(row: Row, grid: vsparse.Grid) -> None:
    """Published sizes on a video that is smaller than each of them, a single frame and a single token included."""
    inputs = tensors(grid, batch=2)
    one = row.driven(row.whole, grid, torch.tensor([4, 1]) if grid.text else None)
    out = run(one, *inputs)
    keep = (one.valid()[:, None, None] & one.valid()[:, None, :, None]).expand(-1, HEADS, -1, -1)
    law(out.float(), lambda dtype: attention(*(x.to(dtype) for x in inputs), keep))


@METHODS
@pytest.mark.parametrize("grid", [RAGGED, TEXT], ids=str)
def test_samples_of_a_batch_do_not_mix(row: Row, grid: vsparse.Grid) -> None:
    """Another second sample leaves the first as it is: the batch is no part of the sequence, and no map is shared.

    In float64, compared in float32: how a kernel groups its work may depend on the longest list of all samples.
    """
    first, other = tensors(grid, batch=2, scale=4.0), tensors(grid, batch=2, scale=4.0, seed=9)
    mixed = [torch.cat((a[:1], b[1:])) for a, b in zip(first, other, strict=True)]
    found = [run(row.driven(row.least, grid, lengths(grid)), *inputs) for inputs in (first, mixed)]
    assert torch.equal(found[0][0].float(), found[1][0].float())
    assert not torch.equal(found[0][1].float(), found[1][1].float())


@METHODS
@pytest.mark.parametrize("grid", [TEXT, BEFORE], ids=["text", "text before"])
def test_what_stands_in_padded_text_changes_nothing(row: Row, grid: vsparse.Grid) -> None:
    """The bias of a projection makes padding non-zero: no mean, smoothing, cluster or softmax may see it, or a NaN."""
    inputs = tensors(grid, batch=2)
    one = row.driven(row.least, grid, lengths(grid))
    clean, valid = run(one, *inputs), one.valid()
    for junk in (1e4, torch.nan):
        dirty = [torch.where(valid[..., None, None], x, junk) for x in inputs]
        found = run(row.driven(row.least, grid, lengths(grid)), *dirty)
        assert torch.equal(found[valid], clean[valid])


@METHODS
def test_autocast_changes_no_map(row: Row) -> None:
    """Scores, centroids and predictions are computed as precisely as without: near ties would fall otherwise."""
    grid = vsparse.Grid(t=4, h=9, w=14, text_after=10)
    inputs = tensors(grid, batch=2)
    hidden = torch.randn(2, grid.video, HEADS * DIM, generator=torch.Generator().manual_seed(1))
    masks = []
    for enabled in (False, True):
        one = Driven(row.method(row.least), grid, LENGTHS, layer=row.layer, layers=3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for phase in ("search", "reuse") if row.key == "adaspa" else ("search",):
                one(*inputs, hidden, phase=phase)
        masks.append([blocks.validate().to_mask() for blocks in one.maps])
    assert all(map(torch.equal, *masks))


@METHODS
@pytest.mark.parametrize("text", [1, 9, 23])
def test_text_of_any_length_and_the_last_tokens_take_part(row: Row, text: int) -> None:
    """No length is compiled in and nothing is dropped at the end: the last text token reaches every query."""
    grid = vsparse.Grid(t=2, h=3, w=7, text_after=text)
    q, k, v = (0.1 * x for x in tensors(grid, batch=1))
    v = torch.zeros_like(v)
    v[:, -1] = 1.0
    out = run(row.driven(row.least, grid), q, k, v)
    assert bool((out > 0).all())
    assert bool((out < 1).all()) or grid.tokens == 1
