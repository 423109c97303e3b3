"""The patch on another device than the CPU: the meta device stands in, where mixing the two raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import rows
import torch

import vsparse
from vsparse import backend


@pytest.fixture(autouse=True)
def _an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing speaks against kernels there; what the ops return comes from their fakes."""
    enabled: Callable[..., bool] = torch.is_autocast_enabled
    monkeypatch.setattr(backend, "reasons", lambda *_, **__: [])
    monkeypatch.setattr(
        backend, "lookup", lambda op, device, *_, **__: backend.Implementation("stand-in", device, print, lambda *_: [])
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind))


# HunyuanVideo reads text lengths, and static patterns are worked out on the CPU: both need values.
@pytest.mark.parametrize("host", ["wan", "wan_vace", "cogvideox"])
@pytest.mark.parametrize("method", ["dense", "vsa", "adaspa", "vmoba"])
def test_every_tensor_lies_where_the_model_does(host: str, method: str) -> None:
    model, inputs = rows.build(host)
    values: dict[str, Any] = rows.prompt(host, inputs, batch=2)
    model.to("meta")
    there = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in values.items()}
    shape = rows.forward(model, there).shape
    with vsparse.apply(model, method, **rows.METHODS[method].sparse) as patch:
        found = rows.tour(patch, model, there)
        assert all(p.device.type == "meta" for p in patch.parameters())
    assert all(x.device.type == "meta" and x.shape == shape for x in found)
