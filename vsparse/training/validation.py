"""Fixed prompts, generated densely and sparsely by the model as it is: videos to look at, and how far they differ."""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vsparse.measure.pipelines import generate
from vsparse.measure.quality import compare
from vsparse.measure.video import write_video
from vsparse.training.files import whole_folder
from vsparse.training.settings import ValidationSettings
from vsparse.training.student import Student

__all__ = ["Validation", "encoders_on", "place_encoders"]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Validation:
    """Called by the loop after a step, with the averaged weights in place.

    Args:
        student: Its pipeline generates. settings: prompts and size. folder: where the videos of each step go.
        precision: Of the run: "bf16" generates with matrix products in bfloat16, as it trains.
        accelerator: Every process generates (a sharded model needs all of them), the first one writes.
    """

    student: Student
    settings: ValidationSettings
    precision: Literal["bf16", "fp32"]
    folder: Path
    accelerator: Any

    def __call__(self, step: int) -> dict[str, float]:
        """Mean figures over the prompts: PSNR and SSIM of sparse against dense, executed density."""
        target = self.folder / f"step-{step:08d}"
        made = [self._pair(i) for i in range(len(self.settings.prompts))]
        rows = []
        for (dense, sparse, density), prompt in zip(made, self.settings.prompts, strict=True):
            row: dict[str, Any] = {"prompt": prompt}
            if sparse is not None:
                row |= {"density": density, **compare(sparse, dense).as_json()}
            rows.append(row)
        if self.accelerator.is_main_process and not target.exists():
            with whole_folder(target) as scratch:
                for i, (dense, sparse, _) in enumerate(made, 1):
                    write_video(scratch / f"{i}-dense.mp4", dense, fps=self.settings.fps)
                    if sparse is not None:
                        write_video(scratch / f"{i}-sparse.mp4", sparse, fps=self.settings.fps)
                (scratch / "figures.json").write_text(json.dumps(rows, indent=2) + "\n")
        found = {}
        for name in ("psnr", "ssim", "density"):
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                found[name] = sum(values) / len(values)
        return found

    def _pair(self, i: int) -> tuple[Tensor, Tensor | None, float]:
        """Dense video, sparse video, density of the sparse run; without a patch the model as it is."""
        patch = self.student.patch
        device = self.accelerator.device
        narrow = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with encoders_on(self.student, device), narrow:
            if patch is None:
                return self._generate(i), None, 1.0
            with patch.suspended():
                dense = self._generate(i)
            patch.reset()
            patch.clear_stats()
            sparse = self._generate(i)
            patch.reset()
        return dense, sparse, float(patch.stats()["density"])

    def _generate(self, i: int) -> Tensor:
        s = self.settings
        return generate(
            self.student.pipe,
            prompt=s.prompts[i],
            seed=s.seed + i,
            height=s.height,
            width=s.width,
            frames=s.frames,
            steps=s.steps,
            guidance=s.guidance,
        )


@contextmanager
def encoders_on(student: Student, device: torch.device) -> Iterator[None]:
    """Inside it the pipeline's frozen parts are on the device; afterwards each is where it was."""
    before = {name: next(part.parameters()).device for name, part in _encoders(student)}
    place_encoders(student, device)
    try:
        yield
    finally:
        for name, part in _encoders(student):
            part.to(before[name])


def place_encoders(student: Student, device: torch.device) -> None:
    """Move everything but the transformers."""
    for _, part in _encoders(student):
        part.to(device)


def _encoders(student: Student) -> list[tuple[str, nn.Module]]:
    parts = student.pipe.components.items()
    return [(name, x) for name, x in parts if isinstance(x, nn.Module) and not name.startswith("transformer")]
