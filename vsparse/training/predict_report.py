"""A predicted training step as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vsparse.measure.skeleton import skeleton
from vsparse.optional import require
from vsparse.training.data.buckets import Bucket
from vsparse.training.predict import DEVICES, Device, Prediction, predict_step
from vsparse.training.settings import DistillSettings, Settings

__all__ = ["devices_table", "needs_table", "tables"]

_ROWS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimiser state", "optimiser"),
    ("moving average", "average"),
    ("kept for the backward", "saved"),
    ("most in a forward and backward", "step"),
    ("most at once", "memory"),
)


def tables(settings: Settings) -> list[Any]:
    """Both tables for every size of video of a run.

    Raises:
        ValueError, FileNotFoundError: as of `predict_step`.
    """
    pipe = skeleton(settings.model.path)
    found = [(bucket, predict_step(settings, bucket, pipe=pipe)) for bucket in settings.data.buckets]
    return [needs_table(settings, found), devices_table(found)]


def needs_table(settings: Settings, found: Sequence[tuple[Bucket, Prediction]]) -> Any:
    """Memory and FLOPs of a step, a column for each size of video."""
    what = f"{settings.model.train}, method {settings.method.key}, batch {settings.data.batch}"
    table = _table("One training step, predicted, not measured", what, found)
    for words, name in _ROWS:
        table.add_row(words, *(f"{getattr(made, name) / 2**30:.2f} GiB" for _, made in found))
    for part in ("layers", "attention", "method"):
        table.add_row(f"{part}, TFLOP", *(f"{getattr(made, part) / 1e12:,.3g}" for _, made in found))
    table.caption = (
        "One process, with encoders off the GPU; tensors alone, as PyTorch makes them on a CPU, without what kernels "
        "need for themselves. FLOPs: recomputation counts; method: what it adds to attention."
    )
    if settings.distill != DistillSettings():
        table.caption += " Distillation is not counted."
    return table


def devices_table(found: Sequence[tuple[Bucket, Prediction]], devices: Sequence[Device] = DEVICES) -> Any:
    """Whether it fits and how long a step takes on GPUs, at rates that are assumed."""
    table = _table("One step on one GPU, predicted, not measured", "", found)
    for device in devices:
        cells = [f"{made.seconds(device):.3g} s" if made.fits(device) else "does not fit" for _, made in found]
        table.add_row(device.name, *cells)
    first = devices[0]
    table.caption = (
        f"Assumed: {first.efficiency:.0%} of the data sheet's bfloat16 peak for layers and full attention, "
        f"{first.sparse:.0%} for sparse attention; {first.spare:.0%} of the memory is not for tensors."
    )
    return table


def _table(title: str, first: str, found: Sequence[tuple[Bucket, Prediction]]) -> Any:
    table = require("rich.table", "cli").Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(first)
    for bucket, _ in found:
        table.add_column(f"{bucket.frames} x {bucket.height} x {bucket.width}", justify="right")
    return table
