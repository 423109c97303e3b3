"""FastWan's gates: both forms of their names, in one file or sharded; what is incomplete or a pickle is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rows
import torch
from refusals import refused
from safetensors.torch import save_file

import vsparse

DIM = 32
PREFIXES = ("blocks.{}.", "blocks.{}.attn1.", "transformer.blocks.{}.")


def _fastwan(form: str, layers: int = 2, seed: int = 3, dim: int = DIM) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {"patch_embedding.weight": torch.zeros(3)}
    for i in range(layers):
        found[form.format(i) + ".weight"] = 0.2 * torch.randn(dim, dim, generator=generator)
        found[form.format(i) + ".bias"] = 0.2 * torch.randn(dim, generator=generator)
    return found


def _sharded(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    """A folder with one tensor in each file, and the index that diffusers writes."""
    folder.mkdir(exist_ok=True)
    home = {name: f"model-{i}.safetensors" for i, name in enumerate(weights)}
    for name, x in weights.items():
        save_file({name: x}, folder / home[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


@pytest.mark.parametrize("form", [prefix + "to_gate_compress" for prefix in PREFIXES])
@pytest.mark.parametrize("shape", ["folder", "file", "shards", "pipeline"])
def test_fastwan_gates_load(form: str, shape: str, tmp_path: Path) -> None:
    weights = _fastwan(form)
    if shape in ("shards", "pipeline"):
        _sharded(weights, tmp_path / "transformer" if shape == "pipeline" else tmp_path)
        (tmp_path / "text_encoder.bin").write_bytes(b"not looked into")
    else:
        save_file(weights, tmp_path / "model.safetensors")
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.load(model, tmp_path / "model.safetensors" if shape == "file" else tmp_path) as patch:
        assert patch.plan.method == vsparse.list_methods()["vsa"]()
        assert len(patch.parameters()) == 4
        for i in range(2):
            gate = model.blocks[i].attn1.vsparse.to_gate_compress
            assert torch.equal(gate.weight, weights[form.format(i) + ".weight"])
            assert torch.equal(gate.bias, weights[form.format(i) + ".bias"])
        loaded = rows.forward(model, values)
    with vsparse.apply(model, "vsa"):
        assert not torch.equal(rows.forward(model, values), loaded)


def test_fastwan_gates_load_into_a_patch_with_another_density(tmp_path: Path) -> None:
    weights = _fastwan("blocks.{}.to_gate_compress")
    save_file(weights, tmp_path / "model.safetensors")
    model, _ = rows.build("wan")
    with vsparse.apply(model, "vsa", density=0.2) as patch:
        assert vsparse.load(model, tmp_path) is patch
        assert torch.equal(
            model.blocks[1].attn1.vsparse.to_gate_compress.bias, weights["blocks.1.to_gate_compress.bias"]
        )


def test_fastwan_gates_of_two_experts(tmp_path: Path) -> None:
    import tiny_pipelines

    pipe = tiny_pipelines.wan(experts=2)[0]
    for i, name in enumerate(("transformer", "transformer_2")):
        weights = _fastwan("blocks.{}.to_gate_compress", seed=i, dim=pipe.transformer.blocks[0].attn1.to_q.in_features)
        _sharded(weights, tmp_path / name)
    with vsparse.load(pipe, tmp_path) as patch:
        assert {name.split(".")[0] for name, _ in patch.named_parameters()} == {"transformer", "transformer_2"}
        assert torch.equal(
            pipe.transformer_2.blocks[1].attn1.vsparse.to_gate_compress.bias, weights["blocks.1.to_gate_compress.bias"]
        )
    with pytest.raises(ValueError, match=r"does not fit this model: missing: transformer_2\."):
        vsparse.load(pipe, tmp_path / "transformer")


def test_an_incomplete_checkpoint_isrefused(tmp_path: Path) -> None:
    """By the index, and where there is none by the names; what holds no gates may be missing."""
    _sharded(_fastwan("blocks.{}.to_gate_compress"), tmp_path)
    (tmp_path / "model-0.safetensors").unlink()
    with vsparse.load(rows.build("wan")[0], tmp_path):
        pass
    (tmp_path / "model-3.safetensors").unlink()
    refused(tmp_path, ValueError, r"index.json names model-3.safetensors, which is not there; .* is incomplete")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    refused(tmp_path, ValueError, "index.json is not a readable index of shards")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, ValueError, r"missing: transformer.blocks.1.attn1.to_gate_compress.weight")


def test_the_same_gates_twice_arerefused(tmp_path: Path) -> None:
    """Two precisions of one checkpoint beside each other."""
    weights = _fastwan("blocks.{}.to_gate_compress")
    save_file(weights, tmp_path / "model.safetensors")
    save_file({name: x.half() for name, x in weights.items()}, tmp_path / "model.fp16.safetensors")
    refused(tmp_path, ValueError, r"holds blocks.0.to_gate_compress.\w+ more than once; name one file")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickled_gates_arerefused(name: str, tmp_path: Path) -> None:
    torch.save(_fastwan("blocks.{}.to_gate_compress"), tmp_path / name)
    words = rf"is stored as a pickle \({name}\), which runs code when it is read; convert it to safetensors"
    refused(tmp_path, ValueError, words)
    refused(tmp_path / name, ValueError, words)


def test_fastwan_gates_that_do_not_fit_arerefused(tmp_path: Path) -> None:
    save_file(_fastwan("blocks.{}.to_gate_compress", layers=3), tmp_path / "model.safetensors")
    refused(tmp_path, ValueError, "unexpected: transformer.blocks.2.attn1.to_gate_compress.bias")
