"""What fine-tuning published models needs on one GPU, predicted: writes docs/predicted.json for `write_docs.py`.

Nothing is downloaded or run: the models are made from their configurations, without weights.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import datetime
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from vsparse.measure import recall_report
from vsparse.training.data.buckets import Bucket
from vsparse.training.loop import TrainSettings
from vsparse.training.predict import DEVICES, predict_step
from vsparse.training.settings import DataSettings, MethodSettings, ModelSettings, Settings

ROOT = Path(__file__).resolve().parents[1]
DENSITIES = (0.25, 0.125)


def wan(**config: Any) -> Any:
    from diffusers import WanPipeline, WanTransformer3DModel

    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    with torch.device("meta"):
        return WanPipeline(**parts, transformer=WanTransformer3DModel(**config))


def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "vae", "scheduler")
    with torch.device("meta"):
        return HunyuanVideoPipeline(**dict.fromkeys(names), transformer=HunyuanVideoTransformer3DModel())


# The default configurations of diffusers are those of Wan 2.1 14B and HunyuanVideo.
MODELS: dict[str, tuple[Callable[[], Any], tuple[Bucket, ...]]] = {
    "Wan 2.1 1.3B": (
        lambda: wan(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        (Bucket(frames=81, height=480, width=832), Bucket(frames=81, height=720, width=1280)),
    ),
    "Wan 2.1 14B": (wan, (Bucket(frames=81, height=480, width=832), Bucket(frames=81, height=720, width=1280))),
    "HunyuanVideo": (
        hunyuan_video,
        (Bucket(frames=129, height=544, width=960), Bucket(frames=129, height=720, width=1280)),
    ),
}


def cases() -> Iterator[tuple[str, Bucket, str, float | None]]:
    """Model, size, what learns, and the density of vsa or None."""
    for name, (_, sizes) in MODELS.items():
        for size in sizes:
            for train in ("full", "lora", "method"):
                yield from (
                    (name, size, train, density) for density in (None, *DENSITIES) if density or train != "method"
                )


def told(bucket: Bucket, train: str, density: float | None) -> Settings:
    """One clip in a batch, everything else as it comes."""
    method = MethodSettings(key="none") if density is None else MethodSettings(options={"density": density})
    return Settings(
        output="out",
        model=ModelSettings(path="published", train=train),
        data=DataSettings(source="clips", buckets=(bucket,)),
        train=TrainSettings(steps=1),
        method=method,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "predicted.json", metavar="FILE")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    pipes = {name: make() for name, (make, _) in MODELS.items()}
    rows = []
    for name, size, train, density in track(list(cases()), "predicting", console=Console(), transient=True):
        made = predict_step(told(size, train, density), size, pipe=pipes[name])
        figures = {
            **dc.asdict(made),
            "memory": made.memory,
            "fits": [made.fits(device) for device in DEVICES],
            "seconds": [round(made.seconds(device), 2) for device in DEVICES],
        }
        video = [size.frames, size.height, size.width]
        rows.append({"model": name, "video": video, "train": train, "density": density, **figures})
    packages = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    report = {
        "command": "python scripts/predict_training.py",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "packages": packages,
        "devices": [dc.asdict(device) for device in DEVICES],
        "rows": rows,
    }
    recall_report.write_text(given.out, recall_report.as_json(report))


if __name__ == "__main__":
    main()
