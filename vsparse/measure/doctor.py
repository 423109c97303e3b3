"""What is installed here, and which implementation of each op runs for which shape, or why none does."""

from __future__ import annotations

import dataclasses as dc
import importlib.metadata
import itertools
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vsparse import backend
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Blocking, RasterLayout

__all__ = ["Package", "Verdict", "devices", "notes", "packages", "reasons", "summary", "verdicts"]

# Distribution -> the extra that brings it; None: the library itself, or what comes with torch.
_PACKAGES: dict[str, str | None] = {
    "vsparse": None,
    "torch": None,
    "triton": None,
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "accelerate": "diffusers",
    "safetensors": "diffusers",
    "peft": "lora",
    "decord": "train",
    "tensorboard": "train",
    "matplotlib": "cli",
    "imageio": "cli",
    "torchmetrics": "cli",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dc.dataclass(frozen=True, kw_only=True)
class Package:
    """A package: its version, or None when it is not installed, and the extra that brings it."""

    name: str
    version: str | None
    extra: str | None


@dc.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one call would run on: an implementation, or None and every reason. ``notes``: what it does without."""

    op: str
    device: str
    head_dim: int
    block: int
    dtype: str
    implementation: str | None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def packages() -> list[Package]:
    """Versions of everything that vsparse can use."""
    found = [Package(name="python", version=platform.python_version(), extra=None)]
    for name, extra in _PACKAGES.items():
        try:
            version: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        found.append(Package(name=name, version=version, extra=extra))
    return found


def devices() -> list[str]:
    """One line per device that torch sees here."""
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        size = properties.total_memory / 2**30
        found.append(
            f"cuda:{i}: {properties.name}, compute capability {properties.major}.{properties.minor}, {size:.0f} GiB"
        )
    if not torch.cuda.is_available():
        build = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        found.append(f"cuda: none visible (this torch is {build})")
    return found


def verdicts() -> list[Verdict]:
    """Each op on each kind of device, for the head dimensions, block sizes and dtypes that video models use."""
    found = []
    shapes = itertools.product((64, 128), (64, 128), _DTYPES)
    for (head_dim, block, dtype), device in itertools.product(shapes, ("cpu", "cuda")):
        for op, args, options in _calls(head_dim, block, dtype):
            found.append(_verdict(op, device, head_dim, block, dtype, args, options))
    return found


def summary(found: Sequence[Verdict]) -> str:
    """Which implementation serves these calls: one name where one serves all, else each with its share."""
    served: dict[str, int] = {}
    for verdict in found:
        name = verdict.implementation or "none"
        served[name] = served.get(name, 0) + 1
    if len(served) == 1:
        return next(iter(served))
    return ", ".join(f"{name} ({count} of {len(found)} shapes)" for name, count in served.items())


def reasons(found: Sequence[Verdict]) -> dict[str, str]:
    """Every reason why a call has no implementation, with the calls that it stands against."""
    return _told([(reason, verdict) for verdict in found for reason in verdict.reasons], found)


def notes(found: Sequence[Verdict]) -> dict[str, str]:
    """Everything that implementations do without, and why, with the calls that it is about."""
    return _told([(note, verdict) for verdict in found for note in verdict.notes], found)


def _told(pairs: Sequence[tuple[str, Verdict]], found: Sequence[Verdict]) -> dict[str, str]:
    calls: dict[str, list[Verdict]] = {}
    for words, verdict in pairs:
        calls.setdefault(words, []).append(verdict)
    return {words: _calls_in_words(each, found) for words, each in calls.items()}


def _calls_in_words(calls: Sequence[Verdict], found: Sequence[Verdict]) -> str:
    ops, kinds = list(dict.fromkeys(c.op for c in calls)), list(dict.fromkeys(c.device for c in calls))
    possible = sum(v.op in ops and v.device in kinds for v in found)
    where = f"{', '.join(kinds)}: {'every op' if len(ops) == len({v.op for v in found}) else ', '.join(ops)}"
    if len(calls) == possible:
        return where
    shapes = dict.fromkeys(f"D={c.head_dim} block={c.block} {c.dtype}" for c in calls)
    return f"{where} ({'; '.join(shapes)})"


def _verdict(
    op: str, device: str, head_dim: int, block: int, dtype: torch.dtype, args: tuple[Any, ...], options: dict[str, Any]
) -> Verdict:
    rows = [row for row in backend.implementations(op, device) if not row.unsupported(*args, **options)]
    notes = [f"{row.name}: {note}" for row in rows[:1] if row.notes for note in row.notes(*args, **options)]
    against = [reason.removeprefix(f"{op}: ") for reason in backend.reasons(op, device, *args, **options)]
    if device == "cuda" and not torch.cuda.is_available():
        against = ["no NVIDIA GPU is visible to torch", *against]
    chosen = None if against else backend.lookup(op, device, *args, **options).name
    name = str(dtype).removeprefix("torch.")
    return Verdict(
        op=op, device=device, head_dim=head_dim, block=block, dtype=name, implementation=chosen,
        reasons=tuple(against), notes=tuple(notes),
    )  # fmt: skip


def _calls(head_dim: int, block: int, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Each op with arguments that have shapes and no data."""
    layout = RasterLayout(Grid(t=2, h=16, w=16), block=block).to("meta")
    blocking = Blocking(length=layout.length, block=layout.block, start=layout.start)
    q = torch.empty(1, layout.slots, 2, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(1, layout.slots, 2, device="meta")
    pooled = torch.empty(1, layout.blocks, 2, head_dim, device="meta")
    blocks = BlockMap.full(blocking)
    scale = {"scale": head_dim**-0.5}
    yield "block_sparse_attention", (q, q, q, blocks), {**scale, "skip_threshold": None}
    yield "block_sparse_attention_backward", (q, lse, q, q, q, q, lse, blocks), scale
    yield "search_attention", (q, q, q, blocking), scale
    yield "block_mass", (q, q, lse, blocking, blocking), {**scale, "candidates": None, "rows": None}
    scores = torch.empty(1, 2, layout.blocks, layout.blocks, device="meta")
    limit = torch.ones(1, 1, 1, dtype=torch.int32, device="meta")
    rule = {"rule": "count", "budget": "exempt", "least": 0, "capacity": layout.blocks}
    yield "select_blocks", (scores, blocking.length, None, limit), rule
    yield "block_pool", (q, blocking), {}
    yield "block_pool_backward", (pooled, q, blocking), {}
    yield "reorder", (q, layout.slot_token), {}
    yield "merge_attention", ([q, q], [lse, lse]), {}
    yield "merge_attention_backward", (q, lse, [q, q], [lse, lse]), {}
