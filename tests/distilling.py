"""Predictions of tiny hosts, to be distilled: one by hand, and as a task of the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rows
import torch
from oracle import ulp_floor
from torch import Tensor, nn

import vsparse
from vsparse.training.draws import Draws
from vsparse.training.objective import FlowMatching
from vsparse.training.task import Denoised, Denoising, Sample, Teacher

ROUND = ("hidden_states", "timestep", "return_dict")
FLOW = FlowMatching(shift=3.0)


def host(
    name: str, method: str = "attention_tile", *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, vsparse.Patch, dict[str, Any]]:
    """A host in training mode, a patch that drops blocks, and two samples."""
    model, inputs = rows.build(name, dtype=dtype, **options)
    values = rows.prompt(name, inputs, batch=2)
    return model.train(), rows.sparse(model, method, schedule=vsparse.Schedule()), values


def forward(model: nn.Module, noisy: Tensor, timestep: Tensor, text: Mapping[str, Any]) -> Tensor:
    """The host's model call."""
    return model(noisy, timestep=timestep.long(), **text, return_dict=False)[0]  # type: ignore[no-any-return]


def denoised(model: nn.Module, values: dict[str, Any], teacher: Teacher) -> Denoised:
    """One watched prediction."""
    clean = values["hidden_states"]
    noise = Draws(("noise",)).normal(clean)
    times = torch.tensor([0.2, 0.7], dtype=torch.float64)
    noisy, timestep = FLOW.noise(clean, noise, times)
    text = {name: x for name, x in values.items() if name not in ROUND}
    with teacher.watch():
        prediction = forward(model, noisy, timestep, text)
    return Denoised(
        model=model,
        forward=forward,
        clean=clean,
        noise=noise,
        noisy=noisy,
        times=times,
        timestep=timestep,
        text=text,
        prediction=prediction,
        draws=Draws(("teacher",)),
    )


def learnt(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """A loss and its gradients."""
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach(), **{name: x.grad for name, x in model.named_parameters() if x.grad is not None}}


def as_good(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], narrow: Mapping[str, Tensor]) -> None:
    """Float64 results differ from those of the formula by less than the formula in float32 does, or by rounding."""
    assert found.keys() == exact.keys()
    for name, wanted in exact.items():
        gap, known = (float((x.double() - wanted).abs().max()) for x in (found[name], narrow[name]))
        assert gap <= max(known, ulp_floor(wanted)), f"{name}: differs by {gap:.3e}; float32 differs by {known:.3e}"


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, x in wanted.items() if not torch.equal(found[name], x)] == []


def task(values: dict[str, Any], **options: Any) -> Denoising:
    """One batch, over and over."""
    text = {name: x for name, x in values.items() if name not in ROUND}
    sample = Sample(latents=values["hidden_states"], text=text, name="noise")
    given: dict[str, Any] = {"empty": {name: torch.zeros_like(x[:1]) for name, x in text.items()}, **options}
    return Denoising(
        forward=forward,
        objective=FLOW,
        source=lambda first, last: [sample] * (last - first),
        empty_captions=0.0,
        **given,
    )


def one(values: dict[str, Any]) -> tuple[Sample, Draws]:
    (sample,) = task(values).batches(0, 1)
    return sample, Draws((0,))
