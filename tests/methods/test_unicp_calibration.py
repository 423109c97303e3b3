"""Calibration of unicp: windows by exhaustive search, slicing where it errs less, bases by hand, refusals."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from one_site import DIM, Driven, orthogonal, phases, tensors
from oracle import assert_identity
from torch import Tensor

import vsparse
from vsparse.methods.samples import Sample
from vsparse.methods.unicp import UniCP, UniCPAttention
from vsparse.methods.unicp_calibration import calibrate, fit_bases, principal_basis, slicing_error

VIDEO = vsparse.Grid(t=3, h=4, w=5)
TEXT = vsparse.Grid(t=3, h=4, w=5, text_after=10)
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)


def best_window(row: list[float], step: int, bound: float, most: int, guard: int) -> int:
    """The largest window that fits, all tried."""
    steps = len(row)
    fits = [
        w
        for w in range(1, most + 1)
        if w == 1
        or (
            guard <= step
            and step + w <= steps - guard
            and sum(row[step + 1 : step + w]) <= bound
        )
    ]  # fmt: skip
    return max(fits)


@pytest.mark.parametrize("ends", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("seed", range(4))
def test_windows_are_those_of_an_exhaustive_search(seed: int, ends: float) -> None:
    draw = random.Random(seed)
    steps, most, bound = 17, 5, 0.3
    changes = [{i: draw.choice((0.02, 0.08, 0.15, 0.5)) for i in range(1, steps)} for _ in range(3)]
    del changes[0][9]
    changes[1][5] = math.nan
    found = calibrate(changes, steps=steps, bound=bound, most=most, ends=ends)
    guard = math.ceil(ends * steps)
    rows = [[known.get(i, math.inf) for i in range(steps)] for known in changes]
    rows[1][5] = math.inf
    for row, windows in zip(rows, found["windows"], strict=True):
        assert list(windows) == [1 if i < guard else best_window(row, i, bound, most, guard) for i in range(steps)]
    assert not any(itertools.chain(*found["sliced"]))
    method = UniCP(**found)
    for layer, row in enumerate(rows):
        last = None
        for step, phase in enumerate(phases(method, steps, layer=layer)):
            if phase != "output":
                last = step
                continue
            assert last is not None
            assert sum(row[last + 1 : step + 1]) <= bound
            assert guard <= step < steps - guard
    assert phases(method, steps) != phases(UniCP(), steps)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("error", [0.01, 0.1, 0.2, 0.4])
def test_the_smaller_error_is_chosen(seed: int, error: float) -> None:
    """As the method runs it: reused where that errs no more than slicing, sliced only within the bound."""
    draw = random.Random(seed)
    steps, bound = 20, 0.25
    row = [math.inf, *(draw.choice((0.02, 0.08, 0.15, 0.5)) for _ in range(steps - 1))]
    found = calibrate([dict(enumerate(row))], steps=steps, bound=bound, ends=0.1, slicing=[error])
    method = UniCP(rank=2, **found)
    last = None
    seen = set()
    for step, phase in enumerate(phases(method, steps)):
        seen.add(phase)
        if phase in ("search", "refresh"):
            last = step
            continue
        assert last is not None
        assert 2 <= step < steps - 2
        reused = sum(row[last + 1 : step + 1])
        covered = step < last + found["windows"][0][last]
        if phase == "output":
            assert covered
            assert reused <= min(bound, error)
        else:
            assert error <= bound
            assert error < reused
            assert covered or found["windows"][0][step] == 1
    assert ("reuse" in seen) == (error <= bound)


def record(grid: vsparse.Grid, basis: Tensor, noise: float = 0.0) -> list[Sample]:
    """Queries and keys in the subspace of each head that a basis spans, and a little noise."""
    found = []
    for seed in range(2):
        q, k, v = (x.to(basis.dtype) for x in tensors(grid, batch=2, seed=seed))
        q, k = (torch.einsum("bnhd,hde->bnhe", x, projector(basis)) + noise * x for x in (q, k))
        if grid.text:  # what is not valid must not count
            q[1, -3:] = k[1, -3:] = 1e3
        found.append(Sample(grid=grid, q=q, k=k, v=v, text_length=LENGTHS if grid.text else None))
    return found


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.transpose(-1, -2)


@pytest.mark.parametrize("grid", [VIDEO, TEXT], ids=["video", "text"])
def test_the_basis_spans_the_logits(grid: vsparse.Grid) -> None:
    truth = orthogonal(3, seed=9)
    assert_identity(lambda x: projector(principal_basis(record(grid, x), 3)), projector, [truth], grads=False)
    samples = record(grid, truth)
    basis = principal_basis(samples, 3)
    errors = [slicing_error(samples, basis[..., :rank]) for rank in (3, 2, 1)]
    assert errors[0] < errors[1] < errors[2]
    noisy = record(grid, truth, noise=0.2)
    best = slicing_error(noisy, principal_basis(noisy, 3))
    assert best < min(slicing_error(noisy, orthogonal(3, seed=seed)) for seed in range(4))


def test_the_basis_by_hand() -> None:
    """The right singular vectors of all queries and keys of a head, as projectors: their signs are free."""

    def ours(*x: Tensor) -> Tensor:
        samples = [Sample(grid=VIDEO, q=q, k=k, v=k) for q, k in (x[:2], x[2:])]
        found = principal_basis(samples, DIM).transpose(-1, -2)
        return found[..., :, None] * found[..., None, :]

    def hand(*x: Tensor) -> Tensor:
        found = torch.linalg.svd(torch.cat(x, 1).permute(2, 0, 1, 3).flatten(1, 2), full_matrices=False)[2]
        return found[..., :, None] * found[..., None, :]

    first, second = record(VIDEO, orthogonal(5, seed=9), noise=0.3)
    assert_identity(ours, hand, [first.q, first.k, second.q, second.k], grads=False)


def test_bases_are_given_to_the_sites() -> None:
    sites = [Driven(UniCP(rank=3), VIDEO, layer=layer, layers=2).module for layer in range(2)]
    recorded = {("root", layer): record(VIDEO, orthogonal(3 + layer, seed=9)) for layer in range(2)}
    errors = fit_bases(sites, recorded)
    for site in sites:
        samples = recorded["root", site.site.layer]
        basis = principal_basis(samples, 3)
        assert isinstance(site, UniCPAttention)
        assert site.basis is not None
        assert torch.equal(site.basis.detach(), basis.float())
        assert errors["root", site.site.layer] == slicing_error(samples, basis)
    assert errors["root", 0] < errors["root", 1]
    with pytest.raises(ValueError, match=r"\('root', 1\) has no calibration samples"):
        fit_bases(sites, {("root", 0): recorded["root", 0]})
    with pytest.raises(ValueError, match="has no basis; apply unicp with a rank"):
        fit_bases([Driven(UniCP(), VIDEO).module], recorded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "unicp: steps must be an integer >= 1, got 0"),
        ({"most": True}, "unicp: most must be an integer >= 1"),
        ({"bound": 0.0}, "unicp: bound must be positive and finite"),
        ({"bound": math.inf}, "unicp: bound must be positive and finite"),
        ({"changes": []}, "unicp: no layer has calibrated changes"),
        ({"slicing": [0.1, 0.2]}, "slicing must hold one error per layer, got 2 for 1 layers"),
    ],
)
def test_calibration_refuses_in_words(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"changes": [{1: 0.1}], "steps": 4, "bound": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        calibrate(given.pop("changes"), **given)


def test_a_rank_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=f"rank must be an integer from 1 to the head dimension {DIM}, got 0"):
        principal_basis(record(VIDEO, orthogonal(3)), 0)
    with pytest.raises(ValueError, match="unicp: no calibration samples were given"):
        principal_basis([], 2)
