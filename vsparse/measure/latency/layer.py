"""One attention layer of a real configuration: predicted without weights, and measured where a device can."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import vsparse
from vsparse.cost import attention_flops
from vsparse.geometry import Grid
from vsparse.layouts import Layout
from vsparse.measure.latency.baselines import (
    BASELINES,
    DEFAULT,
    SLOWEST,
    Attention,
    Baseline,
    compared,
    default_attention,
    refusal_of,
)
from vsparse.measure.latency.intervals import Interval, interval, verdict
from vsparse.measure.latency.profiler import functions
from vsparse.measure.latency.rates import Rates
from vsparse.measure.latency.timeline import CHOOSE, KERNEL, PACK, REST, SEARCH, Clock, Timeline, clock_of
from vsparse.measure.machines import assumed_cluster
from vsparse.measure.recall import driven
from vsparse.measure.scaling import MODELS
from vsparse.measure.skeleton import skeleton
from vsparse.methods import Method, Site
from vsparse.methods.samples import Sample
from vsparse.schedule import Phase

__all__ = [
    "BOUND",
    "Case",
    "Layer",
    "Measured",
    "assumed",
    "case_of",
    "measure_layer",
    "phases_of",
    "predict_layer",
    "predict_site",
    "refusal",
]

BOUND = 60.0
"""Seconds that a measurement on a CPU may be predicted to take."""


@dc.dataclass(frozen=True, kw_only=True)
class Case:
    """The self-attention of one layer of a model at one size of video."""

    name: str
    grid: Grid
    heads: int
    head_dim: int

    @property
    def site(self) -> Site:
        """Of no model; not the first layer, which some methods leave dense."""
        return Site.alone(heads=self.heads, head_dim=self.head_dim, layer=1)


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Of one layer on this machine; phase "dense" is `DEFAULT`.

    Args:
        parts: Seconds by phase and part. whole: of a call by phase.
        speeds: `DEFAULT` over sparse by phase, round by round.
        baselines: Every dense attention that was tried, `DEFAULT` too. fastest: the name of the best of them.
        best_speeds: The fastest over sparse by phase, round by round.
    """

    parts: Mapping[str, Mapping[str, Interval]]
    whole: Mapping[str, Interval]
    speeds: Mapping[str, Interval]
    baselines: Mapping[str, Baseline]
    fastest: str
    best_speeds: Mapping[str, Interval]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """What came of it.

    Args:
        case, method, dtype: What was asked; the dtype is that of this machine.
        density: That the method predicts for a sparse call.
        predicted: Seconds by machine, phase and part; phase "dense" is full attention.
        measured: On this machine; None: it was refused, and ``refused`` says why.
    """

    case: Case
    method: str
    dtype: str
    density: float
    predicted: Mapping[str, Mapping[str, Mapping[str, float]]]
    measured: Measured | None = None
    refused: str = ""

    def errors(self, machine: str) -> dict[str, float]:
        """Of the predicted whole by phase, as a share of what was measured; empty where nothing was."""
        found = self.predicted[machine]
        whole = self.measured.whole if self.measured else {}
        return {phase: sum(found[phase].values()) / seen.median - 1.0 for phase, seen in whole.items()}

    def verdicts(self) -> list[str]:
        """By phase, whether a speed-up is quoted: against the fastest dense attention, and against `DEFAULT`."""
        if self.measured is None:
            return []
        ran, words = self.measured, "against the fastest dense attention measured in this run"
        said = []
        for phase, speed in ran.speeds.items():
            said.append(f"{phase}: {words} ({ran.fastest}): {verdict(ran.best_speeds[phase])}")
            if ran.fastest != DEFAULT:
                said.append(f"{phase}: against {DEFAULT}: {verdict(speed)}")
        return said

    def as_json(self) -> dict[str, Any]:
        """Everything; what was measured stands beside the rest."""
        ran = {field.name: None for field in dc.fields(Measured)} if self.measured is None else dc.asdict(self.measured)
        found = {**dc.asdict(self), **ran, "measured": ran["parts"], "verdicts": self.verdicts()}
        del found["parts"]
        return {**found, "errors": self.errors(next(iter(self.predicted)))}


def case_of(name: str, *, height: int | None = None, width: int | None = None, frames: int | None = None) -> Case:
    """A configuration by its name in `scaling.MODELS`, or the first attention layer of a model and a size of video.

    Args:
        name: Such as "Wan 2.1 14B, 720p"; or what `skeleton` takes, with height, width and frames.

    Raises:
        ValueError: no such name and no size, or a size for a name that has one.
    """
    size = (height, width, frames)
    for model in MODELS:
        if model.name == name:
            if any(x is not None for x in size):
                raise ValueError(f"--layer {name!r} has its size of video; leave --height, --width and --frames out")
            return Case(name=name, grid=model.grid, heads=model.heads, head_dim=model.head_dim)
    if None in size:
        known = ", ".join(repr(model.name) for model in MODELS)
        raise ValueError(
            f"--layer takes one of {known}, or a model with --height, --width and --frames; got {name!r} without a size"
        )
    made = vsparse.plan(skeleton(name), "dense", height=height, width=width, num_frames=frames)
    assert made.grid is not None
    first = made.sites[0]
    words = f"{name}, {frames} x {height} x {width}"
    return Case(name=words, grid=made.grid, heads=first.heads, head_dim=first.head_dim)


def phases_of(method: Method) -> tuple[Phase, ...]:
    """The phases of a method that are not dense: a method that keeps maps has three of them."""
    return ("search", "refresh", "reuse") if method.state_phases else ("search",)


def predict_layer(case: Case, method: Method, rates: Rates, itemsize: int) -> dict[str, dict[str, float]]:
    """`predict_site` of a case."""
    return predict_site(method, method.layout(case.grid, case.site), case.site, rates, itemsize)


def predict_site(
    method: Method, layout: Layout, site: Site, rates: Rates, itemsize: int
) -> dict[str, dict[str, float]]:
    """Seconds of one call by phase and part, one sample.

    Attention takes the time of its FLOPs or of reading q, k, v and writing the result, whichever is longer. Choosing
    takes the FLOPs that the method declares, and reads q and k; packing reads and writes q, k, v and the result.

    Args:
        method: That runs at the site. itemsize: bytes of a number.
    """
    tensor = float(layout.slots * site.heads * site.head_dim * itemsize)
    found: dict[str, dict[str, float]] = {}
    least = 4.0 * tensor / rates.memory
    found["dense"] = {KERNEL: max(rates.dense.seconds(attention_flops(layout, site, 1)), least)}
    density = method.predicted_density(layout, site)
    for phase in phases_of(method):
        parts = {} if layout.identity else {PACK: 8.0 * tensor / rates.memory}
        search = method.search_flops(layout, site, 1, phase)
        if phase in method.exact_phases:
            parts[SEARCH] = rates.dense.seconds(attention_flops(layout, site, 1) + search)
        else:
            parts[KERNEL] = max(rates.sparse.seconds(attention_flops(layout, site, 1, density)), least)
            if search:
                parts[CHOOSE] = rates.products.seconds(search) + 2.0 * tensor / rates.memory
        found[phase] = parts
    return found


def assumed() -> Rates:
    """An H100 by its data sheet and the shares of it that `machines` assumes, in bfloat16."""
    dense, sparse = (assumed_cluster("nvlink4", dense=kind).rate for kind in (True, False))
    assert dense.memory is not None
    return Rates(
        device="H100, assumed",
        dtype="bfloat16",
        date="",
        products=dense,
        dense=dense,
        sparse=sparse,
        memory=dense.memory,
        call=dense.overhead,
    )


def refusal(predicted: Mapping[str, Mapping[str, float]], rounds: int, device: torch.device) -> str:
    """Why a CPU does not measure this, or nothing: it would take longer than `BOUND`.

    Full attention counts three times: a CPU has two backends, and what PyTorch chooses of them.
    """
    each = {phase: sum(parts.values()) for phase, parts in predicted.items()}
    seconds = (rounds + 1) * (sum(each.values()) + 2 * each["dense"])
    if device.type != "cpu" or seconds <= BOUND:
        return ""
    words = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} minutes"
    return f"not measured: on this CPU it would take about {words}, more than {BOUND:.0f} s; the figures are predicted"


def measure_layer(
    case: Case,
    method: Method,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rounds: int,
    began: Callable[[int, int], None] = lambda *_: None,
    clock: Clock | None = None,
    baselines: Mapping[str, Attention] = BASELINES,
) -> Measured:
    """Time one layer on q, k and v of noise, each dense attention and each phase in turn.

    Noise has no structure: a method whose density follows from the data keeps another share of it than of a video.
    What a method adds in `combine` is not in it, as there is no attention input.

    Args:
        baselines: Dense attention besides `DEFAULT`, by name; what does not run is told with its reason.
    """
    clock = clock or clock_of(device)
    draw = torch.Generator(device).manual_seed(0)
    shape = (1, case.grid.tokens, case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, generator=draw, device=device, dtype=dtype) for _ in range(3))
    sample = Sample(grid=case.grid, q=q, k=k, v=v)
    module, call = driven(method, sample, layer=1)
    phases = phases_of(method)
    dense: dict[str, Attention] = {"dense": default_attention, **baselines}

    def once(name: str) -> dict[str, float]:
        clock.now()  # what was launched before is over
        timeline = Timeline(clock)
        with functions(timeline), torch.no_grad():
            if name in dense:
                timeline.enter(KERNEL)
                dense[name](q, k, v)
            else:
                module.phase = name  # type: ignore[assignment]
                module.state.bind(module.state.version("default"))
                timeline.enter(CHOOSE)
                module.core(q, k, v, None, call)
            timeline.leave()
        if name in method.state_phases:
            module.state.staged.pop("pairs", None)
            module.state.commit("default", None)
        found: dict[str, float] = {}
        for span, seconds in timeline.end().items():
            if span.part != REST:
                found[span.part] = found.get(span.part, 0.0) + seconds
        return found

    began(0, rounds + 1)
    with torch.no_grad():
        refused = {name: why for name, run in baselines.items() if (why := refusal_of(run, q, k, v))}
    once("dense")
    usual = sum(once("dense").values())
    for name in [name for name in baselines if name not in refused]:
        if (seconds := sum(once(name).values())) > SLOWEST * usual:
            refused[name] = f"ran once, in {seconds:.3g} s, {seconds / usual:.3g} times as long as {DEFAULT}"
    for phase in phases:
        once(phase)
    order = [*(name for name in dense if name not in refused), *phases]
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in order}
    for number in range(rounds):
        began(number + 1, rounds + 1)
        for name in order if number % 2 == 0 else reversed(order):
            taken[name].append(once(name))
    return _measured(taken, phases, refused)


def _measured(
    taken: Mapping[str, Sequence[Mapping[str, float]]], phases: Sequence[str], refused: Mapping[str, str]
) -> Measured:
    """From seconds by name and part of each round; the names that are no phases are dense."""
    whole = {name: [sum(one.values()) for one in runs] for name, runs in taken.items()}
    shown = ("dense", *phases)
    full = {DEFAULT if name == "dense" else name: runs for name, runs in whole.items() if name not in phases}
    fastest, found = compared(full, refused)

    def speeds(dense: Sequence[float]) -> dict[str, Interval]:
        return {phase: interval([a / b for a, b in zip(dense, whole[phase], strict=True)]) for phase in phases}

    def parts(runs: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
        return {part: interval([one.get(part, 0.0) for one in runs]) for part in runs[0]}

    return Measured(
        parts={name: parts(taken[name]) for name in shown},
        whole={name: interval(whole[name]) for name in shown},
        speeds=speeds(whole["dense"]),
        baselines=found,
        fastest=fastest,
        best_speeds=speeds(full[fastest]),
    )
