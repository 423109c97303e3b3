"""The meter: bytes as autograd and the tensors themselves tell them, FLOPs as PyTorch and closed forms do."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import rows
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import vsparse
from vsparse.layouts import TileLayout
from vsparse.measure.meter import Meter

pytestmark = pytest.mark.xdist_group("meter")  # steps that several tests look at are run once

METHODS = ["vsa", "vmoba", "sla", "dsv", "nabla", "draft", "sta"]


@contextlib.contextmanager
def still() -> Iterator[None]:
    """No garbage is collected inside, so that two runs let go of the same things."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def loss_of(model: nn.Module, patch: vsparse.Patch | None, values: dict[str, Any]) -> Tensor:
    loss = model(**values)[0].square().mean()
    return loss + sum(patch.auxiliary_losses().values()) if patch else loss


@functools.cache
def step(
    method: str | None, *, checkpointing: bool = False, fake: bool = False, frozen: bool = False
) -> dict[str, Any]:
    """Figures of the second step of a tiny Wan: the first has built layouts and gradients' buffers."""
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs, batch=2)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext() as mode:
        if mode is not None:
            model.to_empty(device="cpu")
            values = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.requires_grad_(not frozen)
        patch = None
        if method is not None:
            patch = vsparse.apply(model, method, schedule=vsparse.Schedule(), **_options(method))
            for parameter in patch.parameters():
                parameter.requires_grad_(True)
        loss_of(model, patch, values).backward()
        model.zero_grad()
        with still(), Meter() as meter, meter.at(patch.sites if patch else ()):
            loss = loss_of(model, patch, values)
            saved = meter.alive
            loss.backward()
            del loss
            gradients = sum(x.grad.nbytes for x in model.parameters() if x.grad is not None)
            return {"saved": saved, "peak": meter.peak, "left": meter.alive - gradients, **meter.flops}


def _options(method: str) -> dict[str, Any]:
    return {key: value for key, value in rows.METHODS[method].sparse.items() if key != "schedule"}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [None, "vsa", "vmoba", "dsv"])
def test_without_values_it_counts_the_same(method: str | None, checkpointing: bool) -> None:
    assert step(method, checkpointing=checkpointing, fake=True) == step(method, checkpointing=checkpointing)


def test_bytes_are_those_that_autograd_saves() -> None:
    """Of a dense model: every storage that a hook of autograd sees, the model's own aside, and the loss."""
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs, batch=2)
    known = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    known |= {x.untyped_storage()._cdata for x in values.values() if isinstance(x, Tensor)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return x

    with still(), Meter() as meter, saved_tensors_hooks(keep, lambda x: x):
        loss = model(**values)[0].square().mean()
        alive = meter.alive
    assert alive == sum(storage.nbytes() for storage in kept.values()) + loss.nbytes


@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_step_keeps_no_more_than_a_dense_one(method: str) -> None:
    """Up to one attention output for each layer for the lists, LSE and means, and one more for a second branch."""
    dense = step(None), step(None, checkpointing=True)
    found = step(method), step(method, checkpointing=True)
    layers, output = 2, 2 * 84 * 2 * 16 * 4
    outputs = {"vsa": 2, "sla": 3}.get(method, 1)
    assert found[0]["saved"] < dense[0]["saved"] + layers * outputs * output
    assert found[1]["peak"] < dense[1]["peak"] + outputs * output


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_leaves_gradients_and_nothing_else(method: str, frozen: bool) -> None:
    """What a recomputation stages must go: a loss would hold its whole graph until the next call."""
    if frozen and method not in ("vsa", "sla", "dsv"):
        pytest.skip("nothing to train")
    plain, again = (step(method, checkpointing=x, frozen=frozen)["left"] for x in (False, True))
    assert again <= plain


def test_flops_of_a_dense_model() -> None:
    """Products as PyTorch counts them; of fused attention on the CPU it knows nothing, so that is a closed form."""
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs, batch=2)
    with FlopCounterMode(display=False) as counter:
        model(**values)[0].square().mean().backward()
    found = step(None)
    assert found["layers"] == counter.get_total_flops()
    tokens, text = 84, values["encoder_hidden_states"].shape[1]
    forward = 2 * sum(4 * 2 * 2 * tokens * keys * 16 for keys in (tokens, text))  # layers; batch, heads, width
    assert found["attention"] == 3.5 * forward
    assert found["method"] == 0
    assert step(None, checkpointing=True)["attention"] == 4.5 * forward


def test_forward_flops_are_those_of_attention_written_out() -> None:
    """PyTorch counts attention where it is plain products."""
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs, batch=2)
    with torch.no_grad(), Meter() as meter:
        model(**values)
    by_products = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), by_products, FlopCounterMode(display=False) as counter:
        model(**values)
    assert sum(meter.flops.values()) == counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_vsa(checkpointing: bool) -> None:
    """Sparse attention by slots and density; the method's part by hand: scores, coarse output and gate."""
    dense, found = step(None, checkpointing=checkpointing), step("vsa", checkpointing=checkpointing)
    options = _options("vsa")
    layout = TileLayout(vsparse.Grid(t=4, h=3, w=7), tile=options["tile"], block=options["block"])
    batch, heads, width, dim, layers, text = 2, 2, 16, 32, 2, 16
    again = int(checkpointing)
    cross = 4 * batch * heads * 84 * text * width * layers * (3.5 + again)
    site = vsparse.list_methods()["vsa"](**options).predicted_density(layout, None)  # type: ignore[arg-type]
    sparse = 4 * batch * heads * layout.slots**2 * width * site * layers * (3.5 + again)
    assert found["attention"] == pytest.approx(cross + sparse, rel=1e-12, abs=0)
    assert found["layers"] == dense["layers"]
    coarse = 4 * batch * heads * layout.video_tiles**2 * width
    gate = 2 * batch * 84 * dim**2
    # Forward, once more for the backward (of the coarse output only the scores), two products for each one in the
    # backward; and again where blocks are recomputed.
    assert found["method"] == layers * ((3.5 + again) * coarse + (4 + again) * gate)
