"""What each method costs in quality, training-free and after a short fine-tune, on the embedded model; resumable."""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsparse.measure.adherence import summary
from vsparse.measure.quality import compare
from vsparse.measure.recall import kept_by, key_mass
from vsparse.measure.shapes import Scene, held_out
from vsparse.methods import get_method
from vsparse.methods.samples import Sample as Captured
from vsparse.patch import Patch, apply
from vsparse.schedule import Schedule
from vsparse.training.distill import VelocityDistillation
from vsparse.training.files import whole_file
from vsparse.training.loop import Trainer, TrainSettings
from vsparse.training.optimisers import OptimiserSettings
from vsparse.training.playground import Playground
from vsparse.training.teachers import StartWeights

__all__ = ["SUBJECTS", "Row", "Study", "Subject"]

_B: Mapping[str, Any] = {"block": 16}
_FRAME: Mapping[str, Any] = {"tile": (1, 4, 4), **_B}


@dc.dataclass(frozen=True, kw_only=True)
class Subject:
    """A method with options for each density that is asked for; ``trained``: whether it can be fine-tuned at all."""

    method: str
    options: Mapping[float, Mapping[str, Any]]
    trained: bool = True


def _by_density(method: str, options: Mapping[str, Any], *, trained: bool = True) -> Subject:
    return Subject(method=method, options={d: {**options, "density": d} for d in (0.5, 0.25)}, trained=trained)


# Blocks of 16 tokens: the grid of 5 x 16 x 16 then has 80 of them, enough to choose among.
SUBJECTS: tuple[Subject, ...] = (
    _by_density("vsa", _FRAME),
    Subject(
        method="vmoba",
        options={
            d: {"frames": 1, "patch": (4, 4), "cube": (5, 4, 4), "top_k": counts}
            for d, counts in ((0.5, (3, 8, 8)), (0.25, (1, 4, 4)))
        },
    ),
    _by_density("dsv", {**_FRAME, "stage": "sparse", "adaptive": False}),
    _by_density("sla", _B),
    _by_density("adaspa", _B, trained=False),
    _by_density("svg", {**_B, "sink_frames": 0}),
    _by_density("sparge", {**_B, "select": "density"}),
    Subject(method="attention_tile", options={0.5: {**_B, "global_frames": 1}}),  # the least of five frames: 0.52
    _by_density("draft", _FRAME),
    _by_density("jenga", {**_B, "mass": 0.05}),
    # Outputs that serve two and four steps: in training nothing is cached, so there is nothing to train.
    Subject(method="unicp", options={d: {"windows": n, "ends": 0.0} for d, n in ((0.5, 2), (0.25, 4))}, trained=False),
)


OPTIMISER = OptimiserSettings(learning_rate=2e-4, method_learning_rate=2e-3, schedule="cosine", warmup=5)
"""Of a fine-tune."""


@dc.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Args:
        method: "dense" or a registry key. asked: density that was asked for. tuned: after the fine-tune.
        density: Executed, of generation. loss: on held-out clips.
        adherence: Property -> clips that have it, of ``clips``.
        psnr, ssim: Means against the dense model as it ships, same prompts and seeds; None for that model itself.
        recall: Share of the exact softmax on the kept keys, of the model's own q and k; None where the choice needs
            more than q and k. seconds: of one training step; None without training.
    """

    method: str
    asked: float
    tuned: bool
    density: float
    loss: float
    adherence: Mapping[str, int]
    clips: int
    psnr: float | None = None
    ssim: float | None = None
    recall: float | None = None
    seconds: float | None = None


class Study:
    """Makes rows one after the other and writes each down, so that it goes on where it was stopped.

    A fine-tune trains all weights to what the dense model as it ships predicts from the same noisy latents
    (`VelocityDistillation`); on its own data alone a model that is trained already learns more noise than sparsity in
    so few steps.

    Args:
        folder: For rows and checkpoints of the fine-tunes. steps: of each fine-tune.
        prompts: Held-out scenes to generate. seed: of order, noise and first weights.
    """

    def __init__(self, folder: Path, *, steps: int = 60, prompts: int = 24, seed: int = 0) -> None:
        self.folder, self.steps, self.seed = folder, steps, seed
        self.wanted: tuple[Scene, ...] = held_out()[:prompts]
        self._ground: Playground | None = None
        self._dense: list[Tensor] = []

    def rows(self, subjects: Sequence[Subject], told: Callable[[str], None]) -> list[Row]:
        """Dense as it ships, then each method at each density, before and after the fine-tune."""
        found = [self._row("dense", 1.0, {}, False, told)]
        for subject in subjects:
            for asked, options in subject.options.items():
                stages = (False, True) if subject.trained else (False,)
                found += [self._row(subject.method, asked, options, tuned, told) for tuned in stages]
        return found

    def _row(
        self, method: str, asked: float, options: Mapping[str, Any], tuned: bool, told: Callable[[str], None]
    ) -> Row:
        name = f"{method}-{asked:g}-{'tuned' if tuned else 'free'}"
        told(name)
        path = self.folder / f"{name}.json"
        made_with = {"steps": self.steps, "clips": len(self.wanted), "seed": self.seed, "options": repr(dict(options))}
        if tuned:
            made_with |= {"optimiser": repr(OPTIMISER)}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["made_with"] != made_with:
                raise ValueError(f"{path} was made with {stored['made_with']}, not {made_with}; take another folder")
            return Row(**stored["row"])
        row = self._measure(method, asked, options, tuned, name)
        with whole_file(path) as scratch:
            scratch.write_text(json.dumps({"made_with": made_with, "row": dc.asdict(row)}, indent=2) + "\n")
        return row

    def _measure(self, method: str, asked: float, options: Mapping[str, Any], tuned: bool, name: str) -> Row:
        if self._ground is None:
            self._ground = Playground.open()
            self._dense = self._ground.videos(self.wanted)
        ground = self._ground.renewed()
        patch = None
        if method != "dense":
            free = not tuned and "search" in get_method(method).exact_phases
            # A method that searches exactly has no sparse call without the steps of a generation.
            schedule = None if free else Schedule()
            patch = apply(ground.pipe if free else ground.pipe.transformer, method, schedule=schedule, **options)
        seconds = None
        if tuned:
            assert patch is not None
            seconds = self._tune(ground, patch, name)
        loss = ground.held_out_loss(patch)
        recall = None if patch is None else self._recall(ground, patch)
        if patch is not None:
            patch.reset()
            patch.clear_stats()
        videos = self._dense if patch is None else ground.videos(self.wanted)
        density = 1.0 if patch is None else float(patch.stats()["density"])
        near = [compare(mine, dense) for mine, dense in zip(videos, self._dense, strict=True)]
        return Row(
            method=method,
            asked=asked,
            tuned=tuned,
            density=density,
            loss=loss,
            adherence=summary(ground.judged(videos, self.wanted)),
            clips=len(self.wanted),
            psnr=None if videos is self._dense else sum(x.psnr for x in near) / len(near),
            ssim=None if videos is self._dense else sum(x.ssim for x in near) / len(near),
            recall=recall,
            seconds=seconds,
        )

    def _tune(self, ground: Playground, patch: Patch, name: str) -> float:
        """Train everything for a few steps; returns the median time of a step."""
        model = ground.pipe.transformer
        mine = {id(x) for x in patch.parameters()}
        teacher = VelocityDistillation(patch, start=StartWeights(model, patch=patch, copy="device"))
        task = dc.replace(
            ground.task(seed=self.seed), data=0.0, teachers={"velocity": (1.0, teacher)}, extra=patch.auxiliary_losses
        )
        run = Trainer(
            model,
            task,
            settings=TrainSettings(steps=self.steps, seed=self.seed, log_every=1, save_every=20, keep=1, average=0.9),
            optimiser=OPTIMISER,
            folder=self.folder / name,
            identity={"method": name},
            added=[key for key, x in model.named_parameters() if id(x) in mine],
        )
        run.run()
        run.average.copy_to_model()
        rows = (self.folder / name / "log.jsonl").read_text().splitlines()
        times = sorted(json.loads(row)["seconds"] for row in rows)
        return float(times[len(times) // 2])

    def _recall(self, ground: Playground, patch: Patch) -> float | None:
        method = patch.plan.method
        if method.key == "dsv":
            return None
        found: dict[int, Captured] = {}

        def look(module: Any, given: tuple[Tensor, Tensor, Tensor]) -> None:
            if module.call is not None and module.site.layer not in found:
                q, k, v = (x[:1].detach().clone().float() for x in given)
                found[module.site.layer] = Captured(grid=module.call.grid, q=q, k=k, v=v)

        handles = [site.register_forward_pre_hook(look) for site in patch.sites]
        ground.held_out_loss(patch)
        for handle in handles:
            handle.remove()
        shares = []
        for layer, sample in found.items():
            kept = kept_by(method, sample, layer=layer)
            shares.append(kept.recall(key_mass(sample, kept.block, kept.keep.shape[-1])).mean())
        return float(torch.stack(shares).mean())
