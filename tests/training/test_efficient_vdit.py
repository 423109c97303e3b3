"""The three stages of Efficient-vDiT on a tiny pipeline, in both orders, interrupted and not."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vsparse.host import training_host
from vsparse.methods.attention_tile import AttentionTile
from vsparse.patch import Patch
from vsparse.training import loop
from vsparse.training.draws import Draws
from vsparse.training.efficient_vdit import EfficientVDiT, efficient_vdit
from vsparse.training.loop import TrainSettings
from vsparse.training.objective import objective_of
from vsparse.training.optimisers import OptimiserSettings
from vsparse.training.task import Denoising, Sample


class Torn(Exception):  # noqa: N818 (no error: the power goes)
    pass


def run(folder: Path, *, torn: bool = False, **recipe: Any) -> tuple[Patch, dict[str, Tensor]]:
    """The recipe on a fresh pipeline, two steps for each distillation; torn: the power goes in the second of them."""
    pipe, call = tiny_pipelines.wan()
    side = training_host(pipe)
    latents = Draws(("latents",)).normal(torch.empty(2, tiny_pipelines.LATENT, 3, 16, 16))
    sample = Sample(latents=latents, text=side.encode_text(["a cat", "a dog"]), name="noise")
    begun: list[int] = []

    def source(first: int, last: int) -> list[Sample]:
        begun.append(first)
        if torn and len(begun) == 2:
            raise Torn
        return [sample] * (last - first)

    task = Denoising(
        forward=side.forward,
        objective=objective_of(pipe.scheduler),
        source=source,
        empty=side.encode_text([""]),
        empty_captions=0.0,
    )

    patch = efficient_vdit(
        pipe,
        task,
        EfficientVDiT(**{"steps": 2, "bound": 1e9, "guidance": 3.0, "block": 16, "samples": 2, **recipe}),
        calibrate=lambda: pipe(**call, generator=torch.Generator().manual_seed(0)),
        consistency=TrainSettings(steps=2, precision="fp32", average=0.9, log_every=1),
        attention=TrainSettings(steps=2, precision="fp32", log_every=1),
        optimiser=OptimiserSettings(learning_rate=1e-3),
        folder=folder,
        copy="device",
    )
    return patch, {name: x.detach().clone() for name, x in pipe.transformer.named_parameters()}


def losses(folder: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["consistency", "attention"])
def test_either_order_goes_on_after_an_interruption(tmp_path: Path, first: Any) -> None:
    """The search is within a bound that nothing exceeds, and so finds one global frame for each layer."""
    patch, weights = run(tmp_path / "whole", first=first)
    assert patch.plan.method == AttentionTile(global_frames=(1, 1), block=16)
    for stage in ("consistency", "attention"):
        rows = losses(tmp_path / "whole", stage)
        assert [row["step"] for row in rows] == [1, 2]
        assert all(row["loss"] == row[stage] > 0 for row in rows)
    with pytest.raises(Torn):
        run(tmp_path / "torn", first=first, torn=True)
    assert losses(tmp_path / "torn", first)[-1]["step"] == 2
    again, found = run(tmp_path / "torn", first=first)
    assert again.plan.method == patch.plan.method
    assert [name for name, x in weights.items() if not torch.equal(found[name], x)] == []


def test_stages_do_not_meet_in_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    """Each wraps the model anew; what the one before had hung on the parameters is gone."""

    made: list[weakref.ref[nn.Module]] = []

    def wrapped(model: nn.Module, accelerator: Any, *, shard: bool) -> tuple[nn.Module, Any]:
        assert all(one() is None for one in made)
        ddp = DistributedDataParallel(model, static_graph=True)
        made.append(weakref.ref(ddp))
        return ddp, ddp.no_sync

    _, weights = run(tmp_path / "plain")
    monkeypatch.setattr(loop, "spread", wrapped)
    _, found = run(tmp_path / "wrapped")
    assert [name for name, x in weights.items() if not torch.equal(found[name], x)] == []
    assert len(made) == 2


def test_wrong_choices_are_refused() -> None:
    for choice, words in (
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"bound": 0.0}, "bound must be positive, got 0.0"),
        ({"first": "search"}, "first must be 'consistency' or 'attention', got 'search'"),
    ):
        with pytest.raises(ValueError, match=words):
            EfficientVDiT(**{"steps": 2, "bound": 0.3, **choice})  # type: ignore[arg-type]
