"""The loop on two processes: copies or shards, torn and resumed, with what a method hands out beside the output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Get
from safetensors.torch import load_file

MODES = ("ddp", "fsdp2")


def train(folder: str, mode: str, method: str, *, stop: int | None, accumulate: int) -> list[float]:
    import rows
    import tiny

    import vsparse
    from vsparse.training.loop import Trainer, TrainSettings, make_accelerator
    from vsparse.training.objective import FlowMatching
    from vsparse.training.optimisers import OptimiserSettings
    from vsparse.training.task import Denoising, Sample

    if mode != "alone":
        rank = torch.distributed.get_rank()
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
        os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="localhost")
    accelerator = make_accelerator()
    assert accelerator.num_processes == (1 if mode == "alone" else 2)
    model, inputs = tiny.wan()
    patch = vsparse.apply(model, method, schedule=vsparse.Schedule(), **rows.METHODS[method].sparse)
    rows.randomise(patch)
    empty = {"encoder_hidden_states": torch.zeros(1, 16, tiny.TEXT_DIM)}

    def source(first: int, last: int) -> Iterator[Sample]:
        for step in range(first, last):
            for micro in range(accumulate):
                number = (step * accumulate + micro) * accelerator.num_processes + accelerator.process_index
                values = inputs(1, rows.SMALL, seed=number)
                text = {"encoder_hidden_states": values["encoder_hidden_states"]}
                yield Sample(latents=values["hidden_states"], text=text, name=str(number))

    def forward(network: Any, noisy: Any, timestep: Any, text: Any) -> Any:
        return network(hidden_states=noisy, timestep=timestep, **text, return_dict=False)[0]

    losses: list[float] = []

    def progressed(done: int, figures: Any) -> None:
        losses.append(figures["data"])
        if done == stop:
            raise KeyboardInterrupt

    task = Denoising(
        forward=forward, objective=FlowMatching(), source=source, empty=empty, empty_captions=0.5,
        extra=patch.auxiliary_losses,
    )  # fmt: skip
    mine = {id(x) for x in patch.parameters()}
    run = Trainer(
        model,
        task,
        settings=TrainSettings(
            steps=4, accumulate=accumulate, precision="fp32", average=0.9, save_every=2, shard=mode == "fsdp2"
        ),
        optimiser=OptimiserSettings(learning_rate=1e-3),
        folder=Path(folder),
        identity={},
        added=[name for name, x in model.named_parameters() if id(x) in mine],
        accelerator=accelerator,
        progressed=progressed,
    )
    try:
        run.run()
    except KeyboardInterrupt:
        assert stop is not None
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["vsa", "dsv"])
def test_a_torn_run_of_two_processes_ends_as_the_whole_one(pool: Get, tmp_path: Path, mode: str, method: str) -> None:
    """Files of checkpoints are equal byte for byte; the losses are those of one process that accumulates."""
    first, second = pool().run(_spread, str(tmp_path / "whole"), mode, method, None)
    assert first == second
    pool().run(_spread, str(tmp_path / "torn"), mode, method, 3)
    again, _ = pool().run(_spread, str(tmp_path / "torn"), mode, method, None)
    assert again == first[2:]
    names = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")}
    assert len(names) == (4 if mode == "fsdp2" else 2)
    for name in names:
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    alone = train(str(tmp_path / "alone"), "alone", method, stop=1, accumulate=2)
    assert first[0] == alone[0]


def _spread(folder: str, mode: str, method: str, stop: int | None) -> list[float]:
    return train(folder, mode, method, stop=stop, accumulate=1)


@pytest.mark.slow
def test_a_run_of_two_processes_is_not_resumed_by_one(pool: Get, tmp_path: Path) -> None:
    pool().run(_spread, str(tmp_path), "ddp", "vsa", 3)
    with pytest.raises(ValueError, match="2 processes wrote it, this run has 1"):
        train(str(tmp_path), "alone", "vsa", stop=None, accumulate=1)
    assert load_file(tmp_path / "step-00000002" / "state-00000.safetensors")
