"""unicp: cached steps by hand, what is kept, slicing by hand, inner methods, calibration by search, refusals."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from one_site import DIM, HEADS, Driven, attention, law, tensors
from oracle import assert_identity
from torch import Tensor

import vsparse
from vsparse.methods.samples import Sample
from vsparse.methods.sparge import SpargeAttn
from vsparse.methods.unicp import UniCP, UniCPAttention, relative_change
from vsparse.methods.unicp_calibration import calibrate, fit_bases, principal_basis, slicing_error

VIDEO = vsparse.Grid(t=3, h=4, w=5)
TEXT = vsparse.Grid(t=3, h=4, w=5, text_after=10)
BEFORE = vsparse.Grid(t=3, h=4, w=5, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)
PLAIN = vsparse.Schedule()


def driven(method: UniCP, grid: vsparse.Grid, **site: Any) -> Driven:
    one = Driven(method, grid, LENGTHS if grid.text else None, **site)
    one.module.eval()
    return one


def run(method: UniCP, steps: int, *, layer: int = 0, schedule: vsparse.Schedule = PLAIN) -> list[str]:
    """The phases of a whole generation."""
    found, filled, stamp = [], False, None
    for step in range(steps):
        phase = method.phase(schedule, step=step, steps=steps, layer=layer, filled=filled, stamp=stamp)
        if phase in method.state_phases:
            filled, stamp = True, step
        found.append(phase)
    return found


def short(phases: list[str]) -> str:
    return "".join({"search": "S", "refresh": "R", "output": "o", "reuse": "/", "dense": "d"}[x] for x in phases)


# ---- which step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps", "wanted"),
    [
        ({}, 6, "SRRRRR"),
        ({"windows": 3, "ends": 0.0}, 7, "SooRooR"),
        ({"windows": 3, "ends": 0.1}, 10, "SRooRooRoR"),
        ({"windows": 3, "ends": 0.2}, 10, "SRRooRooRR"),
        ({"windows": 9, "ends": 0.5}, 4, "SRRR"),
        ({"windows": (1, 4), "ends": 0.0}, 8, "SRRRRooo"),
        ({"windows": (4, 1), "ends": 0.0}, 9, "SoooRoooR"),
        ({"windows": 3, "ends": 0.0, "sliced": (False, False, True), "rank": 2}, 6, "Soo" + "R" + "//"),
        ({"windows": 5, "ends": 0.0, "sliced": (False, True, False, False), "rank": 2}, 4, "S/oo"),
        ({"sliced": True, "rank": 2}, 10, "S////////R"),
    ],
)
def test_steps_by_hand(options: dict[str, Any], steps: int, wanted: str) -> None:
    assert short(run(UniCP(**options), steps)) == wanted


def test_a_row_for_each_layer() -> None:
    method = UniCP(windows=((3,), (1, 2)), ends=0.0)
    assert [short(run(method, 6, layer=layer)) for layer in range(2)] == ["SooRoo", "SRRRoR"]


def test_the_window_is_that_of_the_step_that_computed() -> None:
    """Whatever was planned: a step that did not run leaves the older output, and its window counts."""
    method = UniCP(windows=3, ends=0.0)
    known: dict[str, Any] = {"steps": 20, "layer": 0, "filled": True}
    assert [method.phase(PLAIN, step=s, stamp=4, **known) for s in (4, 5, 6, 7, 9)] == [
        "refresh", "output", "output", "refresh", "refresh",
    ]  # fmt: skip
    assert method.phase(PLAIN, step=5, stamp=None, **{**known, "filled": False}) == "search"


def test_dense_steps_and_layers_stay_dense() -> None:
    schedule = vsparse.Schedule(dense_steps=0.5, dense_layers=(1,))
    method = UniCP(windows=2, ends=0.0)
    assert short(run(method, 6, schedule=schedule)) == "dddSoR"
    assert short(run(method, 6, layer=1, schedule=schedule)) == "dddddd"


def test_without_a_known_step() -> None:
    known: dict[str, Any] = {"step": None, "steps": None, "layer": 0}
    assert UniCP().phase(PLAIN, filled=True, **known) == "refresh"
    with pytest.raises(ValueError, match=r"which steps are cached depends on the denoising step.*patch\.generation"):
        UniCP(windows=2).phase(PLAIN, filled=False, **known)
    with pytest.raises(ValueError, match="its windows say when attention is computed, got a schedule with search_at"):
        UniCP().phase(vsparse.Schedule(search_at=(0.2,)), step=1, steps=9, layer=0, filled=False)


# ---- what is computed and kept -----------------------------------------------------------------------------------


def visible(one: Driven) -> Tensor:
    valid = one.valid()
    return (valid[:, None, None] & valid[:, None, :, None]).expand(-1, HEADS, -1, -1)


@GRIDS
def test_a_computed_step_is_full_attention(grid: vsparse.Grid) -> None:
    q, k, v = tensors(grid, batch=2)
    one = driven(UniCP(), grid)
    keep = visible(one)
    for phase in ("search", "refresh"):
        found = one(q, k, v, phase=phase)
        assert found.is_contiguous()
        law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep))
    assert_identity(lambda *x: one(*x), lambda *x: attention(*x, keep), [q, k, v])


def test_the_cached_output_comes_back_to_the_bit() -> None:
    q, k, v = tensors(VIDEO)
    one = driven(UniCP(windows=3), VIDEO)
    first = one(q, k, v)
    kept = first.clone()
    again = one(*tensors(VIDEO, seed=1), phase="output")
    assert torch.equal(again, kept)
    second = one(*tensors(VIDEO, seed=1), phase="refresh")
    assert not torch.equal(second, first)
    assert torch.equal(one(q, k, v, phase="output"), second)


def test_the_change_is_measured_against_the_last_computed_output() -> None:
    one = driven(UniCP(), VIDEO)
    state = one.module.state
    first = one(*tensors(VIDEO), phase="search").double()
    assert math.isinf(float(state.version("default")["change"]))
    second = one(*tensors(VIDEO, seed=1), phase="refresh").double()
    wanted = float((second - first).abs().sum() / first.abs().sum())
    assert float(state.version("default")["change"]) == pytest.approx(wanted, rel=1e-5)
    one(*tensors(VIDEO, seed=1), phase="refresh")
    assert float(state.version("default")["change"]) == 0.0
    declared = UniCP().state(one.layout, one.site, 1, torch.float32)
    held = state.version("default")
    assert {name: (tuple(x.shape), x.dtype) for name, x in held.items()} == declared
    assert float(relative_change(torch.zeros(3), torch.zeros(3))) == 0.0


def test_training_computes_every_step_and_keeps_nothing() -> None:
    q, k, v = tensors(VIDEO)
    one = driven(UniCP(windows=3), VIDEO)
    one.module.train()
    for phase in ("search", "refresh", "output"):
        x = q.clone().requires_grad_()
        found = one(x, k, v, phase=phase)
        found.sum().backward()
        assert x.grad is not None
        law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype)))
        assert not one.module.state.version("default")


def test_a_reused_output_refuses_gradients() -> None:
    q, k, v = tensors(VIDEO)
    one = driven(UniCP(windows=3), VIDEO)
    one(q, k, v)
    with pytest.raises(NotImplementedError, match=r"site would reuse an output, which has no gradient.*model.train"):
        one(q.requires_grad_(), k, v, phase="output")
    with torch.no_grad():
        one(q, k, v, phase="output")


# ---- slicing -----------------------------------------------------------------------------------------------------


def orthogonal(rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator, dtype=torch.float64))[0][..., :rank]


def sliced(method: UniCP, grid: vsparse.Grid, basis: Tensor) -> Driven:
    one = driven(method, grid)
    assert isinstance(one.module, UniCPAttention)
    assert one.module.basis is not None
    with torch.no_grad():
        one.module.basis.copy_(basis)
    return one


@GRIDS
@pytest.mark.parametrize("rank", [1, 3, DIM])
def test_slicing_by_hand(grid: vsparse.Grid, rank: int) -> None:
    """Logits of the projections, the scale of the whole head; at full rank the host's own attention."""
    inputs = tensors(grid, batch=2)
    basis = orthogonal(rank).float()
    one = sliced(UniCP(rank=rank), grid, basis)
    keep = visible(one)

    def hand(*x: Tensor) -> Tensor:
        q, k, v = x
        spread = basis.to(q.dtype) @ basis.to(q.dtype).transpose(-1, -2)
        return attention(torch.einsum("bnhd,hde->bnhe", q, spread), k, v, keep)

    found = one(*inputs, phase="reuse")
    law(found, lambda dtype: hand(*(x.to(dtype) for x in inputs)))
    if rank == DIM:
        law(found, lambda dtype: attention(*(x.to(dtype) for x in inputs), keep))
    assert not one.module.state.version("default"), "a sliced step leaves nothing"


def test_the_basis_is_trained() -> None:
    q, k, v = tensors(VIDEO)
    one = driven(UniCP(rank=3), VIDEO)
    basis = one.module.basis
    assert isinstance(basis, torch.nn.Parameter)
    assert torch.equal(basis.detach(), torch.eye(DIM, 3).expand(HEADS, -1, -1))
    one.module.train()
    one(q, k, v, phase="reuse").square().sum().backward()
    assert basis.grad is not None
    assert float(basis.grad.abs().max()) > 0


# ---- inner methods -----------------------------------------------------------------------------------------------


@GRIDS
def test_an_inner_method_computes(grid: vsparse.Grid) -> None:
    inner = SpargeAttn(mass=0.5, block=4, similarity=0.12)
    q, k, v = tensors(grid, batch=2)
    one, alone = driven(UniCP(windows=3, inner=inner), grid), Driven(inner, grid, LENGTHS if grid.text else None)
    wanted = alone(q, k, v)
    for phase in ("search", "output", "refresh", "reuse"):
        assert torch.equal(one(q, k, v, phase=phase), wanted)
        if phase != "output":
            assert torch.equal(one.keep(), alone.keep())
        else:
            assert not bool(one.maps[0].count.any())


def test_what_follows_the_inner_method() -> None:
    method = UniCP(inner="nabla")
    inner = method.inner_method
    one = driven(method, VIDEO)
    assert one.layout.key == inner.layout(VIDEO, one.site).key
    assert method.call_density() == inner.call_density()
    assert method.requires == inner.requires
    assert method.exact_phases == {"dense"}
    assert UniCP().exact_phases == {"dense", "search", "refresh"}
    assert UniCP(inner="sla").requires == vsparse.list_methods()["sla"]().requires
    tile = UniCP(inner="attention_tile")
    assert tile.static_pattern(one.site) == tile.inner_method.static_pattern(one.site)
    assert tile.predicted_density(one.layout, one.site) == tile.inner_method.predicted_density(one.layout, one.site)
    assert UniCP(inner=SpargeAttn(skip_threshold=5.0)).kernel_options() == {"skip_threshold": 5.0}


@pytest.mark.parametrize("inner", ["dense", "sparge", SpargeAttn(mass=(0.5, 0.9), block=16), UniCP().inner_method])
def test_options_come_back(inner: Any) -> None:
    import json

    method = UniCP(windows=((1, 2), (3, 4)), ends=0.2, inner=inner)
    stored = json.loads(json.dumps(method.options()))
    assert UniCP(**stored) == method


# ---- calibration -------------------------------------------------------------------------------------------------


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
        for step, phase in enumerate(run(method, steps, layer=layer)):
            if phase != "output":
                last = step
                continue
            assert last is not None
            assert sum(row[last + 1 : step + 1]) <= bound + 1e-12
            assert guard <= step < steps - guard
    assert short(run(method, steps)) != short(run(UniCP(), steps))


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
    for step, phase in enumerate(run(method, steps)):
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


def record(grid: vsparse.Grid, rank: int, noise: float = 0.0) -> list[Sample]:
    """Queries and keys in a subspace of each head, and a little noise."""
    found = []
    for seed in range(2):
        q, k, v = (x[:, :, :, :] for x in tensors(grid, batch=2, seed=seed))
        basis = orthogonal(rank, seed=9).float()
        spread = basis @ basis.transpose(-1, -2)
        q, k = (torch.einsum("bnhd,hde->bnhe", x, spread) + noise * x for x in (q, k))
        if grid.text:  # what is not valid must not count
            q[1, -3:] = k[1, -3:] = 1e3
        found.append(Sample(grid=grid, q=q, k=k, v=v, text_length=LENGTHS if grid.text else None))
    return found


@pytest.mark.parametrize("grid", [VIDEO, TEXT], ids=["video", "text"])
def test_the_basis_spans_the_logits(grid: vsparse.Grid) -> None:
    samples = record(grid, 3)
    basis = principal_basis(samples, 3)
    truth = orthogonal(3, seed=9)
    overlap = torch.linalg.matrix_norm(basis.transpose(-1, -2) @ truth) ** 2
    assert torch.allclose(overlap, torch.full_like(overlap, 3.0), rtol=0, atol=1e-5)
    assert (
        slicing_error(samples, basis) < slicing_error(samples, basis[..., :2]) < slicing_error(samples, basis[..., :1])
    )
    noisy = record(grid, 3, noise=0.2)
    best = slicing_error(noisy, principal_basis(noisy, 3))
    assert best < min(slicing_error(noisy, orthogonal(3, seed=seed)) for seed in range(4))


def test_the_basis_by_hand() -> None:
    (first, second) = record(VIDEO, 5, noise=0.3)
    basis = principal_basis([first, second], DIM)
    for head in range(HEADS):
        stacked = torch.cat([getattr(s, x)[:, :, head].flatten(0, 1) for s in (first, second) for x in "qk"]).double()
        covariance = stacked.T @ stacked
        values = torch.stack([basis[head, :, i] @ covariance @ basis[head, :, i] for i in range(DIM)])
        exact = torch.linalg.eigvalsh(covariance).flip(0)
        assert torch.allclose(values, exact)
    assert torch.allclose(basis.transpose(-1, -2) @ basis, torch.eye(DIM, dtype=torch.float64))


def test_bases_are_given_to_the_sites() -> None:
    sites = [driven(UniCP(rank=3), VIDEO, layer=layer, layers=2).module for layer in range(2)]
    recorded = {("root", layer): record(VIDEO, 3 + layer) for layer in range(2)}
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
        fit_bases([driven(UniCP(), VIDEO).module], recorded)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "unicp: windows must be an integer >= 1, a tuple of them by ranges"),
        ({"windows": True}, "unicp: windows"),
        ({"windows": ()}, "unicp: windows"),
        ({"windows": (1, (2,))}, "unicp: windows"),
        ({"windows": ((1,), ())}, "unicp: windows"),
        ({"windows": (((1,),),)}, "unicp: windows"),
        ({"windows": (2, 1.5)}, "unicp: windows"),
        ({"sliced": 1, "rank": 2}, "unicp: sliced must be True or False"),
        ({"sliced": True}, "unicp: sliced steps need a rank, got rank=None"),
        ({"rank": 0}, "unicp: rank must be an integer >= 1 or None, got 0"),
        ({"ends": 0.6}, r"unicp: ends must be a share in \[0, 0.5\], got 0.6"),
        ({"ends": math.nan}, "unicp: ends"),
        ({"inner": "no such"}, "unknown method 'no such'"),
        ({"inner": 3}, "unicp: inner must be the key of a method or a Method, got 3"),
        ({"inner": "adaspa"}, "inner must be a method that keeps nothing between calls, got 'adaspa'"),
        ({"inner": "unicp"}, "inner must be a method that keeps nothing between calls, got 'unicp'"),
        ({"inner": "sparge", "rank": 2}, "rank is for inner=\"dense\", got rank=2 with inner 'sparge'"),
    ],
)  # fmt: skip
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniCP(**options)


def test_numbers_for_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="windows has 2 layers, and root has 3"):
        driven(UniCP(windows=((1,), (2,))), VIDEO, layers=3)
    with pytest.raises(ValueError, match=f"rank must be at most the head dimension {DIM}, got 99"):
        driven(UniCP(rank=99), VIDEO)


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
        principal_basis(record(VIDEO, 3), 0)
    with pytest.raises(ValueError, match="unicp: no calibration samples were given"):
        principal_basis([], 2)


def test_defaults() -> None:
    assert UniCP() == UniCP(windows=1, sliced=False, rank=None, ends=0.1, inner="dense")
    assert UniCP.default_schedule == PLAIN
    assert not UniCP().saves
