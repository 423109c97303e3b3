"""Weights that are cast, fused, saved or moved, before and after the patch."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import rows
import tiny_pipelines
import torch
from rows import patched
from safetensors import safe_open

import vsparse

ORDER = pytest.mark.parametrize("order", ["before", "after"])
METHOD = pytest.mark.parametrize("method", rows.METHODS)
HOST = pytest.mark.parametrize("host", rows.HOSTS)


# ---- storage and projections -------------------------------------------------------------------------------------


@ORDER
@pytest.mark.parametrize(
    ("host", "method"), [*((host, "vsa") for host in rows.HOSTS), *(("wan", key) for key in ("dsv", "sla"))]
)
def test_layerwise_casting(order: str, host: str, method: str) -> None:
    """Weights stored in float8 and computed in bfloat16; ours follow the compute dtype."""
    model, inputs = rows.build(host, dtype=torch.bfloat16)
    values = rows.prompt(host, inputs)

    def cast() -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    with patched(model, method, order, cast) as patch:
        assert {x.dtype for x in patch.parameters()} == {torch.bfloat16 if order == "before" else torch.float8_e4m3fn}
        found = rows.forward(model, values)
        # Ours as they were stored, in a host that casts.
        kept = {name: x.detach().bfloat16() for name, x in patch.named_parameters()}
    stock = rows.forward(model, values)
    with vsparse.apply(model, method, **rows.METHODS[method].sparse) as patch, torch.no_grad():
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
        rows.generation(patch, model, values, steps=4)
    model.fuse_qkv_projections()
    fused = rows.forward(model, values)
    with patched(model, method, "after", lambda: None) as patch:
        wanted = rows.generation(patch, model, values, steps=4)
    model.unfuse_qkv_projections()
    with patched(model, method, order, lambda: model.fuse_qkv_projections()) as patch:
        assert model.blocks[0].attn1.fused_projections
        assert all(map(torch.equal, rows.generation(patch, model, values, steps=4), wanted))
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
        rows.generation(patch, model, values, steps=4)
        model.double()
        assert {x.dtype for x in patch.parameters()} <= {torch.float64}
        wide = rows.cast_inputs(values, torch.float64)
        assert rows.generation(patch, model, wide, steps=4)[-1].dtype == torch.float64
        model.float()
    assert torch.equal(rows.forward(model, values), stock)


@METHOD
def test_autocast(method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with rows.randomise(vsparse.apply(model, method, **rows.METHODS[method].sparse)) as patch:
        exact = rows.generation(patch, model, values, steps=4)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            half = rows.generation(patch, model, values, steps=4)[-1]
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
        rows.generation(patch, model, values, steps=4)
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
