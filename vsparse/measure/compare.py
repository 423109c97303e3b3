"""Recall of attention mass against executed density, for every method that chooses block maps, beside random blocks."""

from __future__ import annotations

import dataclasses as dc
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vsparse.geometry import Grid
from vsparse.measure.drawing import PROMPT
from vsparse.measure.embedded import EMBEDDED, embedded_pipeline
from vsparse.measure.pipelines import generate
from vsparse.measure.recall import kept_by, key_mass, random_like
from vsparse.measure.synthetic import structured_sample
from vsparse.methods import get_method, list_methods
from vsparse.methods.samples import Sample
from vsparse.patch import apply

__all__ = ["GRID", "TEXT", "Point", "Sweep", "compare", "embedded_samples", "recall_at", "structured_sets", "sweeps"]

GRID = Grid(t=8, h=12, w=16)
TEXT = 24
LAYER = 2  # by which vmoba takes its cubes; the others do not differ by layer

_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
_MASSES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dc.dataclass(frozen=True, kw_only=True)
class Sweep:
    """One line: a method with options that suit small grids, and values of the field that sets its budget."""

    name: str
    method: str
    options: Mapping[str, Any]
    field: str
    values: Sequence[Any]


@dc.dataclass(frozen=True, kw_only=True)
class Point:
    """One budget of one line on one set of samples, means over samples and heads.

    Args:
        recall: Share of the softmax of the video queries on kept keys. random: the same of random blocks of this layout
            with as many tokens in every row, whose density is ``random_density``.
    """

    line: str
    method: str
    field: str
    value: Any
    density: float
    recall: float
    random: float
    random_density: float


# Blocks of 16 tokens, so that the small grids have as many of them as it takes to choose among them.
_B: Mapping[str, Any] = {"block": 16}
_FRAME: Mapping[str, Any] = {"tile": (1, 4, 4), **_B}
_SWEEPS: tuple[tuple[str, str, Mapping[str, Any], str, Sequence[Any]], ...] = (
    ("vsa", "vsa", {"tile": (2, 2, 4), **_B}, "density", _SHARES),
    ("adaspa", "adaspa", _B, "density", _SHARES),
    ("adaspa, heads alike", "adaspa", {"head_adaptive": False, **_B}, "density", _SHARES),
    ("vmoba", "vmoba", {"cube": (2, 2, 4)}, "top_k", tuple((2, 6, n) for n in (4, 8, 16, 32, 48))),
    ("sta", "sta", {"tile": (2, 4, 4), **_B}, "window", ((1, 1, 1), (1, 3, 1), (3, 3, 1), (3, 3, 3), (None, 3, 3))),
    ("radial", "radial", {"least": 2, "adjacent": 0.1, **_B}, "decay_factor", (0.1, 0.4, 0.8, 1.6)),
    ("svg", "svg", {"sink_frames": 0, **_B}, "density", _SHARES),
    (
        "svg2",
        "svg2",
        {"query_clusters": 48, "key_clusters": 96, "least": 0.02, "first_iterations": 10},
        "mass",
        _MASSES,
    ),
    ("attention_tile", "attention_tile", _B, "global_frames", (1, 2, 3, 4)),
    ("sla", "sla", _B, "density", _SHARES),
    ("nabla", "nabla", {"window": (3, 1, 1), **_FRAME}, "mass", _MASSES),
    ("sparge, mass", "sparge", _B, "mass", _MASSES),
    ("sparge, unguarded", "sparge", {"similarity": 0.0, **_B}, "mass", _MASSES),
    ("sparge, density", "sparge", {"select": "density", "order": "hilbert", **_B}, "density", _SHARES),
    ("xattention", "xattention", {"stride": 4, **_B}, "mass", _MASSES),
    ("draft", "draft", _FRAME, "density", _SHARES),
    ("jenga", "jenga", {"mass": 0.05, **_B}, "density", _SHARES),
    (
        "pattern",
        "pattern",
        _FRAME,
        "pattern",
        tuple(f"Window(size=({t}, {n}, {n}))" for t, n in ((1, 5), (3, 5), (3, 9), (5, 9))),
    ),
)


def sweeps() -> list[Sweep]:
    """A line for every registered method that chooses; methods of other packages with their defaults, as one point."""
    found = [
        Sweep(name=name, method=method, options=options, field=field, values=values)
        for name, method, options, field, values in _SWEEPS
    ]
    known = {sweep.method for sweep in found}
    others = [key for key, kind in list_methods().items() if kind.chooses and key not in known]
    return found + [Sweep(name=key, method=key, options={}, field="", values=(None,)) for key in others]


def compare(
    samples: Sequence[Sample],
    lines: Sequence[Sweep],
    *,
    seed: int = 0,
    began: Callable[[str], None] | None = None,
) -> list[Point]:
    """Every budget of every line on some samples.

    Args:
        samples: q, k and v of single calls, texts in full. lines: what to try. seed: of the random blocks.
        began: Told the name of each line.
    """
    points = []
    for line in lines:
        if began is not None:
            began(line.name)
        known: list[tuple[Tensor, Tensor] | None] = [None] * len(samples)  # the key blocks are those of the last budget
        for value in line.values:
            options = {**line.options, **({line.field: value} if line.field else {})}
            method = get_method(line.method)(**options)
            rows = []
            for i, sample in enumerate(samples):
                kept = kept_by(method, sample, layer=LAYER)
                last = known[i]
                same = last is not None and torch.equal(last[0], kept.block)
                mass = last[1] if last and same else key_mass(sample, kept.block, kept.keep.shape[-1])
                known[i] = (kept.block, mass)
                chance = random_like(kept, seed)
                rows.append(
                    [x.mean() for x in (kept.density(), kept.recall(mass), chance.recall(mass), chance.density())]
                )
            density, recall, random, level = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
            points.append(
                Point(
                    line=line.name,
                    method=line.method,
                    field=line.field,
                    value=value,
                    density=density,
                    recall=recall,
                    random=random,
                    random_density=level,
                )
            )
    return points


def recall_at(points: Sequence[Point], line: str, density: float) -> float | None:
    """Recall of a line at a density, read between its neighbouring points; None outside of them."""
    found = sorted((point.density, point.recall) for point in points if point.line == line)
    for (low, before), (high, after) in itertools.pairwise(found):
        if low <= density <= high:
            return before if high == low else before + (after - before) * (density - low) / (high - low)
    return None


def structured_sets(seed: int = 0) -> dict[str, list[Sample]]:
    """Structured samples on `GRID`, without text and with `TEXT` tokens after the video."""
    with_text = dc.replace(GRID, text_after=TEXT)
    return {
        "structured": [structured_sample(GRID, seed=seed)],
        "structured, text": [structured_sample(with_text, seed=seed)],
    }


def embedded_samples(*, steps: int = EMBEDDED.steps, seed: int = 0) -> list[Sample]:
    """q, k and v of every attention layer of the embedded model, in the conditional branch of the middle step."""
    step, clip = steps // 2, dc.replace(EMBEDDED, steps=steps)
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    found: dict[int, Sample] = {}
    # Every block is kept and the gate is zero: the model computes what it computes without a patch.
    with apply(pipe, "vsa", density=1.0, tile=(1, 4, 4), block=16) as patch:

        def look(module: Any, given: tuple[Tensor, Tensor, Tensor]) -> None:
            if module.call is not None and int(module.call.step) == step and module.site.layer not in found:
                q, k, v = (x.detach().clone() for x in given)
                found[module.site.layer] = Sample(grid=module.call.grid, q=q, k=k, v=v)

        handles = [site.register_forward_pre_hook(look) for site in patch.sites]
        generate(pipe, prompt=PROMPT, seed=seed, **dc.asdict(clip))
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in sorted(found)]
