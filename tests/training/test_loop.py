"""The loop: interrupted and resumed it ends as if nothing had happened; what cannot go on says why, breaks nothing."""

from __future__ import annotations

import dataclasses as dc
import errno
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from vsparse.training import checkpoints
from vsparse.training.diagnosis import NotFiniteError
from vsparse.training.draws import Draws
from vsparse.training.loop import Trainer, TrainSettings
from vsparse.training.optimisers import OptimiserSettings, make_optimisers

RATES = OptimiserSettings(learning_rate=1e-2, schedule="cosine", warmup=2)


def network(width: int = 8) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Dropout(0.25), nn.Linear(width, 4))
    model.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    return model


class Blocks(nn.Module):
    """A network whose matrices have the names of a transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # type: ignore[no-any-return]

    @property
    def seen(self) -> Tensor:
        return self.blocks.seen  # type: ignore[return-value]

    @seen.setter
    def seen(self, value: Tensor) -> None:
        self.blocks.seen = value


@dc.dataclass(frozen=True)
class Regression:
    """Fits a fixed map of random inputs; a micro-batch is its number."""

    accumulate: int = 1
    rows: int = 6
    spoilt: int | None = None

    def batches(self, first: int, last: int) -> range:
        return range(first * self.accumulate, last * self.accumulate)

    def loss(self, model: nn.Module, batch: int, draws: Draws, step: int) -> dict[str, Tensor]:
        x = Draws(("data", batch)).normal(torch.empty(self.rows, 4))
        noise = draws.of("noise").normal(x)
        model.seen += 1  # type: ignore[operator]
        y = model(x + 0.01 * noise)
        return {"loss": (y - x.flip(-1)).square().mean() * (math.nan if batch == self.spoilt else 1.0)}

    def describe(self, batch: int) -> str:
        return f"batch number {batch}"


def trainer(
    folder: Path, task: Any = None, *, model: nn.Module | None = None, rates: Any = RATES, **more: Any
) -> Trainer:
    settings = {"steps": 7, "precision": "fp32", "average": 0.9, "save_every": 2, "log_every": 1, "keep": 2}
    known = {f.name for f in dc.fields(TrainSettings)}
    settings |= {name: more.pop(name) for name in list(more) if name in known}
    given: dict[str, Any] = {"identity": {"data": "numbers"}, **more}
    return Trainer(
        model or network(),
        task or Regression(),
        settings=TrainSettings(**settings),
        optimiser=rates,
        folder=folder,
        **given,
    )


def everything(run: Trainer) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in run._state().tensors()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


class Torn(Exception):  # noqa: N818 (no error: the power goes)
    pass


def tear(at: int) -> Any:
    def progressed(done: int, figures: Any) -> None:
        if done == at:
            raise Torn

    return progressed


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_torn_run_ends_as_the_whole_one(tmp_path: Path, at: int, name: Any) -> None:
    rates = dc.replace(RATES, name=name)
    whole = trainer(tmp_path / "whole", model=Blocks(), rates=rates)
    whole.run()
    with pytest.raises(Torn):
        trainer(tmp_path / "torn", model=Blocks(), rates=rates, progressed=tear(at)).run()
    again = trainer(tmp_path / "torn", model=Blocks(), rates=rates)
    again.run()
    same(everything(again), everything(whole))
    logs = [(tmp_path / kind / "log.jsonl").read_text().splitlines() for kind in ("whole", "torn")]
    assert [json.loads(line)["loss"] for line in logs[1]] == [json.loads(line)["loss"] for line in logs[0]]
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "torn")] == ["step-00000006", "step-00000007"]
    assert [type(x).__name__.lower() for x in again.optimisers] == ["adamw", name][: 1 + (name == "muon")]


def test_two_runs_with_one_seed_are_equal_and_the_seed_matters(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1))]
    before = torch.random.get_rng_state()
    for run in runs:
        run.run()
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator moved"
    first, second, other = (everything(run) for run in runs)
    same(second, first)
    assert not torch.equal(other["model/0.weight"], first["model/0.weight"])


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    """Gradients of three micro-batches of two rows, and of the six rows at once, by the law."""

    class Rows(Regression):
        def loss(self, model: nn.Module, batch: int, draws: Draws, step: int) -> dict[str, Tensor]:
            x = Draws(("data",)).normal(torch.empty(6, 4)).to(next(model.parameters()).dtype)
            mine = x.chunk(self.accumulate)[batch % self.accumulate]
            return {"loss": (model[3](model[0](mine)) - mine.flip(-1)).square().mean()}  # type: ignore[index]

    def parameters(kind: str, accumulate: int, dtype: torch.dtype) -> Tensor:
        rates = OptimiserSettings(learning_rate=1e-2, eps=1.0)
        run = trainer(
            tmp_path / kind, Rows(accumulate), model=network().to(dtype), rates=rates, accumulate=accumulate, steps=1
        )
        run.run()
        return torch.cat([x.detach().flatten() for x in run.plain.parameters()])

    truth = parameters("truth", 1, torch.float64)
    oracle.check("parameters", parameters("three", 3, torch.float32), parameters("one", 1, torch.float32), truth)


def test_the_moving_average_is_what_validation_sees(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def validate(step: int) -> dict[str, float]:
        seen.append(run.plain[0].weight.detach().clone())
        return {"step": float(step)}

    run = trainer(tmp_path, validate=validate, validate_every=3)
    run.run()
    assert len(seen) == 3
    assert torch.equal(seen[-1], run.average.tensors["0.weight"])
    assert not torch.equal(seen[-1], run.plain[0].weight)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["validation/step"] for row in rows if "validation/step" in row] == [3.0, 6.0, 7.0]


def test_a_run_killed_before_its_last_validation_makes_up_for_it(tmp_path: Path) -> None:
    def torn(step: int) -> dict[str, float]:
        raise Torn

    with pytest.raises(Torn):
        trainer(tmp_path, validate=torn).run()
    found: list[int] = []
    run = trainer(tmp_path, validate=lambda step: found.append(step) or {"ok": 1.0})  # type: ignore[func-returns-value]
    run.run()
    assert found == [7]
    trainer(tmp_path, validate=lambda step: found.append(step) or {"ok": 1.0}).run()  # type: ignore[func-returns-value]
    assert found == [7]


def test_nan_stops_names_layer_and_batch_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"step 6: loss nan.*batch number 5.*step-00000004") as caught:
        trainer(tmp_path, Regression(spoilt=5)).run()
    assert "Every layer's output is finite" in str(caught.value)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)][-1] == "step-00000004"

    class Poison(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0.0

    model = network()
    model.insert(1, Poison())
    with pytest.raises(NotFiniteError, match=r"First values that are not finite: 1 \(its output, from finite inputs\)"):
        trainer(tmp_path / "layer", model=model).run()
    assert checkpoints.checkpoints(tmp_path / "layer") == []


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for change, words in (
        ({"seed": 3}, r"train\.seed was 0, is 3"),
        ({"steps": 9}, r"train\.steps was 7, is 9"),
        ({"identity": {"data": "letters"}}, r"data was 'numbers', is 'letters'"),
        ({"rates": dc.replace(RATES, learning_rate=1e-3)}, r"optimiser\.learning_rate was 0\.01, is 0\.001"),
        ({"model": network(width=9)}, r"another architecture: .*0\.weight is \(8, 4\), the model wants \(9, 4\)"),
        ({"model": nn.Sequential(*network(), nn.Linear(4, 4))}, r"another architecture: missing: .*4\.bias"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path, **change).run()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    trainer(tmp_path, keep=1, save_every=5, log_every=3).run()


def test_a_full_disk_is_said_and_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    real, calls = safetensors.torch.save_file, []

    def full(tensors: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="the disk is full"):
        trainer(tmp_path).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "step-00000002"]
    whole = trainer(tmp_path / "whole")
    whole.run()
    again = trainer(tmp_path)
    again.run()
    same(everything(again), everything(whole))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    newest = checkpoints.checkpoints(tmp_path)[-1]
    (newest / "state-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is not readable"):
        trainer(tmp_path).run()
    (newest / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="format 9; this version reads format 1"):
        trainer(tmp_path).run()


PROGRAM = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path
    sys.path[:0] = sys.argv[2:]
    import test_loop
    from vsparse.training.draws import Draws

    def train(folder):
        task = test_loop.Regression(rows=64)
        test_loop.trainer(folder, task, model=test_loop.network(256), steps=30).run()

    def child(folder):
        pid = os.fork()
        if pid == 0:
            train(folder)
            os._exit(0)
        return pid

    folder, began = Path(sys.argv[1]), time.perf_counter()
    os.waitpid(child(folder / "whole"), 0)
    took, kills = time.perf_counter() - began, 0
    for attempt in range(100):
        pid = child(folder / "torn")
        if kills < 8:
            time.sleep(took * float(Draws(("kill", attempt)).uniform(1)) / 2)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        if os.WIFEXITED(status):
            print(kills, os.WEXITSTATUS(status))
            break
""")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_the_whole_run(tmp_path: Path) -> None:
    """SIGKILL anywhere, in training or in the middle of a checkpoint; the files at the end are equal byte for byte."""
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *here], check=True, capture_output=True, text=True
    )
    kills, status = map(int, ended.stdout.split())
    assert kills >= 2
    assert status == 0
    files = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")}
    assert files == {path.relative_to(tmp_path / "torn") for path in (tmp_path / "torn").rglob("*.safetensors")}
    assert all((tmp_path / "torn" / x).read_bytes() == (tmp_path / "whole" / x).read_bytes() for x in files)
    assert not list((tmp_path / "torn").glob(".partial*"))


def test_rates_follow_their_shape() -> None:
    rates = OptimiserSettings(schedule="linear", warmup=4, final=0.1)
    assert [rates.factor(i, 15) for i in range(4)] == [0.2, 0.4, 0.6, 0.8]
    assert rates.factor(4, 15) == 1.0
    assert rates.factor(14, 15) == 0.1
    assert OptimiserSettings(schedule="cosine").factor(0, 1) == 1.0
    values = [dc.replace(rates, schedule="cosine").factor(i, 15) for i in range(4, 15)]
    assert values == sorted(values, reverse=True)


def test_what_the_method_has_added_has_its_own_rate() -> None:
    model = nn.ModuleDict({"host": nn.Linear(3, 3), "gate": nn.Linear(3, 3)})
    (adamw,) = make_optimisers(
        model.named_parameters(),
        OptimiserSettings(learning_rate=1e-5, method_learning_rate=1e-3, weight_decay=0.5),
        added=["gate.weight", "gate.bias"],
    )
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in adamw.param_groups
        for name, x in model.named_parameters()
        if any(x is y for y in group["params"])
    }
    assert found == {
        "host.weight": (1e-5, 0.5),
        "host.bias": (1e-5, 0.0),
        "gate.weight": (1e-3, 0.5),
        "gate.bias": (1e-3, 0.0),
    }
    with pytest.raises(ValueError, match="nothing learns"):
        make_optimisers(model.requires_grad_(False).named_parameters(), OptimiserSettings())
