"""What else people do to a diffusers model, before and after the patch: both orders work, and undo stays exact."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch
from safetensors import safe_open
from torch import nn

import vsparse
from vsparse.integrations.diffusers import placement

ORDER = pytest.mark.parametrize("order", ["before", "after"])
METHOD = pytest.mark.parametrize("method", rows.METHODS)
HOST = pytest.mark.parametrize("host", rows.HOSTS)
GATE = r".*\.vsparse\..*"


@contextlib.contextmanager
def patched(model: Any, method: str, order: str, change: Callable[[], object]) -> Iterator[vsparse.Patch]:
    """A patch with a change made before or after it."""
    if order == "before":
        change()
    with rows.randomise(vsparse.apply(model, method, **rows.METHODS[method].sparse)) as patch:
        if order == "after":
            change()
        yield patch


def outputs(patch: vsparse.Patch, model: nn.Module, values: dict[str, Any]) -> list[torch.Tensor]:
    return rows.generation(patch, model, values, steps=4)


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
        outputs(patch, model, values)
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
        wanted = outputs(patch, model, values)
    with patched(model, method, order, lambda: accelerate.cpu_offload_with_hook(model, torch.device("cpu"))) as patch:
        assert all(map(torch.equal, outputs(patch, model, values), wanted))
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
        wanted = outputs(patch, model, values)

    def offload() -> None:
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=False)

    with patched(model, method, order, offload) as patch:
        assert model.blocks[0].attn1.to_q.weight.is_meta
        assert all(map(torch.equal, outputs(patch, model, values), wanted))
    assert torch.equal(rows.forward(model, values), stock)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not list(rows.sites(model))


@ORDER
@METHOD
def test_group_offloading(order: str, method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with patched(model, method, "after", lambda: None) as patch:
        wanted = outputs(patch, model, values)

    def offload() -> None:
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )

    with patched(model, method, order, offload) as patch:
        assert all(map(torch.equal, outputs(patch, model, values), wanted))


def test_ours_stand_on_the_device_that_layers_are_moved_to() -> None:
    """Where an offloader moves single layers, ours would be left behind: they are made where it computes."""
    model, _ = rows.build("wan")
    attention = model.blocks[0].attn1
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    attention.to_q._diffusers_hook.hooks["group_offloading"].group.onload_device = torch.device("meta")
    assert placement(attention) == (torch.device("meta"), torch.float32)
    assert placement(model.blocks[1].attn1) == (cpu, torch.float32)


# ---- storage and projections -------------------------------------------------------------------------------------


@ORDER
@HOST
def test_layerwise_casting(order: str, host: str) -> None:
    """Weights stored in float8 and computed in bfloat16; ours follow the compute dtype."""
    model, inputs = rows.build(host, dtype=torch.bfloat16)
    values = rows.prompt(host, inputs)

    def cast() -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    with patched(model, "vsa", order, cast) as patch:
        assert {x.dtype for x in patch.parameters()} == {torch.bfloat16 if order == "before" else torch.float8_e4m3fn}
        found = rows.forward(model, values)
        # Ours as they were stored, in a host that casts.
        kept = {name: x.detach().bfloat16() for name, x in patch.named_parameters()}
    stock = rows.forward(model, values)
    with vsparse.apply(model, "vsa", **rows.METHODS["vsa"].sparse) as patch, torch.no_grad():
        for name, parameter in patch.named_parameters():
            parameter.copy_(kept[name])
        assert torch.equal(rows.forward(model, values), found)
    assert not torch.equal(found, stock)


@ORDER
@METHOD
def test_fused_projections(order: str, method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    stock = rows.forward(model, values)
    with patched(model, method, "after", lambda: None) as patch:
        outputs(patch, model, values)
    model.fuse_qkv_projections()
    fused = rows.forward(model, values)
    with patched(model, method, "after", lambda: None) as patch:
        wanted = outputs(patch, model, values)
    model.unfuse_qkv_projections()
    with patched(model, method, order, lambda: model.fuse_qkv_projections()) as patch:
        assert model.blocks[0].attn1.fused_projections
        assert all(map(torch.equal, outputs(patch, model, values), wanted))
    assert torch.equal(rows.forward(model, values), fused)
    model.unfuse_qkv_projections()
    assert torch.equal(rows.forward(model, values), stock)


@pytest.mark.skipif("cogvideox" not in rows.HOSTS, reason="CogVideoX is not in the host table")
@ORDER
def test_fused_projections_that_replace_processors(order: str) -> None:
    """CogVideoX exchanges all processors when it fuses: before the patch that is fine, after it we say so."""
    model, inputs = rows.build("cogvideox")
    values = rows.prompt("cogvideox", inputs)
    stock = rows.forward(model, values)
    if order == "before":
        model.fuse_qkv_projections()
        fused = rows.forward(model, values)
        with vsparse.apply(model, "vsa", density=1.0):
            rows.forward(model, values)
        assert torch.equal(rows.forward(model, values), fused)
        model.unfuse_qkv_projections()
    else:
        patch = vsparse.apply(model, "vsa")
        model.fuse_qkv_projections()
        with pytest.raises(NotImplementedError, match="replaced by FusedCogVideoXAttnProcessor2_0 after apply"):
            rows.forward(model, values)
        patch.remove()
        rows.forward(model, values)
        model.unfuse_qkv_projections()
    assert torch.equal(rows.forward(model, values), stock)
    assert {type(x.processor).__module__ for x in model.modules() if hasattr(x, "processor")} == {
        "diffusers.models.attention_processor"
    }


# ---- saves -------------------------------------------------------------------------------------------------------


@HOST
def test_the_hosts_own_save_writes_stock_keys(host: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs)
    stock = rows.forward(model, values)
    with rows.randomise(vsparse.apply(model, "vsa", **rows.METHODS["vsa"].sparse)) as patch:
        wanted = rows.forward(model, values)
        with caplog.at_level(logging.WARNING, logger="vsparse"):
            model.save_pretrained(tmp_path / "model")
        heard = [record.getMessage() for record in caplog.records if record.name == "vsparse"]
        assert heard == [
            f"save_pretrained left out {len(patch.parameters())} tensors of the vsparse patch; "
            "patch.save(directory) writes them"
        ]
        assert torch.equal(rows.forward(model, values), wanted)
        assert any(".vsparse." in name for name in model.state_dict())
    with safe_open(next((tmp_path / "model").glob("*.safetensors")), "pt") as content:
        assert set(content.keys()) == set(model.state_dict())
    # A copy, because weights that lie mapped in a file have another alignment, and with it another rounding.
    fresh = copy.deepcopy(type(model).from_pretrained(tmp_path / "model")).eval()
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert torch.equal(rows.forward(fresh, values), stock)


def test_a_failing_save_keeps_the_patch(tmp_path: Path) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    (tmp_path / "file").write_text("")
    with vsparse.apply(model, "vsa", **rows.METHODS["vsa"].sparse):
        wanted = rows.forward(model, values)
        with pytest.raises(Exception):  # noqa: B017, PT011 whatever the host raises
            model.save_pretrained(tmp_path / "file" / "below")
        assert len(list(rows.sites(model))) == 2
        assert torch.equal(rows.forward(model, values), wanted)


def test_a_pipeline_saves_stock_weights(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    built = tiny_pipelines.wan()
    stock = built[0].transformer.state_dict()
    with rows.randomise(vsparse.apply(built[0], "vsa")):
        built[0].save_pretrained(tmp_path)
    with safe_open(next((tmp_path / "transformer").glob("*.safetensors")), "pt") as content:
        assert set(content.keys()) == set(stock)
    stored = DiffusionPipeline.from_pretrained(tmp_path).transformer.state_dict()
    assert list(stored) == list(stock)
    assert all(torch.equal(stored[name], stock[name]) for name in stock)


def test_a_training_checkpoint_keeps_ours() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with rows.randomise(vsparse.apply(model, "vsa", **rows.METHODS["vsa"].sparse)):
        wanted, weights = rows.forward(model, values), model.state_dict()
    other, _ = rows.build("wan", seed=9)
    with vsparse.apply(other, "vsa", **rows.METHODS["vsa"].sparse):
        other.load_state_dict(weights)
        assert torch.equal(rows.forward(other, values), wanted)


# ---- moves -------------------------------------------------------------------------------------------------------


@METHOD
def test_dtype_changed_while_patched(method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    stock = rows.forward(model, values)
    with rows.randomise(vsparse.apply(model, method, **rows.METHODS[method].sparse)) as patch:
        outputs(patch, model, values)
        model.double()
        assert {x.dtype for x in patch.parameters()} <= {torch.float64}
        wide = rows.cast_inputs(values, torch.float64)
        assert outputs(patch, model, wide)[-1].dtype == torch.float64
        model.float()
    assert torch.equal(rows.forward(model, values), stock)


@METHOD
def test_autocast(method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with rows.randomise(vsparse.apply(model, method, **rows.METHODS[method].sparse)) as patch:
        exact = outputs(patch, model, values)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            half = outputs(patch, model, values)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        stock = rows.forward(model, values)
    assert half.dtype == stock.dtype
    assert float((half - exact).abs().max()) < 0.5 * float(exact.abs().max())


@METHOD
def test_inference_mode_does_not_poison_training(method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    phase = rows.sparse_phases(method)[-1]

    def train(patch: vsparse.Patch) -> dict[str, torch.Tensor]:
        (out,) = rows.walk(patch, phase, lambda *_: model(**values)[0], ["cond"])
        out.square().sum().backward()
        return rows.gradients(model)

    with rows.randomise(vsparse.apply(model, method, **rows.METHODS[method].sparse)) as patch:
        wanted = train(patch)
    with torch.inference_mode():
        patch = vsparse.apply(model, method, **rows.METHODS[method].sparse)
        outputs(patch, model, values)
    rows.randomise(patch)
    found = train(patch)
    patch.remove()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_state_found_in_inference_mode_can_be_trained_on() -> None:
    """A map searched in inference mode is reused where gradients are recorded."""
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with vsparse.apply(model, "adaspa", **rows.METHODS["adaspa"].sparse) as patch, patch.generation(rows.STEPS):
            with mode(), patch.step(1):
                model(**values)
            for step in (2, 5):
                with patch.step(step):
                    model(**values)[0].square().sum().backward()
        found.append(rows.gradients(model))
    assert all(torch.equal(found[1][name], x) for name, x in found[0].items())
