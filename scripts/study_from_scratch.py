"""Sparse from the first step: `make study-scratch`; writes out/scratch/.

The embedded model's transformer from random weights, with equal steps and data: dense, VSA and VMoBA at density 0.25,
three seeds each; the loss on held-out clips over the steps, in one plot. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
from pathlib import Path

import torch
from rich.console import Console

from vsparse.measure.demo import environment
from vsparse.measure.recall_report import as_json, record, write_text
from vsparse.patch import apply
from vsparse.schedule import Schedule
from vsparse.training.embedded import build_transformer
from vsparse.training.loop import LOG, VALIDATION, Trainer, TrainSettings
from vsparse.training.optimisers import OptimiserSettings
from vsparse.training.playground import Playground
from vsparse.training.study import SUBJECTS
from vsparse.training.study_report import curves

DENSITY = 0.25
Curve = list[tuple[int, float]]


def train(ground: Playground, folder: Path, method: str, seed: int, steps: int, every: int) -> Curve:
    """One run; returns (step, held-out loss)."""
    pipe = ground.renewed().pipe
    pipe.transformer = build_transformer(z_dim=pipe.vae.config.z_dim, seed=seed)
    place = dc.replace(ground, pipe=pipe)
    patch = None
    if method != "dense":
        options = next(x.options[DENSITY] for x in SUBJECTS if x.method == method)
        patch = apply(pipe.transformer, method, schedule=Schedule(), **options)
    run = Trainer(
        pipe.transformer,
        place.task(seed=seed),
        settings=TrainSettings(
            steps=steps, seed=seed, average=0.98, save_every=every, keep=1, log_every=every, validate_every=every
        ),
        optimiser=OptimiserSettings(name="muon", learning_rate=2e-3, schedule="cosine", warmup=20, final=0.01),
        folder=folder,
        identity={"method": method},
        validate=lambda _: {"loss": place.held_out_loss(patch)},
    )
    run.run()
    rows = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [(row["step"], row[f"{VALIDATION}loss"]) for row in rows if f"{VALIDATION}loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/scratch"), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=25, help="steps between two points of a curve")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", type=Path, metavar="FILE", help="also put the curves into docs/measured.json")
    parser.add_argument("--image", type=Path, metavar="FILE", help="where the picture goes (default: with the runs)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console = Console()
    ground = Playground.open()
    runs: dict[str, list[Curve]] = {}
    with console.status("") as status:
        for seed in range(given.seeds):
            for method in ("dense", "vsa", "vmoba"):
                name = method if method == "dense" else f"{method}, density {DENSITY}"
                status.update(f"{name}, seed {seed}")
                folder = given.out / f"{method}-{seed}"
                runs.setdefault(name, []).append(train(ground, folder, method, seed, given.steps, given.every))
    write_text(given.out / "curves.json", as_json(runs))
    curves(given.image or given.out / "curves.png", runs)
    if given.record:
        record(given.record, "scratch", {"environment": environment(), "steps": given.steps, "curves": runs})
    for name, seeds in runs.items():
        console.print(f"{name}: held-out loss at the end {', '.join(f'{run[-1][1]:.4f}' for run in seeds)}")


if __name__ == "__main__":
    main()
