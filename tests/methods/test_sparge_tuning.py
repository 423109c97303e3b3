"""Tuning SpargeAttn: the bound holds, density falls as it is loosened, data of another shape are refused."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import pytest
import torch
from one_site import DIM, HEADS, Driven, attention
from torch import Tensor

import vsparse
from vsparse import reference
from vsparse.methods.samples import Sample
from vsparse.methods.sparge import SpargeAttn
from vsparse.methods.sparge_tuning import tune

GRID = vsparse.Grid(t=4, h=5, w=9)
TEXT = vsparse.Grid(t=4, h=5, w=9, text_after=6)
METHOD = SpargeAttn(block=8)
LENGTHS = torch.tensor([5, 2])


def samples(grid: vsparse.Grid, count: int = 2) -> list[Sample]:
    """Tokens that drift along the sequence: neighbours attend to each other, the second head less sharply."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)

        def noise(size: float) -> Tensor:
            return size * torch.randn(2, grid.tokens, HEADS, DIM, generator=generator)  # noqa: B023

        drift = noise(1.0).cumsum(1)
        drift = 3.0 * drift / drift.norm(dim=-1, keepdim=True) * torch.tensor([1.6, 0.9])[:, None]
        q, k, v = drift + noise(0.3), drift + noise(0.3), noise(1.0)
        found.append(Sample(grid=grid, q=q, k=k, v=v, text_length=LENGTHS if grid.text else None))
    return found


def errors(method: Any, data: list[Sample]) -> tuple[Tensor, Tensor]:
    """Worst error over the samples ``[H]`` by hand, and mean density ``[H]``, without skipping."""
    off, density = [], []
    for sample in data:
        q, k, v = sample.q, sample.k, sample.v
        one = Driven(method.replace(skip_threshold=None), sample.grid, sample.text_length)
        valid = one.valid().expand(len(q), -1)
        keep = (valid[:, None, None] & valid[:, None, :, None]).expand(-1, HEADS, -1, -1)
        exact, found = attention(q.double(), k.double(), v.double(), keep), one(q, k, v).double()
        off.append((found - exact).abs().sum((0, 1, 3)) / exact.abs().sum((0, 1, 3)))
        density.append(one.maps[0].density().mean(0))
    return torch.stack(off).amax(0), torch.stack(density).mean(0)


@pytest.mark.parametrize("grid", [GRID, TEXT], ids=["video", "text"])
def test_the_bound_holds_and_density_falls_as_it_is_loosened(grid: vsparse.Grid) -> None:
    data = samples(grid)
    densities = []
    for bound in (0.02, 0.1, 0.3):
        found = tune(METHOD, data, error=bound, skip_error=None)
        assert found["skip_threshold"] is None
        assert len(found["mass"]) == len(found["similarity"]) == HEADS
        off, density = errors(METHOD.replace(**found), data)
        assert float(off.max()) < bound
        densities.append(density)
    assert bool((densities[0] >= densities[1]).all())
    assert bool((densities[1] >= densities[2]).all())
    assert float(densities[2].mean()) < float(densities[0].mean())


def test_no_pair_that_was_tried_is_better() -> None:
    """Of all pairs within the bound, none has less density; heads are tuned apart."""
    data = samples(GRID)
    masses, similarities = (0.5, 0.8, 0.95), (0.0, 0.5, 0.8)
    found = tune(METHOD, data, error=0.16, skip_error=None, masses=masses, similarities=similarities)
    tried = [errors(METHOD.replace(mass=m, similarity=s), data) for m in masses for s in similarities]
    _, density = errors(METHOD.replace(**found), data)
    for head in range(HEADS):
        within = [float(d[head]) for off, d in tried if off[head] < 0.16]
        assert float(density[head]) == min(within)
    assert len(set(zip(found["mass"], found["similarity"], strict=True))) == 2


def test_a_head_that_nothing_suits_keeps_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, GRID.tokens, HEADS, DIM, generator=generator) for _ in range(3))
    v = v.abs() * torch.linspace(1, 100, GRID.tokens)[:, None, None]
    data = [Sample(grid=GRID, q=q, k=k, v=v)]
    found = tune(METHOD, data, error=1e-4, skip_error=None, masses=(0.3,), similarities=(0.0,))
    assert found["mass"] == (1.0, 1.0)
    assert float(errors(METHOD.replace(**found), data)[1].min()) == 1.0


def test_skipping_stays_within_its_bound() -> None:
    """The smallest threshold with which all heads do; by hand with the definition, which skips on any device."""
    data = samples(GRID)
    skips = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 9.0)
    found = tune(METHOD, data, error=0.1, skip_error=0.15, skips=skips)
    method: Any = METHOD.replace(**{**found, "skip_threshold": None})

    def worst(threshold: float) -> float:
        off = []
        for sample in data:
            q, k, v = sample.q, sample.k, sample.v
            one = Driven(method, GRID)
            one(q, k, v)
            (blocks,), blocking = one.maps, one.call.blocking
            packed = [blocking.pack(x) for x in (q, k, v)]
            out, _ = reference.block_sparse_attention(*packed, blocks, scale=DIM**-0.5, skip_threshold=threshold)
            exact = attention(q, k, v)
            off.append((blocking.unpack(out) - exact).abs().sum((0, 1, 3)) / exact.abs().sum((0, 1, 3)))
        return float(torch.stack(off).max())

    chosen = found["skip_threshold"]
    assert chosen in skips
    assert worst(chosen) < 0.15
    assert all(worst(threshold) >= 0.15 for threshold in skips if threshold < chosen)
    assert chosen > skips[0]
    assert tune(METHOD, data, error=0.1, skip_error=0.1001, skips=(0.0,))["skip_threshold"] is None


def test_the_same_data_give_the_same_numbers() -> None:
    before = torch.get_rng_state()
    options: dict[str, Any] = {"error": 0.1, "skip_error": None, "masses": (0.95, 0.5), "similarities": (0.5, 0.0)}
    assert tune(METHOD, samples(GRID), **options) == tune(METHOD, samples(GRID), **options)
    assert torch.equal(torch.get_rng_state(), before)


def other(sample: Sample, **changes: Any) -> Sample:
    return dc.replace(sample, **changes)


def refusals() -> list[Any]:
    first, second = samples(GRID)
    half, wide = (
        {name: change(getattr(second, name)) for name in "qkv"}
        for change in (lambda x: x[:, :, :1], lambda x: x.double())
    )
    return [
        ([], {}, "tune: no calibration samples were given"),
        ([first, samples(TEXT)[0]], {}, "tune: calibration samples must be of one shape"),
        ([first, other(second, **half)], {}, "tune: calibration samples must be of one shape"),
        ([first, other(second, **wide)], {}, "tune: calibration samples must be of one dtype on one device"),
        ([first], {"error": 0.0}, "tune: error must be a number in"),
        ([first], {"skip_error": 0.05}, "tune: skip_error must lie above error=0.05"),
        ([first], {"masses": ()}, "tune: masses must hold at least one number"),
        ([first], {"masses": (1.5,)}, "sparge: mass"),
        ([first], {"skips": (-1.0,)}, "sparge: skip_threshold"),
    ]


@pytest.mark.parametrize(("data", "options", "message"), refusals())
def test_refused_in_words(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune(METHOD, data, **options)


def test_a_sample_has_one_shape_and_dtype() -> None:
    first, second = samples(GRID)
    for changes, message in (
        ({name: getattr(first, name)[:, 1:] for name in "qkv"}, r"sample: q must be \[B, N=180, H, D\]"),
        ({"k": second.k[:, 1:]}, r"sample: k must be \[B, N=180, H, D\]"),
        ({"v": first.v.double()}, "sample: v must be torch.float32 on cpu like q, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            other(first, **changes)


def test_only_the_form_by_mass_is_tuned() -> None:
    with pytest.raises(ValueError, match='select="mass"'):
        tune(SpargeAttn(select="density"), samples(GRID))
