"""Predictions against real runs of a tiny model: to the byte, and to the FLOP where something else counts them."""

from __future__ import annotations

import dataclasses as dc
import gc
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from vsparse import cli
from vsparse.host import training_host
from vsparse.measure.meter import Meter
from vsparse.measure.skeleton import skeleton
from vsparse.training.data.buckets import Bucket
from vsparse.training.loop import TrainSettings
from vsparse.training.optimisers import OptimiserSettings, make_optimisers
from vsparse.training.predict import DEVICES, Device, Prediction, predict_step
from vsparse.training.settings import DataSettings, MethodSettings, ModelSettings, Settings
from vsparse.training.student import Student, load_student

BUCKET = Bucket(frames=5, height=32, width=32)
VSA = MethodSettings(key="vsa", options={"density": 0.5, "tile": (1, 4, 4), "block": 16})
DSV = MethodSettings(key="dsv", options={"density": 0.5, "tile": (1, 4, 4), "block": 16, "rank": 4, "rows": 8})
NONE = MethodSettings(key="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predict") / "model"
    tiny_pipelines.wan()[0].save_pretrained(path)
    return path


def settings(folder: Path, what: str, method: MethodSettings, **more: Any) -> Settings:
    model: dict[str, Any] = {"path": str(folder), "train": what, "lora_rank": 4}
    names = {f.name for f in dc.fields(ModelSettings)} - {"train"}
    model |= {key: more.pop(key) for key in list(more) if key in names}
    given: dict[str, Any] = {"train": TrainSettings(steps=1), **more}
    return Settings(
        output="out", model=ModelSettings(**model), data=DataSettings(source="clips", buckets=(BUCKET,), batch=2),
        method=method, **given,
    )  # fmt: skip


def student_of(told: Settings) -> Student:
    """With the dtypes of a GPU, on the CPU."""
    return load_student(told.model, told.method, device=torch.device("cuda"), seed=0)


def blank(student: Student) -> tuple[Any, ...]:
    return training_host(student.pipe).blank(BUCKET.frames, BUCKET.height, BUCKET.width, batch=2)


def step(student: Student, told: Settings, noisy: torch.Tensor, text: Any) -> Any:
    """The loss of a micro-batch, as `predict_step` forms it."""
    side = training_host(student.pipe)
    with torch.autocast("cpu", torch.bfloat16, enabled=told.train.precision == "bf16"):
        found = side.forward(student.transformer, noisy, torch.zeros(2), text)
        extra = student.patch.auxiliary_losses().values() if student.patch else ()
        return sum(extra, (found.float() - noisy).square().mean())


def size(model: nn.Module) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


CASES = {
    "full": ("full", NONE, {}),
    "full, vsa": ("full", VSA, {}),
    "full, vsa, float32": ("full", VSA, {"train": TrainSettings(steps=1, precision="fp32")}),
    "full, muon": ("full", VSA, {"optimiser": OptimiserSettings(name="muon"), "gradient_checkpointing": False}),
    "lora": ("lora", NONE, {"gradient_checkpointing": False}),
    "lora, vsa": ("lora", VSA, {"train": TrainSettings(steps=1, average=0.9)}),
    "lora, dsv, float32 weights": ("lora", DSV, {"frozen": "fp32"}),
    "method": ("method", VSA, {}),
    "two micro-batches": ("full", VSA, {"train": TrainSettings(steps=1, accumulate=2)}),
}


THIN = ("full, vsa", "full, muon", "lora, vsa", "lora, dsv, float32 weights", "two micro-batches")


@pytest.mark.parametrize("name", [x if x in THIN else pytest.param(x, marks=pytest.mark.full) for x in CASES])
def test_it_predicts_what_a_run_takes(folder: Path, name: str) -> None:
    train, method, more = CASES[name]
    told = settings(folder, train, method, **more)
    found = predict_step(told, BUCKET)
    student = student_of(told)
    student.transformer.train()
    inputs = blank(student)
    with torch.no_grad():
        step(student, told, *inputs)  # layouts are built
    saved = 0
    gc.collect()
    with Meter() as meter, meter.at(student.patch.sites if student.patch else ()):
        for _ in range(told.train.accumulate):
            loss = step(student, told, *inputs)
            saved = saved or meter.alive
            loss.backward()
            del loss
    learning = [x for x in student.transformer.parameters() if x.requires_grad]
    optimisers = make_optimisers(student.transformer.named_parameters(), told.optimiser, added=student.added)
    for optimiser in optimisers:
        optimiser.step()
    state = [x for optimiser in optimisers for values in optimiser.state.values() for x in values.values()]
    assert found.weights == size(student.transformer)
    assert found.gradients == sum(x.grad.nbytes for x in learning if x.grad is not None)
    assert found.optimiser == sum(x.nbytes for x in state if isinstance(x, torch.Tensor))
    assert found.average == (found.gradients if told.train.average else 0)
    assert (found.saved, found.step) == (saved, meter.peak)
    assert {part: getattr(found, part) for part in meter.flops} == meter.flops
    held = found.weights + found.optimiser + found.average
    assert found.memory == held + max(found.step, found.gradients + found.update)


def test_flops_of_a_dense_step_are_pytorchs(folder: Path) -> None:
    """Fused attention on the CPU aside, which PyTorch does not count."""
    told = settings(folder, "full", NONE, gradient_checkpointing=False)
    student = student_of(told)
    with FlopCounterMode(display=False) as counter:
        step(student, told, *blank(student)).backward()
    found = predict_step(told, BUCKET)
    assert found.layers == counter.get_total_flops()
    again = predict_step(settings(folder, "full", NONE), BUCKET)
    assert again.attention == found.attention * 4.5 / 3.5
    assert again.saved < found.saved


def test_the_pipeline_is_only_read(folder: Path) -> None:
    pipe = skeleton(str(folder))
    before = dict(pipe.transformer.named_modules())
    predict_step(settings(folder, "lora", VSA), BUCKET, pipe=pipe)
    assert dict(pipe.transformer.named_modules()) == before
    assert {x.device.type for x in pipe.transformer.parameters()} == {"meta"}


def test_refuses_in_words(folder: Path, tmp_path: Path) -> None:
    told = settings(folder, "full", VSA)
    with pytest.raises(ValueError, match="height must be"):
        predict_step(told, dc.replace(BUCKET, height=33))
    with pytest.raises(ValueError, match="has no transformer_2"):
        predict_step(settings(folder, "full", VSA, transformer="transformer_2"), BUCKET)
    pipe, call = tiny_pipelines.hunyuan_video15()
    size = {name: call[name] for name in ("height", "width")}
    with pytest.raises(ValueError, match="HunyuanVideo15Transformer3DModel reads values in its forward"):
        predict_step(told, Bucket(frames=call["num_frames"], **size), pipe=pipe)
    with pytest.raises(ValueError, match="device: sparse must be positive"):
        dc.replace(DEVICES[0], sparse=1.5)


def test_time_and_fit_follow_from_the_rates() -> None:
    made = Prediction(
        weights=10, gradients=4, optimiser=8, average=0, saved=5, step=12, update=4, layers=60.0, attention=30.0,
        method=10.0, sparse=True,
    )  # fmt: skip
    device = Device(name="x", memory=40, peak=100.0, spare=0.25, efficiency=0.5, sparse=0.3)
    assert made.memory == 30
    assert made.fits(device)
    assert not dc.replace(made, average=1).fits(device)
    assert made.seconds(device) == (70 / 0.5 + 30 / 0.3) / 100
    assert dc.replace(made, sparse=False).seconds(device) == (70 + 30) / 0.5 / 100
    assert dc.replace(made, update=20).memory == 10 + 8 + 24


def test_none_takes_no_other_setting() -> None:
    """Comparing it with itself once never ended."""
    with pytest.raises(ValueError, match='key "none" takes no other setting'):
        MethodSettings(key="none", dense_layers=1)


def test_the_command_prints_it_and_leaves(folder: Path, tmp_path: Path) -> None:
    text = f"""output = "{tmp_path / "out"}"
model.path = "{folder}"
train.steps = 2
method = {{ key = "vsa", options = {{ density = 0.5, tile = [1, 4, 4], block = 16 }} }}
distill.velocity = 0.5
[data]
source = "{tmp_path}"
[[data.buckets]]
frames = 5
height = 32
width = 32
"""
    (tmp_path / "run.toml").write_text(text)
    done = CliRunner().invoke(cli.app, ["finetune", str(tmp_path / "run.toml"), "--predict"])
    assert done.exit_code == 0, done.output
    for words in ("5 x 32 x 32", "most at once", "H100, 80 GB", "predicted, not measured", "Distillation is not"):
        assert words in done.output
    assert not (tmp_path / "out").exists()
