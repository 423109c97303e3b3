"""Models from their configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_pipelines
import torch

import vsparse
from vsparse.measure.checkpoints import CHECKPOINTS
from vsparse.measure.skeleton import pipeline_around, skeleton


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "two-experts"
    tiny_pipelines.wan(experts=2)[0].save_pretrained(path)
    for weights in path.rglob("*.safetensors"):
        weights.unlink()
    return path


def test_pipeline_without_its_weights(folder: Path) -> None:
    pipe = skeleton(str(folder))
    models = (pipe.transformer, pipe.transformer_2, pipe.vae)
    assert {p.device.type for model in models for p in model.parameters()} == {"meta"}
    assert pipe.text_encoder is None
    real, _ = tiny_pipelines.wan(experts=2)
    size = {"height": 32, "width": 32, "num_frames": 5}
    assert str(vsparse.plan(pipe, "vsa", **size)) == str(vsparse.plan(real, "vsa", **size))


def test_transformer_by_folder_and_by_class_name(folder: Path) -> None:
    assert len(skeleton(str(folder / "transformer")).blocks) == 2
    large = skeleton("WanTransformer3DModel")
    assert sum(p.numel() for p in large.parameters()) > 14e9
    assert next(large.parameters()).device == torch.device("meta")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_published_pipeline_without_the_hub(name: str) -> None:
    """The parameters, in billions, are those that its name or its authors give (HunyuanVideo 13, 1.5: 8.3)."""
    pipe = skeleton(name)
    said = {"A14B": 14, "14B": 14, "1.3B": 1.3, "5B": 5, "5b": 5, "2b": 2}
    size = next((n for word, n in said.items() if f"-{word}" in name), 8.3 if "1.5" in name else 13)
    assert type(pipe).__name__ == CHECKPOINTS[name].pipeline
    models = [getattr(pipe, part) for part in CHECKPOINTS[name].parts if part != "vae"]
    assert len(models) == (2 if "A14B" in name else 1)
    for model in models:
        count = sum(p.numel() for p in model.parameters()) / 1e9
        assert 0.8 < count / size < 1.2, count
        assert {p.device.type for p in model.parameters()} == {"meta"}
    made = vsparse.plan(pipe, "vsa", height=704, width=1280, num_frames=81)
    assert not made.skipped
    spatial = 32 if "TI2V-5B" in name else 16
    assert made.grid is not None
    assert (made.grid.h, made.grid.w) == (704 // spatial, 1280 // spatial)


def test_the_pipeline_that_runs_a_transformer() -> None:
    model = skeleton("CogVideoXTransformer3DModel")
    pipe = pipeline_around(model)
    assert type(pipe).__name__ == "CogVideoXPipeline"
    assert pipe.transformer is model
    assert pipe.text_encoder is None
    with pytest.raises(ValueError, match="no text-to-video pipeline is known that runs a Linear"):
        pipeline_around(torch.nn.Linear(1, 1))


def test_refuses_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json or config\.json"):
        skeleton(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="UNet2DModel is not a known transformer; known: WanTransformer3DModel"):
        skeleton(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read it as JSON"):
        skeleton(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder, and not found on the hub"):
        skeleton("nobody/nothing")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(ValueError, match="has no NoSuchPipeline"):
        skeleton(str(tmp_path))
