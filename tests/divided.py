"""A host whose video several processes share, against the same host alone: outputs, losses and gradients in float64.

The processes choose the same maps as one does, unless a score is torn in half by rounding; so in float64 what they find
may differ from the host alone by rounding only. It must be less than what the stock host differs by in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import warnings
from collections.abc import Mapping
from typing import Any

import compiling
import rows
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import vsparse
from vsparse.parallel.context import ContextParallel

Found = dict[str, Tensor]


@dc.dataclass(frozen=True, kw_only=True)
class Case:
    """How a host is divided.

    Args:
        host, method: Rows of `rows`. parallel: how many processes in which roles. heads: of the host. options: of the
            method, None: those of its row. grid, batch: of the video. checkpointing: of activations.
        order: Of diffusers' own `enable_parallelism`, "before" or "after" the patch; None: vsparse divides by itself.
        compiled: Of what the processes run, one of `compiling.WAYS`, the backend, and when: "before" or "after" the
            patch. None: nothing.
    """

    host: str
    method: str
    parallel: ContextParallel
    heads: int = 3
    options: Mapping[str, Any] | None = None
    grid: tuple[int, int, int] = rows.SMALL
    batch: int = 2
    checkpointing: bool = False
    order: str | None = None
    compiled: tuple[str, str, str] | None = None

    @property
    def given(self) -> Mapping[str, Any]:
        """Options of the method."""
        return rows.METHODS[self.method].sparse if self.options is None else self.options


def compared(case: Case) -> dict[str, float]:
    """The worst error of each phase, in units of what float32 makes of the stock host; called by every process."""
    return {phase: _compared(case, phase) for phase in rows.sparse_phases(case.method, case.given)}


def _compared(case: Case, phase: str) -> float:
    with_grad = phase != "output"
    alone = _run(case, phase, torch.float64, None, with_grad)
    shared = _run(case, phase, torch.float64, case.parallel, with_grad)
    stock = {dtype: _stock(case, dtype, with_grad) for dtype in (torch.float64, torch.float32)}
    idle = shared.keys() - alone.keys()
    # A compiler gives zeros where nothing asks for a gradient.
    assert alone.keys() <= shared.keys(), alone.keys() - shared.keys()
    assert not any(bool(shared[name].any()) for name in idle) if case.compiled else not idle, idle
    scale = {name: _distance(stock[torch.float32][name], x) for name, x in stock[torch.float64].items()}
    worst = 0.0
    for name, wanted in alone.items():
        # What the method has added has no twin in the stock host: the largest of its errors is allowed there.
        allowed = scale.get(name, max(scale.values()))
        worst = max(worst, _distance(shared[name], wanted) / max(allowed, 1e-9))
    return worst


def _distance(found: Tensor, wanted: Tensor) -> float:
    assert not bool(found.isnan().any())
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))


def _values(case: Case, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = rows.build(case.host, dtype=dtype, heads=case.heads)
    return model, rows.prompt(case.host, inputs, case.grid, batch=case.batch)


def _stock(case: Case, dtype: torch.dtype, with_grad: bool) -> Found:
    model, values = _values(case, dtype)
    return _collect(model, lambda: model(**values)[0], {}, with_grad)


def _run(case: Case, phase: str, dtype: torch.dtype, parallel: ContextParallel | None, with_grad: bool) -> Found:
    model, values = _values(case, dtype)
    by_diffusers = parallel is not None and case.order is not None
    if by_diffusers and case.order == "before":
        enable_parallelism(model, case.parallel)
    own = None if by_diffusers else parallel
    way, backend, when = case.compiled if case.compiled and parallel else ("", "", "")
    host: Any = compiling.compiled(model, way, backend) if when == "before" else model
    if when == "before":
        rows.forward(host, values)  # what was compiled for the stock model must not be used again
    with rows.randomise(vsparse.apply(host, case.method, parallel=own, **case.given)) as patch:
        if by_diffusers and case.order == "after":
            enable_parallelism(model, case.parallel)
        model.train(with_grad)
        if case.checkpointing:
            model.enable_gradient_checkpointing()
        if when == "after":
            host = compiling.compiled(model, way, backend)

        def call() -> Tensor:
            outputs = rows.walk(patch, phase, lambda branch, step: host(**values)[0], ["cond"])
            return outputs[0]

        return _collect(model, call, patch, with_grad)


def _collect(model: nn.Module, call: Any, patch: Any, with_grad: bool) -> Found:
    with contextlib.nullcontext() if with_grad else torch.no_grad():
        out = call()
        losses = patch.auxiliary_losses() if patch else {}
        found = {"output": out.detach(), **{f"loss {name}": x.detach() for name, x in losses.items()}}
        if with_grad:
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
            loss = (out * weight.to(out.dtype)).mean() + sum(losses.values())
            loss.backward()
            if patch:
                patch.sum_gradients()
            found |= {f"gradient {name}": x for name, x in rows.gradients(model).items()}
    return found


def enable_parallelism(model: nn.Module, parallel: ContextParallel, **plan: Any) -> None:
    """diffusers' own division; it asks for an accelerator even where gloo runs on CPUs."""
    from diffusers import ContextParallelConfig

    counted, torch.accelerator.device_count = torch.accelerator.device_count, lambda: 1
    kind, torch._C._get_accelerator = torch._C._get_accelerator, lambda: torch.device("cpu")
    try:
        replicas = dist.get_world_size() // parallel.size
        mesh = init_device_mesh(
            "cpu", (replicas, parallel.ring, parallel.ulysses), mesh_dim_names=("replicas", "ring", "ulysses")
        )
        config = ContextParallelConfig(ring_degree=parallel.ring, ulysses_degree=parallel.ulysses, mesh=mesh)
        model.enable_parallelism(config=config, **plan)
    finally:
        torch.accelerator.device_count, torch._C._get_accelerator = counted, kind


def balanced(parallel: ContextParallel, method: str, heads: int) -> tuple[float, int, dict[str, float]]:
    """Ten generations of three forwards whose heads may move between two of them: the worst error, heads that moved and
    plans that were made, and what stats say."""
    model, values = _values(Case(host="wan", method=method, parallel=parallel, heads=heads), torch.float64)
    narrow, _ = _values(Case(host="wan", method=method, parallel=parallel, heads=heads), torch.float32)
    options = rows.METHODS[method].sparse

    def made(patch: vsparse.Patch) -> list[Tensor]:
        with patch.generation(3):
            return [_step(patch, i) for i in range(3)]

    def _step(patch: vsparse.Patch, i: int) -> Tensor:
        with patch.step(i):
            found: Tensor = model(**values)[0]
            return found

    with torch.no_grad():
        with vsparse.apply(model, method, **options) as patch:
            wanted = made(patch)
        known = _distance(narrow(**rows.cast_inputs(values, torch.float32))[0], model(**values)[0])
        with vsparse.apply(model, method, parallel=dc.replace(parallel, balance=1.0), **options) as patch:
            found = [made(patch) for _ in range(10)]
            moved = sum(x.last.moved for x in patch._runtimes[0].division._balance.values() if x.last is not None)
            plans = sum(x.plans for x in patch._runtimes[0].division._balance.values())
            worst = max(_distance(x, y) for one in found for x, y in zip(one, wanted, strict=True))
            return worst / known, moved + plans, patch.stats()["imbalance"]


def counted(parallel: ContextParallel) -> tuple[float, float]:
    """Of one dense and one sparse layer: the executed density that stats say, and the one of the sparse layer."""
    model, values = _values(Case(host="wan", method="sta", parallel=parallel, heads=2), torch.float32)
    schedule = vsparse.Schedule(dense_layers=1)
    with vsparse.apply(model, "sta", schedule=schedule, parallel=parallel, **rows.METHODS["sta"].sparse) as patch:
        rows.forward(model, values)
        found = patch.stats()
        return found["density"], found["sparse_density"]


def warned(parallel: ContextParallel) -> list[str]:
    """Warnings of two forwards that diffusers divides."""
    model, values = _values(Case(host="wan", method="vsa", parallel=parallel, heads=4, grid=(4, 4, 6)), torch.float32)
    enable_parallelism(model, parallel)
    with vsparse.apply(model, "vsa", **rows.METHODS["vsa"].sparse), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            rows.forward(model, values)
        return [str(one.message) for one in seen if str(one.message).startswith("vsparse")]
