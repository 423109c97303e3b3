"""What else people do to a diffusers model, before and after the patch: both orders work, and undo stays exact."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch
from rows import patched

import vsparse
from vsparse.integrations.diffusers import placement

ORDER = pytest.mark.parametrize("order", ["before", "after"])
METHOD = pytest.mark.parametrize("method", rows.METHODS)
HOST = pytest.mark.parametrize("host", rows.HOSTS)
GATE = r".*\.vsparse\..*"


# ---- LoRA --------------------------------------------------------------------------------------------------------


def _lora(model: Any, targets: Any = ("to_q", "to_k", "to_v", "to_out.0"), **options: Any) -> None:
    """An adapter whose two factors are not zero."""
    from peft import LoraConfig

    targets = list(targets) if isinstance(targets, tuple) else targets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)


@HOST
def test_lora_before_and_after_are_the_same(host: str) -> None:
    found = {}
    for order in ("before", "after"):
        model, inputs = rows.build(host)
        values = rows.prompt(host, inputs)
        plain = rows.forward(model, values)
        with patched(model, "vsa", order, lambda m=model: _lora(m)) as patch:
            trained = [name for name, x in model.named_parameters() if x.requires_grad]
            found[order] = rows.forward(model, values)
            assert any("lora" in name for name in trained)
            assert not any(".vsparse." in name and "lora" in name for name in trained)
            model.disable_adapters()
            off = rows.forward(model, values)
            model.enable_adapters()
            assert torch.equal(rows.forward(model, values), found[order])
        with_lora = rows.forward(model, values)
        assert not torch.equal(with_lora, plain)
        model.delete_adapters("default")
        assert torch.equal(rows.forward(model, values), plain)
        with rows.randomise(vsparse.apply(model, "vsa", **rows.METHODS["vsa"].sparse)):
            assert torch.equal(off, rows.forward(model, values))
        del patch
    assert torch.equal(found["before"], found["after"])


@METHOD
def test_lora_stays_when_the_patch_goes(method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    _lora(model)
    mark, wanted = rows.footprint(model), rows.forward(model, values)
    with vsparse.apply(model, method, **rows.METHODS[method].sparse) as patch:
        rows.generation(patch, model, values, steps=4)
    assert rows.footprint(model) == mark
    assert torch.equal(rows.forward(model, values), wanted)


@pytest.mark.parametrize("excluded", [True, False])
def test_all_linear_lora_wraps_our_gate_unless_excluded(excluded: bool) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    plain = rows.forward(model, values)
    patch = vsparse.apply(model, "vsa", **rows.METHODS["vsa"].sparse)
    names = [name for name, _ in patch.named_parameters()]
    _lora(model, "all-linear", **({"exclude_modules": GATE} if excluded else {}))
    wrapped = [name for name, module in model.named_modules() if "vsparse" in name and hasattr(module, "lora_A")]
    assert bool(wrapped) is not excluded
    if excluded:
        assert [name for name, _ in patch.named_parameters()] == names
    rows.forward(model, values)
    patch.remove()
    assert not list(rows.sites(model))
    assert rows.forward(model, values).isfinite().all()
    model.delete_adapters("default")
    assert torch.equal(rows.forward(model, values), plain)


def test_a_gate_under_lora_is_saved_without_it(tmp_path: Path) -> None:
    model, _ = rows.build("wan")
    with rows.randomise(vsparse.apply(model, "vsa")) as patch:
        kept = {name: x.detach().clone() for name, x in patch.named_parameters()}
        ids = {name: id(x) for name, x in patch.named_parameters()}
        patch.save(tmp_path / "plain")
        _lora(model, "all-linear")
        assert {name: id(x) for name, x in patch.named_parameters()} == ids
        patch.save(tmp_path / "wrapped")
    for folder in ("plain", "wrapped"):
        with vsparse.load(rows.build("wan")[0], tmp_path / folder) as patch:
            assert all(torch.equal(x, kept[name]) for name, x in patch.named_parameters())


def test_a_pipelines_lora_weights_load_into_a_patched_model(tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    pipe = tiny_pipelines.wan()[0]
    _lora(pipe.transformer)
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    found = []
    for order in ("before", "after"):
        built = tiny_pipelines.wan()
        pipe = built[0]
        with patched(pipe, "vsa", order, functools.partial(pipe.load_lora_weights, tmp_path)):
            found.append(tiny_pipelines.run(built))
            pipe.fuse_lora()
            found.append(tiny_pipelines.run(built))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


# ---- offloading --------------------------------------------------------------------------------------------------


@ORDER
@METHOD
def test_offloaded_by_accelerate_as_a_whole(order: str, method: str) -> None:
    """What ``enable_model_cpu_offload`` does to each model."""
    import accelerate

    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    stock = rows.forward(model, values)
    with patched(model, method, "after", lambda: None) as patch:
        wanted = rows.generation(patch, model, values, steps=4)
    with patched(model, method, order, lambda: accelerate.cpu_offload_with_hook(model, torch.device("cpu"))) as patch:
        assert all(map(torch.equal, rows.generation(patch, model, values, steps=4), wanted))
        assert hasattr(model, "_hf_hook")
    assert torch.equal(rows.forward(model, values), stock)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not list(rows.sites(model))
    assert torch.equal(rows.forward(model, values), stock)


@ORDER
def test_a_pipeline_with_model_offload(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``enable_model_cpu_offload`` with the CPU as the accelerator; it ends a run by tearing all hooks out."""
    built = tiny_pipelines.wan()
    pipe = built[0]
    stock = tiny_pipelines.run(built)
    with vsparse.apply(pipe, "adaspa", block=4):
        wanted = tiny_pipelines.run(built)
    monkeypatch.setattr(torch, "cpu", _Cpu())
    if order == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    with vsparse.apply(pipe, "adaspa", block=4) as patch:
        if order == "after":
            pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert torch.equal(tiny_pipelines.run(built), wanted)
            assert patch.stats()["state_bytes"] == 0
    assert torch.equal(tiny_pipelines.run(built), stock)
    pipe.remove_all_hooks()
    assert torch.equal(tiny_pipelines.run(built), stock)


class _Cpu:
    def __getattr__(self, name: str) -> Any:
        import torch.cpu as real

        return getattr(real, name)

    @staticmethod
    def empty_cache() -> None: ...


@ORDER
@METHOD
def test_offloaded_piece_by_piece(order: str, method: str) -> None:
    """``enable_sequential_cpu_offload``: between calls the weights are on the meta device."""
    import accelerate

    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    stock = rows.forward(model, values)
    with patched(model, method, "after", lambda: None) as patch:
        wanted = rows.generation(patch, model, values, steps=4)

    def offload() -> None:
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=False)

    with patched(model, method, order, offload) as patch:
        assert model.blocks[0].attn1.to_q.weight.is_meta
        assert all(map(torch.equal, rows.generation(patch, model, values, steps=4), wanted))
    assert torch.equal(rows.forward(model, values), stock)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not list(rows.sites(model))


@ORDER
@METHOD
def test_group_offloading(order: str, method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with patched(model, method, "after", lambda: None) as patch:
        wanted = rows.generation(patch, model, values, steps=4)

    def offload() -> None:
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )

    with patched(model, method, order, offload) as patch:
        assert all(map(torch.equal, rows.generation(patch, model, values, steps=4), wanted))


def test_ours_stand_on_the_device_that_layers_are_moved_to() -> None:
    """Where an offloader moves single layers, ours would be left behind: they are made where it computes."""
    model, _ = rows.build("wan")
    attention = model.blocks[0].attn1
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    attention.to_q._diffusers_hook.hooks["group_offloading"].group.onload_device = torch.device("meta")
    assert placement(attention) == (torch.device("meta"), torch.float32)
    assert placement(model.blocks[1].attn1) == (cpu, torch.float32)
