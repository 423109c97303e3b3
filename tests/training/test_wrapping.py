"""Patches and wrappers for several processes: the order that trains right works, the other one is refused in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rows
import torch
from processes import full
from torch import nn

import vsparse
from vsparse.wrapping import is_sharded

# What Wan returns is a view; nothing here writes into it.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")

VSA = rows.METHODS["vsa"].sparse
NABLA = {**rows.METHODS["nabla"].sparse, "schedule": vsparse.Schedule()}


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone: enough to wrap, and to refuse."""
    store = tmp_path_factory.mktemp("world") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))  # type: ignore[return-value]


def host() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = rows.build("wan")
    return model.train(), rows.prompt("wan", inputs)


def backward(model: nn.Module, values: dict[str, Any]) -> None:
    model(**values)[0].square().mean().backward()


def test_a_wrapper_is_not_patched() -> None:
    model, _ = host()
    for wrapper in (ddp(model), nn.DataParallel(model)):
        with pytest.raises(ValueError, match=r"DataParallel wraps a WanTransformer3DModel: call vsparse\.apply on"):
            vsparse.apply(wrapper, "vsa", **VSA)
    assert vsparse.patch_of(model) is None


def test_ddp_before_parameters_is_refused_when_it_trains() -> None:
    """DDP would leave the gates of each process to themselves. Without gradients nothing is lost, and once the patch
    is gone, or stands inside a new wrapper, training goes on."""
    model, values = host()
    wrapper = ddp(model)
    patch = vsparse.apply(model, "vsa", **VSA)
    count = len(patch.parameters())
    with pytest.raises(
        ValueError, match=rf"DistributedDataParallel was put around .* added {count} parameters of 'vsa'"
    ):
        wrapper(**values)
    with torch.no_grad():
        wrapper(**values)
    backward(model, values)
    backward(ddp(model), values)
    patch.remove()
    backward(ddp(model), values)


def test_frozen_parts_need_no_ddp() -> None:
    model, values = host()
    wrapper = ddp(model)
    patch = vsparse.apply(model, "vsa", **VSA)
    for parameter in patch.parameters():
        parameter.requires_grad_(False)
    backward(wrapper, values)


def test_fully_shard_before_parameters_is_refused() -> None:
    """At once, and nothing is changed."""
    model, values = host()
    sharded(model)
    before = rows.footprint(model)
    with pytest.raises(ValueError, match=r"transformer: sharded already, and 'vsa' adds [\d,]+ parameters"):
        vsparse.apply(model, "vsa", **VSA)
    assert rows.footprint(model) == before
    backward(model, values)


@pytest.mark.parametrize("wrap", [ddp, sharded])
def test_methods_without_parameters_come_in_any_order(wrap: Any) -> None:
    """The same gradients whether the wrapper comes first or last."""
    found = []
    for first in (True, False):
        model, values = host()
        called = wrap(model) if first else model
        patch = vsparse.apply(model, "nabla", **NABLA)
        called = called if first else wrap(model)
        backward(called, values)
        density = patch.stats()["sparse_density"]
        assert density < 1
        found.append({name: full(x) for name, x in rows.gradients(model).items()})
        patch.remove()
        backward(called, values)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_parts_are_loaded_before_and_after_sharding(tmp_path: Path) -> None:
    model, _ = host()
    rows.randomise(vsparse.apply(model, "vsa", **VSA)).save(tmp_path / "parts")
    wanted = dict(vsparse.patch_of(model).named_tensors())  # type: ignore[union-attr]
    for late in (False, True):
        model, values = host()
        patch = vsparse.apply(model, "vsa", **VSA) if late else vsparse.load(model, tmp_path / "parts")
        sharded(model)
        if late:
            vsparse.load(model, tmp_path / "parts")
        assert all(map(is_sharded, patch.parameters()))
        found = {name: full(x) for name, x in patch.named_tensors()}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        backward(model, values)
        assert all(float(full(x.grad).abs().max()) > 0 for x in patch.parameters())
