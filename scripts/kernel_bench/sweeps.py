"""Ceilings of the device, and attention forward and backward over the shapes of the plan, with dense beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vsparse

from . import descriptors, plan
from .clock import Candidate, Timing, attempt, interleaved
from .inputs import Inputs, Triple, executed_pairs, make, random_map
from .plan import Group, Step
from .session import Session

DENSE = {
    "cuda": {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION},
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
}


def ceilings(session: Session) -> None:
    """What the device can do at best: a large matrix product, a large copy."""
    size, words = 256, 1 << 20
    if not session.dry:
        size, words = 8192, min(1 << 30, torch.cuda.get_device_properties(session.device).total_memory // 64)
    pairs = [[torch.randn(size, size, device=session.device, dtype=session.dtype) for _ in range(2)] for _ in range(2)]
    product = Candidate("matrix", lambda i: pairs[i % 2][0] @ pairs[i % 2][1])
    source = torch.randn(words // 2, device=session.device).repeat(2)  # not zeros, and quickly made
    target = torch.empty_like(source)
    copy = Candidate("copy", lambda _: target.copy_(source))
    for candidate, work, unit in ((product, 2.0 * size**3, "FLOP/s"), (copy, 8.0 * words, "B/s")):
        timing = interleaved([candidate], session.device, session.turn)[candidate.name]
        value = work / (timing.ms * 1e-3)
        session.report.data["ceilings"][candidate.name] = {"value": value, "unit": unit, **timing.json()}
        session.screen.say(f"ceiling, {candidate.name}: {value / 1e12:.3g} T{unit} {timing.words}")
    session.free()


def dense_call(backend: SDPBackend, sets: list[Triple]) -> Callable[[int], Tensor]:
    def call(i: int) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*sets[i % len(sets)])

    return call


def graphs(outputs: Callable[[int, Triple], Tensor], sets: list[Triple], gradients: list[Tensor]) -> Callable[..., Any]:
    """A call that runs the backward alone: forwards are run once for each input set and kept."""
    kept = []
    for i, (values, gradient) in enumerate(zip(sets, gradients, strict=True)):
        leaves = tuple(x.detach().requires_grad_() for x in values)
        with torch.enable_grad():
            kept.append((outputs(i, leaves), leaves, gradient))

    def call(i: int) -> tuple[Tensor, ...]:
        out, leaves, gradient = kept[i % len(kept)]
        return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    return call


def _dense(session: Session, inputs: Inputs, step: Step) -> list[Candidate]:
    found = []
    for name, backend in DENSE[session.device.type].items():
        call: Callable[[int], Any] = dense_call(backend, inputs.heads_first)
        if step == "backward":
            gradients = [torch.randn_like(first) for first, _, _ in inputs.heads_first]

            def outputs(_: int, leaves: Triple, backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(*leaves)

            made, words = attempt(lambda o=outputs, g=gradients: graphs(o, inputs.heads_first, g))
            call = made or _failing(words)
        found.append(Candidate(f"dense {name}", call))
    return found


def _failing(words: str) -> Callable[[int], Any]:
    def call(_: int) -> Any:
        raise RuntimeError(words)

    return call


def _sparse(inputs: Inputs, blocks: vsparse.BlockMap, step: Step) -> Callable[[int], Any]:
    if step == "forward":
        return lambda i: vsparse.block_sparse_attention(*inputs.sets[i % len(inputs.sets)], blocks)
    made, words = attempt(
        lambda: graphs(
            lambda _, leaves: vsparse.block_sparse_attention(*leaves, blocks)[0], inputs.sets, inputs.gradients
        )
    )
    return made or _failing(words)


def _described(inputs: Inputs, blocks: vsparse.BlockMap) -> Callable[[int], Any]:
    call = _sparse(inputs, blocks, "forward")

    def forced(i: int) -> Any:
        with descriptors.forced():
            return call(i)

    return forced


def _beside(timing: Timing, described: Timing | None, refusal: str) -> dict[str, Any]:
    """The forward with tensor descriptors beside the shipped one; ``ratio``: time of the shipped one over its time."""
    if described is None or described.words:
        return {"status": "refused" if described is None else "failed", "words": refusal or described.words}
    return {"status": "measured", "words": "", **described.json(), "ratio": timing.ms / described.ms}


def measure(session: Session, group: Group, step: Step) -> list[dict[str, Any]]:
    """The rows of one group, one for each density; refused ones say why."""
    row: dict[str, Any] = {
        **_shape(group, step), "dtype": str(session.dtype).removeprefix("torch."),
        "target": plan.target(group.block, group.width, step),
    }  # fmt: skip
    refusal = session.verdicts.refusal(group.width, group.block, session.dtype, step)
    if refusal:
        return [{**row, "asked_density": x, "status": "refused", "words": refusal} for x in group.densities]
    heads = plan.dense_heads(group, step)
    with torch.no_grad():
        inputs = make(group, session.device, session.dtype, heads)
        maps = {x: random_map(inputs.q, inputs.k, group.heads, x, seed=7) for x in group.densities}
        candidates = _dense(session, inputs, step)
        candidates += [Candidate(f"density {x}", _sparse(inputs, blocks, step)) for x, blocks in maps.items()]
        without = "" if step == "forward" else "the backward has none"
        without = without or session.verdicts.descriptors(group.width, group.block, session.dtype)
        for x, blocks in maps.items() if not without else ():
            candidates.append(Candidate(f"descriptors {x}", _described(inputs, blocks)))
        timings = interleaved(candidates, session.device, session.turn)
    dense = _dense_row(session, group, heads, step, timings)
    rows = []
    for density, blocks in maps.items():
        timing = timings[f"density {density}"]
        done = plan.flops(executed_pairs(blocks, 1, group.heads), group.width, step)
        rate = done / (timing.ms * 1e-3)
        executed = float(blocks.density().mean())
        floor = plan.floor_seconds(group, executed, step, session.ceiling("matrix"), session.ceiling("copy"))
        best = min((x["ms"] for x in dense if x["status"] == "measured"), default=math.nan)
        rows.append(
            {
                **row, **timing.json(), "asked_density": density, "density": executed,
                "kept": int(blocks.count[0, 0, 0]), "status": "failed" if timing.words else "measured",
                "tflops": rate / 1e12, "of_matrix": rate / session.ceiling("matrix"), "floor_ms": floor * 1e3,
                "dense": dense, "times_dense": best / timing.ms, "words": timing.words,
                "descriptors": _beside(timing, timings.get(f"descriptors {density}"), without),
            }
        )  # fmt: skip
    return rows


def _dense_row(
    session: Session, group: Group, heads: int, step: Step, timings: dict[str, Timing]
) -> list[dict[str, Any]]:
    """Dense attention beside a group; ``ms`` is scaled from the heads it was timed on to all heads."""
    found = []
    for name, timing in timings.items():
        if name.startswith("dense"):
            rate = plan.flops(float(group.slots**2) * heads, group.width, step) / (timing.ms * 1e-3)
            found.append(
                {
                    "name": name, "ms": timing.ms * group.heads / heads, "timed_heads": heads, "tflops": rate / 1e12,
                    "of_matrix": rate / session.ceiling("matrix"), "words": timing.words,
                    "status": "failed" if timing.words else "measured",
                }
            )  # fmt: skip
    return found


def sweep(session: Session, step: Step, seconds: float) -> None:
    """Groups by priority until ``seconds`` are used; whatever is left out is reported.

    The plan goes by estimates. When the groups take less, those that it left out get their turn.
    """
    report, reserve = session.report, session.left - seconds
    everything = plan.tiny_groups() if session.dry else plan.all_groups()
    kept, spare = plan.cover(everything, step, seconds)
    session.screen.say(f"{step}: {len(kept)} of {len(everything)} groups planned for {seconds:.0f} s")
    dropped: list[plan.Dropped] = []
    spent = guessed = 0.0
    for group in [*kept, *(x.group for x in spare)]:
        left, cost = session.left - reserve, plan.estimate(group, step)
        expected = cost * (min(2.0, max(0.3, spent / guessed)) if guessed else 1.0)
        if not group.must and expected > left:
            dropped.append(plan.Dropped(group, step, f"expected {expected:.1f} s, {max(0.0, left):.1f} s left"))
            continue
        rows, words = attempt(lambda group=group: measure(session, group, step))
        rows = rows or _failed(group, step, words)
        report.data[step] += rows
        session.free()
        spent, guessed = spent + left - (session.left - reserve), guessed + cost
        for row in itertools.islice(rows, 1 if rows[0]["status"] != "measured" else None):
            session.screen.say(f"{step} {group.name} {line(row)}")
    report.data["dropped"] += [
        {**_shape(x.group, step), "densities": list(x.group.densities), "reason": x.reason} for x in dropped
    ]
    if dropped:
        session.screen.say(f"{step}: {len(dropped)} groups dropped for lack of time, the first {dropped[0].group.name}")


def _failed(group: Group, step: Step, words: str) -> list[dict[str, Any]]:
    row = {**_shape(group, step), "status": "failed", "words": words}
    return [{**row, "asked_density": density} for density in group.densities]


def _shape(group: Group, step: Step) -> dict[str, Any]:
    return {
        "pass": step, "slots": group.slots, "heads": group.heads, "head_dim": group.width, "block": list(group.block),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    if row["status"] != "measured":
        return f"{row['status']}: {row['words']}"
    beside = row["descriptors"]
    words = f", by descriptors {beside['ms']:.3f} ms" if beside["status"] == "measured" else ""
    return (
        f"density {row['density']:.3f}: {row['ms']:.3f} ms, {row['tflops']:.3g} TFLOP/s, "
        f"{row['of_matrix']:.2f} of the matrix ceiling (target {row['target']:.2f}), "
        f"{row['times_dense']:.2f} x dense{words}"
    )
