"""Published models on 1 to 64 GPUs, predicted: maps of full size, what each process gets of them, and its time."""

from __future__ import annotations

import dataclasses as dc
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.measure.capture import capture
from vsparse.measure.drawing import PROMPT
from vsparse.measure.embedded import EMBEDDED, embedded_pipeline
from vsparse.measure.pipelines import generate
from vsparse.measure.sharding import chosen_map, fixed_map, layer_attention, made_samples
from vsparse.methods import Method, Site, get_method
from vsparse.parallel.balance import HeadBalance, assign_heads, heads_in_order, imbalance, least_imbalance
from vsparse.parallel.planner import PARTS, Choice, choose, factorisations
from vsparse.parallel.rates import Cluster
from vsparse.parallel.simulation import Split, simulate_all
from vsparse.patch import apply

__all__ = ["GPUS", "LINES", "MODELS", "Line", "Model", "balance_figures", "case", "maps_of", "recorded_densities"]

GPUS = (1, 2, 4, 8, 16, 32, 64)


@dc.dataclass(frozen=True, kw_only=True)
class Model:
    """The self-attention of a published model at one size of video. ``options``: of a method, where they differ."""

    name: str
    grid: Grid
    heads: int
    layers: int
    head_dim: int = 128
    options: Mapping[str, Mapping[str, Any]] = dc.field(default_factory=dict)


MODELS = (
    Model(name="Wan 2.1 14B, 720p", grid=Grid(t=21, h=45, w=80), heads=40, layers=40),
    Model(
        name="HunyuanVideo, 720p",
        grid=Grid(t=33, h=45, w=80, text_after=256),
        heads=24,
        layers=60,
        options={"radial": {"decay_factor": 0.95, "adjacent": 1.0, "sink_frames": 0}},
    ),
    Model(name="Wan 2.1 1.3B, 480p", grid=Grid(t=21, h=30, w=52), heads=12, layers=30),
)


@dc.dataclass(frozen=True, kw_only=True)
class Line:
    """A method with options, or full attention."""

    name: str
    method: str
    options: Mapping[str, Any] = dc.field(default_factory=dict)


LINES = (
    Line(name="dense", method="dense"),
    Line(name="sta", method="sta", options={"window": (3, 3, 3)}),
    Line(name="radial", method="radial"),
    Line(name="nabla", method="nabla", options={"mass": 0.4, "window": (11, 3, 3)}),
    Line(name="sparge", method="sparge", options={"mass": 0.3, "similarity": 0.0}),
)


def maps_of(lines: Sequence[Line], model: Model, *, seed: int = 0) -> dict[str, list[BlockMap]]:
    """The maps of one layer by line; one head stands for all where they are alike.

    Where the map depends on the data, it is searched in all of `made_samples` on the full grid: twelve heads that
    differ in density as those of trained models do. Heads beyond twelve repeat them in turn.
    """
    found: dict[str, list[BlockMap]] = {}
    drawn = []
    for line in lines:
        fixed = fixed_map(_method(line, model), model.grid, _site(model))
        if fixed is None:
            drawn.append(line)
        else:
            found[line.name] = [fixed]
    for sample in made_samples(model.grid, seed=seed) if drawn else ():
        for line in drawn:
            found.setdefault(line.name, []).append(chosen_map(_method(line, model), sample, layer=2))
    return found


def _method(line: Line, model: Model) -> Method:
    return get_method(line.method)(**line.options, **model.options.get(line.method, {}))


def _site(model: Model) -> Site:
    return Site.alone(heads=model.heads, head_dim=model.head_dim)


def case(
    line: Line,
    model: Model,
    maps: Sequence[BlockMap],
    clusters: Mapping[str, Cluster],
    *,
    gpus: Iterable[int] = GPUS,
) -> dict[str, Any]:
    """One method on one model: its densities, what each factorisation makes of its maps, and what is predicted.

    Args:
        line: The method. model: the model. maps: of its heads (`maps_of`). clusters: by name. gpus: numbers of
            processes, 1 among them.
    """
    attention = layer_attention(_method(line, model), model.grid, _site(model), maps[0], layers=model.layers)
    density = torch.cat([one.density().expand(1, -1)[0] for one in maps])
    factors = {count: factorisations(count, model.heads) for count in gpus}
    together = list(dict.fromkeys(pair for found in factors.values() for pair in found))
    splits = dict(zip(together, simulate_all(maps, together, heads=model.heads), strict=True))
    by_work = [pair for pair in together if pair[1] > 1 and pair[0] == 1]
    work = dict(zip(by_work, simulate_all(maps, by_work, heads=model.heads, shards="work"), strict=True))
    predicted = {}
    for name, cluster in clusters.items():
        choices = {
            count: choose(attention, cluster, [splits[pair] for pair in found]) for count, found in factors.items()
        }
        predicted[name] = {str(count): _ways(found, choices[1].best.seconds) for count, found in choices.items()}
    return {
        "model": model.name,
        "line": line.name,
        "density": _rounded([float(density.mean()), float(density.min()), float(density.max())]),
        "splits": [_described(split, work.get(pair)) for pair, split in splits.items()],
        "predicted": predicted,
    }


def _described(split: Split, work: Split | None) -> dict[str, Any]:
    figures = {"naive": split.naive, "balanced": split.balanced, "union": split.union, "most": split.union_most}
    figures |= {} if work is None else {"by_work": work.balanced}
    found = {name: _rounded(value) for name, value in figures.items()}
    return {"ulysses": split.ulysses, "ring": split.ring, "skipped": split.skipped, **found}


def _ways(choice: Choice, alone: float) -> dict[str, Any]:
    """What was chosen, by part; and the speed-up over one GPU of the pure ways, None where there is none."""
    best = choice.best
    pure = {}
    for how in ("ulysses", "ring", "gather"):
        found = [x for x in choice.tried if x.how == how and (x.ulysses == 1 or how == "ulysses")]
        pure[how] = _rounded(alone / found[0].seconds) if found else None
    return {
        "name": best.name,
        "seconds": _rounded(best.seconds),
        "speedup": _rounded(alone / best.seconds),
        "pure": pure,
        "memory": round(best.memory),
        **{part: _rounded(getattr(best, part)) for part in (*PARTS, "hidden")},
    }


# ---- recorded densities ------------------------------------------------------------------------------------------


def recorded_densities(*, steps: int = EMBEDDED.steps, mass: float = 0.7) -> list[list[float]]:
    """Density of each of the twelve heads of the embedded model (6 layers of 2) at each denoising step, by `nabla`.

    The conditional branch of a generation with the method in force, blocks of 16 tokens.
    """
    pipe, clip = embedded_pipeline(), dc.replace(EMBEDDED, steps=steps)
    pipe.set_progress_bar_config(disable=True)
    found: dict[tuple[int, int], list[float]] = {}
    patch = apply(pipe, "nabla", mass=mass, window=(3, 1, 1), tile=(1, 4, 4), block=16)
    with patch, capture(patch) as seen:
        generate(pipe, prompt=PROMPT, seed=0, **dc.asdict(clip))
        for one in seen:
            found.setdefault((one.step, one.site.layer), one.blocks.density()[0].tolist())
    layers = sorted({layer for _, layer in found})
    return [[x for layer in layers for x in found[step, layer]] for step in sorted({step for step, _ in found})]


def balance_figures(
    densities: Sequence[Sequence[float]], *, processes: Sequence[int] = (2, 4, 8), seed: int = 0
) -> dict[str, Any]:
    """Slowest over mean of 12, 24 and 40 heads, in order and balanced.

    Recorded: the twelve heads of one step as if they were one layer; 24 and 40 heads are drawn from those of all steps.
    Made: loads from 1 to 5 at random. Worst and mean of the steps, or of as many draws. And what a balance that is kept
    from step to step does (`HeadBalance`), on the recorded twelve.
    """
    pool = [x for row in densities for x in row]
    draw = random.Random(seed)
    sources: dict[str, Callable[[int, int], list[float]]] = {
        "recorded": lambda heads, i: list(densities[i]) if heads == 12 else [draw.choice(pool) for _ in range(heads)],
        "1 to 5": lambda heads, _: [draw.uniform(1, 5) for _ in range(heads)],
    }
    rows = []
    for name, of in sources.items():
        for heads in (12, 24, 40):
            many = [of(heads, i) for i in range(len(densities))]
            rows += [
                {"source": name, "heads": heads, "processes": count, **_spread(many, count)} for count in processes
            ]
    kept = []
    for count in processes:
        held = HeadBalance(12, count)
        seen = [held.update(row) for row in densities]
        worst = max(x.after for x in seen)
        kept.append({"processes": count, "plans": held.plans, "steps": len(seen), "worst": _rounded(worst)})
    spread = sorted(max(row) / min(row) for row in densities)
    return {"rows": rows, "kept": kept, "spread": _rounded([spread[0], spread[-1]])}


def _spread(many: Sequence[Sequence[float]], processes: int) -> dict[str, Any]:
    kinds = {
        "naive": [imbalance(x, heads_in_order(len(x), processes)) for x in many],
        "equal": [imbalance(x, assign_heads(x, processes)) for x in many],
        "free": [imbalance(x, assign_heads(x, processes, equal=False)) for x in many],
        "least": [least_imbalance(x, processes, equal=False) for x in many],
    }
    return {name: _rounded([sum(x) / len(x), max(x)]) for name, x in kinds.items()}


def _rounded(value: Any) -> Any:
    return [_rounded(x) for x in value] if isinstance(value, list) else float(f"{value:.4g}")
