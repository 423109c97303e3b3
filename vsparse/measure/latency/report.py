"""What ``vsparse latency`` does: load, measure, write."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vsparse.host import find_roots
from vsparse.measure.demo import device_words, environment
from vsparse.measure.latency.figures import Latency
from vsparse.measure.latency.layer import Layer, assumed, case_of, measure_layer, predict_layer, refusal
from vsparse.measure.latency.page import layer_page, page
from vsparse.measure.latency.rates import kept_rates, machine_rates
from vsparse.measure.latency.rounds import take_turns
from vsparse.measure.pipelines import placed
from vsparse.measure.recall_report import as_json, write_text
from vsparse.methods import Method
from vsparse.parallel.context import ContextParallel
from vsparse.profile import Profile
from vsparse.schedule import Schedule

__all__ = ["ROUNDS", "STEPS", "measured", "one_layer", "write", "write_layer"]

STEPS = 6
"""Denoising steps of the embedded pipeline: rounds are worth more than steps."""
ROUNDS = 9
"""Of one layer."""


def measured(
    pipe: Any,
    method: Method | Profile,
    schedule: Schedule,
    asked: Mapping[str, Any],
    *,
    prompt: str,
    seed: int,
    seconds: float,
    rounds: int | None = None,
    again: bool = False,
    began: Callable[[str, int, int], None] = lambda *_: None,
    parallel: ContextParallel | None = None,
) -> Latency:
    """Measure a pipeline, dense and with a method.

    Args:
        pipe: It is left as it came. method, schedule: as of `vsparse.apply`. asked: size, frames, steps, guidance.
        seconds, rounds, parallel: as of `take_turns`. again: measure the rates of the machine anew; where processes
            share a video, those that are kept are used, or none. began: told what runs, how many runs are over, and how
            many there will be.
    """
    over = 0

    def told(name: str, count: int) -> None:
        nonlocal over
        began(name, over, 4 * count)
        over += name not in ("warm-up", "densities")

    asked = {**asked, "prompt": prompt, "seed": seed}
    runs, executed, work = take_turns(
        pipe, method, schedule, asked, seconds=seconds, rounds=rounds, began=told, parallel=parallel
    )
    began("rates", over, over)
    model: Any = find_roots(pipe)[1][0].module
    at = torch.device(pipe.device), model.dtype
    rates = kept_rates(*at) if parallel is not None else machine_rates(*at, again=again)
    where = environment()
    return Latency(
        pipeline=type(pipe).__name__,
        method=str(method),
        schedule=str(schedule),
        asked=asked if parallel is None else {**asked, "context_parallel": str(parallel)},
        device=device_words(at[0], where),
        runs=runs,
        executed=executed,
        environment=where,
        work=work,
        rates=rates,
    )


def one_layer(
    name: str,
    method: Method,
    *,
    size: Mapping[str, int | None],
    dtype: str | None = None,
    device: str | None = None,
    rounds: int | None = None,
    again: bool = False,
    began: Callable[[str, int, int], None] = lambda *_: None,
) -> Layer:
    """Predict one attention layer of a configuration, and measure it where that does not take too long.

    Args:
        name, size: As of `case_of`. method: that runs in it. dtype, device: as of `load_pipeline`. rounds: None: 9.
        again: measure the rates of the machine anew. began: as of `measured`.
    """
    case = case_of(name, **size)
    where, kind = placed(dtype, device)
    began("rates", 0, 0)
    rates = machine_rates(where, kind, again=again)
    machines = {"here": (rates, kind.itemsize), "H100, assumed": (assumed(), 2)}
    layout = method.layout(case.grid, case.site)
    found = Layer(
        case=case,
        method=str(method),
        dtype=str(kind).removeprefix("torch."),
        density=method.predicted_density(layout, case.site),
        predicted={machine: predict_layer(case, method, *given) for machine, given in machines.items()},
    )
    count = rounds or ROUNDS
    against = refusal(found.predicted["here"], count, where)
    if against:
        return dc.replace(found, refused=against)
    ran = measure_layer(
        case, method, where, kind, rounds=count, began=lambda done, total: began("one layer", done, total)
    )
    return dc.replace(found, measured=ran)


def write_layer(folder: Path, found: Layer) -> list[Path]:
    """Write the page and the figures of a layer into a folder."""
    where = environment()
    texts = {"layer.html": layer_page(found, where), "layer.json": as_json({**found.as_json(), "environment": where})}
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def write(folder: Path, found: Latency) -> list[Path]:
    """Write the report into a folder; each file is whole or not there."""
    written = {folder / "latency.json": as_json(found.as_json()), folder / "latency.html": page(found)}
    for path, text in written.items():
        write_text(path, text)
    return list(written)
