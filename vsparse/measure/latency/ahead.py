"""What a plan takes, before anything runs: seconds of the attention and of a whole step, by the cost model."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vsparse.cost import phases
from vsparse.host import find_roots, training_host
from vsparse.measure.latency.layer import assumed, predict_site
from vsparse.measure.latency.model import predicted
from vsparse.measure.latency.rates import Rates, kept_rates
from vsparse.measure.latency.timeline import KERNEL
from vsparse.measure.latency.work import Work, counting
from vsparse.measure.pipelines import placed
from vsparse.measure.skeleton import pipeline_around
from vsparse.planning import Plan
from vsparse.training.predict import bring_to_cpu, twin_on_meta

__all__ = ["Machine", "Times", "machines", "plan_times", "step_work", "times_of"]

_COUNTED = torch.bfloat16


@dc.dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates, and the bytes of a number in the dtype that they hold for."""

    name: str
    rates: Rates
    itemsize: int


@dc.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one denoising step on one machine, the mean over a generation.

    Args:
        dense, sparse: The self-attention of all layers, full and as the plan has it: choosing and packing included.
        rest: Everything else that the transformer computes; None where it was not counted.
    """

    machine: Machine
    dense: float
    sparse: float
    rest: float | None

    @property
    def steps(self) -> tuple[float, float] | None:
        """A whole step, dense and sparse."""
        return None if self.rest is None else (self.dense + self.rest, self.sparse + self.rest)

    @property
    def share(self) -> float | None:
        """Of a dense step that is self-attention: what bounds the gain, however sparse it is."""
        return None if self.steps is None else self.dense / self.steps[0]


def machines() -> list[Machine]:
    """This one, where its rates are kept, and the assumed one."""
    device, dtype = placed(None, None)
    kept, sheet = kept_rates(device, dtype), assumed()
    here = [] if kept is None else [Machine(name="this machine", rates=kept, itemsize=dtype.itemsize)]
    return [*here, Machine(name=sheet.device, rates=sheet, itemsize=torch.bfloat16.itemsize)]


def times_of(
    made: Plan, target: Any, size: Mapping[str, int | None], *, steps: int | None, batch: int
) -> tuple[list[Times], str]:
    """The times of a plan on every machine.

    Args:
        made: With a size. target, size, steps, batch: As `vsparse.plan` was given them.

    Returns:
        The times, and why the rest of a step could not be counted, or nothing.
    """
    given = {name: value for name, value in size.items() if value is not None}
    work, why = None, ""
    try:
        work = step_work(target, **given)
    except ValueError as error:
        why = str(error)
    return [plan_times(made, one, steps=steps, batch=batch, work=work) for one in machines()], why


def plan_times(
    made: Plan, machine: Machine, *, steps: int | None, batch: int, work: Mapping[str, Work] | None
) -> Times:
    """The times of a plan with a size.

    Args:
        steps, batch: As of `vsparse.plan`; samples run one after the other. work: of `step_work`, or None.
    """
    assert made.grid is not None
    root = made.sites[0].root if made.sites else ""  # experts take turns: a step runs one of them
    known: dict[object, dict[str, float]] = {}
    dense = sparse = 0.0
    for site in made.sites:
        if site.root != root:
            continue
        method = made.method.of(site)
        layout = method.layout(made.grid, site)
        kind = (method, layout.key, method.static_pattern(site))
        if kind not in known:
            parts = predict_site(method, layout, site, machine.rates, machine.itemsize)
            known[kind] = {phase: sum(seconds.values()) for phase, seconds in parts.items()}
        ran = [0.0 if x == "output" else known[kind][x] for x in phases(made.method, made.schedule, site, steps=steps)]
        dense += batch * known[kind]["dense"]
        sparse += batch * sum(ran) / len(ran)
    rest = None
    if work is not None:
        rest = batch * sum(predicted(_wide(one, machine), machine.rates) for p, one in work.items() if p != KERNEL)
    return Times(machine=machine, dense=dense, sparse=sparse, rest=rest)


def _wide(work: Work, machine: Machine) -> Work:
    return dc.replace(work, moved=work.moved * machine.itemsize / _COUNTED.itemsize)


def step_work(target: Any, *, height: int, width: int, num_frames: int) -> dict[str, Work]:
    """What one call of a transformer computes and moves, by part, one sample; it runs without values.

    Args:
        target: A text-to-video pipeline, or a transformer that one is known for; with weights or without.

    Raises:
        ValueError: another target, a size that it would cut or pad, or a model whose forward needs values.
    """
    pipe = pipeline_around(target) if isinstance(target, nn.Module) else target
    side = training_host(pipe)
    model: Any = find_roots(pipe)[1][0].module
    twin = twin_on_meta(model, _COUNTED)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        bring_to_cpu(twin)
        noisy, text = side.blank(num_frames, height, width, batch=1)
        with counting(twin) as found:
            try:
                side.forward(twin, noisy, torch.zeros(1), text)
            except RuntimeError as error:
                why = str(error).partition("\n")[0]
                raise ValueError(f"{type(model).__name__} does not run without values: {why}") from error
    return found
