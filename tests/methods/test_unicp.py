"""unicp: cached steps by hand, what is kept, slicing by hand, inner methods, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from one_site import DIM, HEADS, Driven, attention, law, orthogonal, phases, tensors
from oracle import assert_identity, check
from torch import Tensor

import vsparse
from vsparse.methods import Method
from vsparse.methods.sparge import SpargeAttn
from vsparse.methods.unicp import UniCP, UniCPAttention, relative_change
from vsparse.methods.vsa import VSA

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


def short(found: list[str]) -> str:
    return "".join({"search": "S", "refresh": "R", "output": "o", "reuse": "/", "dense": "d"}[x] for x in found)


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
    assert short(phases(UniCP(**options), steps)) == wanted


def test_a_row_for_each_layer() -> None:
    method = UniCP(windows=((3,), (1, 2)), ends=0.0)
    assert [short(phases(method, 6, layer=layer)) for layer in range(2)] == ["SooRoo", "SRRRoR"]


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
    assert short(phases(method, 6, schedule=schedule)) == "dddSoR"
    assert short(phases(method, 6, layer=1, schedule=schedule)) == "dddddd"


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
    first = one(*tensors(VIDEO), phase="search")
    assert math.isinf(float(state.version("default")["change"]))
    second = one(*tensors(VIDEO, seed=1), phase="refresh")

    def hand(dtype: torch.dtype) -> Tensor:
        before, after = first.to(dtype), second.to(dtype)
        return torch.linalg.vector_norm(after - before, 1) / torch.linalg.vector_norm(before, 1)

    check("change", state.version("default")["change"], hand(torch.float32), hand(torch.float64))
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
@pytest.mark.parametrize("half", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(
    "inner",
    [SpargeAttn(mass=0.5, block=4, similarity=0.12), VSA(density=0.3, tile=(1, 2, 2), block=4)],
    ids=["sparge", "vsa"],
)
def test_an_inner_method_computes(grid: vsparse.Grid, inner: Method, half: bool) -> None:
    """To the bit, a branch with parameters of its own and its autocast included."""
    q, k, v = tensors(grid, batch=2)
    hidden = torch.randn(2, grid.video, HEADS * DIM, generator=torch.Generator().manual_seed(1))
    one, alone = driven(UniCP(windows=3, inner=inner), grid), Driven(inner, grid, LENGTHS if grid.text else None)
    with torch.no_grad():
        for mine, theirs in zip(one.module.parameters(), alone.module.parameters(), strict=True):
            mine.copy_(theirs.copy_(torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))))

    def run(site: Driven, phase: str) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=half):
            return site(q, k, v, hidden, phase=phase)

    wanted = run(alone, "search")
    for phase in ("search", "output", "refresh", "reuse"):
        assert torch.equal(run(one, phase), wanted)
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


def test_defaults() -> None:
    assert UniCP() == UniCP(windows=1, sliced=False, rank=None, ends=0.1, inner="dense")
    assert UniCP.default_schedule == PLAIN
    assert not UniCP().saves
