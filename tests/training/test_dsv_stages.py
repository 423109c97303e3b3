"""DSV in the loop: predictors learn beside the model, layers turn sparse by themselves, and nothing is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rows
import torch
from distilling import learnt, one, same, task
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vsparse
from vsparse.methods import SparseAttention
from vsparse.training.loop import Trainer, TrainSettings
from vsparse.training.optimisers import OptimiserSettings

STEPS = 12
Trained = tuple[nn.Module, vsparse.Patch, dict[str, Any]]


def student(**options: Any) -> Trained:
    """A wan whose layers keep three tenths of the tiles once they are sparse."""
    model, inputs = rows.build("wan")
    given = {"density": 0.3, "adaptive": False, "tile": (2, 2, 4), "block": 8, "momentum": 0.5, **options}
    return model.train(), vsparse.apply(model, "dsv", **given), rows.prompt("wan", inputs, batch=2)


def trainer(folder: Path, trained: Trained, *, predictor: float = 1e-2, **options: Any) -> Trainer:
    """The loop with the method's own losses beside the data's."""
    model, patch, values = trained
    return Trainer(
        model,
        task(values, extra=patch.auxiliary_losses),
        settings=TrainSettings(steps=STEPS, precision="fp32", average=0.9, save_every=2),
        optimiser=OptimiserSettings(learning_rate=1e-5, method_learning_rate=predictor),
        added=[name for name, _ in model.named_parameters() if ".vsparse." in name],
        folder=folder,
        identity={},
        **options,
    )


def progress(patch: vsparse.Patch) -> list[Tensor]:
    """Of each site: training calls, average loss, average share of every head."""
    return [x.clone() for name, x in patch.named_tensors() if name.endswith("progress")]


def followed(folder: Path, **options: Any) -> list[list[tuple[float, bool]]]:
    """For each site and step, the average loss after it and whether the site was sparse in it."""
    trained = student(**options)
    patch = trained[1]
    sparse: dict[str, bool] = {}

    def see(site: SparseAttention, args: object, out: Tensor) -> None:
        computed, possible = site.state.staged["pairs"].tolist()
        sparse[site.site.name] = computed < possible

    found: list[list[tuple[float, bool]]] = [[] for _ in patch.sites]

    def note(done: int, figures: object) -> None:
        for site, row, told in zip(patch.sites, found, progress(patch), strict=True):
            row.append((float(told[1]), sparse[site.site.name]))

    for site in patch.sites:
        site.register_forward_hook(see)
    trainer(folder, trained, progressed=note).run()
    return found


def between(folder: Path) -> float:
    """A loss that the predictor's average falls below on the way."""
    averages = [average for average, _ in followed(folder, ready=0.0)[0]]
    assert averages[-1] < averages[0], averages
    return (averages[0] + averages[-1]) / 2


def test_each_layer_turns_sparse_when_its_predictor_is_ready(tmp_path: Path) -> None:
    """Not before, and in the very next step."""
    ready = between(tmp_path / "watched")
    for row in followed(tmp_path / "ready", ready=ready):
        sparse = [x for _, x in row]
        assert sparse == [False, *(average < ready for average, _ in row[:-1])]
    assert not sparse[0]
    assert sparse[-1]


def everything(run: Trainer) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in run._state().tensors()}


class Torn(Exception):  # noqa: N818 (no error: the power goes)
    pass


def tear(at: int) -> Callable[[int, object], None]:
    def progressed(done: int, figures: object) -> None:
        if done == at:
            raise Torn

    return progressed


def test_an_interrupted_run_turns_sparse_at_the_same_step(tmp_path: Path) -> None:
    """Averages, predictor and model are those of the whole run, to the bit."""
    ready = between(tmp_path / "watched")
    whole = trainer(tmp_path / "whole", student(ready=ready))
    whole.run()
    for at in (3, STEPS - 1):
        with pytest.raises(Torn):
            trainer(tmp_path / "torn", student(ready=ready), progressed=tear(at)).run()
    trained = student(ready=ready)
    again = trainer(tmp_path / "torn", trained)
    again.run()
    same(everything(again), everything(whole))
    assert [float(x[0]) for x in progress(trained[1])] == [STEPS, STEPS]
    assert sum(name.endswith("progress") for name in everything(whole)) == 2


def test_two_runs_make_the_published_stages(tmp_path: Path) -> None:
    """Dense until the predictor is good, then sparse from the first step on with a slower one that goes on learning."""
    first = student(stage="dense")
    trainer(tmp_path / "dense", first).run()
    assert first[1].stats()["density"] == 1.0
    first[1].save(tmp_path / "adapter")
    second = student(stage="sparse")
    vsparse.load(second[0], tmp_path / "adapter")
    before = [x.detach().clone() for x in second[1].parameters()]
    assert [torch.equal(x, y) for x, y in zip(before, first[1].parameters(), strict=True)] == [True, True]
    trainer(tmp_path / "sparse", second, predictor=1e-3).run()
    assert second[1].stats()["density"] < 1.0
    assert [float(x[0]) for x in progress(second[1])] == [2 * STEPS, 2 * STEPS]
    assert not any(torch.equal(x, y) for x, y in zip(before, second[1].parameters(), strict=True))


# ---- where its loss goes -------------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(*, wrap: bool = False, extra: bool = True) -> dict[str, Tensor]:
    model, patch, values = student(stage="sparse")
    wrapped = DistributedDataParallel(model, static_graph=True) if wrap else model
    made = task(values, extra=patch.auxiliary_losses if extra else None)
    found = learnt(model, made.loss(wrapped, *one(values), 0)["loss"])
    del found["loss"]
    return found


def test_the_predictors_loss_reaches_the_predictor_alone(alone: None) -> None:
    """And it does so through DDP, which counts on a gradient for every parameter."""
    both, data = gradients(), gradients(extra=False)
    mine = {name for name in both if ".vsparse." in name}
    assert len(mine) == 2
    same({name: x for name, x in both.items() if name not in mine}, data)
    assert all(bool(both[name].any()) for name in mine)
    same(gradients(wrap=True), both)
