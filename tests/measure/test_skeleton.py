"""Models from their configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_pipelines
import torch

import vsparse
from vsparse.measure.skeleton import skeleton


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
