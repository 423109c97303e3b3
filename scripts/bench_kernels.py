"""Block-sparse attention on a GPU: right, then fast. `make bench-gpu`.

One run of less than ten minutes: ceilings of the device, correctness of every configuration, properties that only a
device can show, forward and backward over shapes of video models with dense attention beside them, what a method
spends around the kernel, what moves tensors, the exact search, other kernels on the same lists. A configuration that is
wrong, or that was not checked, is refused for timing. Figures are medians of interleaved calls over rotating inputs.

Files in ``--out``: ``bench_kernels.json``, ``bench_kernels.md``, ``bench_kernels.png``. The JSON holds

- ``schema`` 1; ``dry_run`` bool; ``timings`` "measured", or for a dry run that they have no meaning
- ``environment``: date, GPU, driver, versions, commit, command line
- ``ceilings``: "matrix" and "copy", each ``value`` in ``unit`` (FLOP/s, B/s), and the timing
- ``stages``: for each ``seconds`` it took, and ``words`` when it broke off
- ``correctness``: a row for each configuration and pass: ``kind``, ``width`` (D), ``q_block``, ``k_block``, ``dtype``,
  ``variant``, ``pass``, ``status`` "pass", "fail" or "not measured", ``words``, ``errors`` as shares of the
  allowed, ``relative`` distance from the truth
- ``properties``: ``name``, ``what``, ``status`` "pass", "fail" or "not measured", ``words``, ``seconds``
- ``forward``, ``backward``: ``slots`` (S), ``heads``, ``head_dim``, ``block``, ``dtype``, ``asked_density``,
  ``density`` (executed), ``kept``, ``status`` "measured", "refused" or "failed", ``words``, ``ms`` (median),
  ``best_ms``, ``spread``, ``rounds``, ``tflops`` (executed: 4 pairs D, backward 2.5 times that), ``of_matrix`` and
  ``target`` (shares of the matrix ceiling), ``floor_ms``, ``times_dense``, ``dense``: ``name``, ``ms`` (scaled to all
  heads), ``timed_heads``, ``tflops``, ``of_matrix``, ``status``, ``words``; ``descriptors``: the forward that reads K
  and V through tensor descriptors, which is not the shipped one: ``status``, ``words``, ``ms``, ``ratio`` (time of the
  shipped one over its time)
- ``parts``: for each grid ``ms`` of every piece of a VSA call, ``sums_ms`` (a kernel, b + selection, c + packing,
  d + coarse branch), ``of_kernel``, ``targets``
- ``moving``: for each grid ``moved``: "pack", "unpack", "merge" (of two parts), each ``bytes``, ``rate`` (B/s) and
  ``of_copy`` (share of the copy ceiling); ``alone``: what attention takes longer through the code of context
  parallelism where one process has everything, as a share, and its ``target``
- ``search``: ``ms``, ``of_dense``, ``target``; ``baselines``: for each shape ``rows`` with ``name``, ``status``,
  ``words``, ``distance`` from ours, ``ms``, ``tflops``
- ``dropped``: groups that did not fit the budget: shape, ``densities``, ``reason``

Numbers that could not be taken are null. Exit codes: 0; 1 when a configuration is wrong or fails in its timing, or a
stage broke off; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Deterministic algorithms ask for it, before the first CUDA call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from kernel_bench import baselines, moving, plan, properties, samples, stages, sweeps, verdicts
from kernel_bench.clock import attempt
from kernel_bench.descriptors import VARIANT
from kernel_bench.report import DRY, Report
from kernel_bench.session import Screen, Session, environment

STAGES = ("ceilings", "correctness", "properties", "forward", "backward", "parts", "moving", "search", "baselines")
# What is left after the properties is divided in this proportion.
WEIGHTS = (("forward", 4.0), ("backward", 3.5), ("parts", 1.2), ("moving", 0.6), ("search", 0.8), ("baselines", 1.5))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(STAGES), help=f"stages, by commas, of {', '.join(STAGES)}")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for the whole run")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/bench"), help="folder")
    parser.add_argument("--workers", type=int, help="processes that check; 0: none but this one")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; timings have no meaning")
    parser.add_argument("--worker", metavar="DEVICE", help=argparse.SUPPRESS)
    parser.add_argument("--first-call", metavar="DEVICE", help=argparse.SUPPRESS)
    found = parser.parse_args(given)
    found.only = [name for name in found.only.split(",") if name]
    strange = [name for name in found.only if name not in STAGES]
    if strange or not found.only:
        parser.error(f"--only takes {', '.join(STAGES)}, got {', '.join(strange) or 'nothing'}")
    return found


def correctness(session: Session, only: list[str]) -> None:
    """Every configuration; or, when that is not asked for, those that the other stages need."""
    cases = samples.tiny_cases() if session.dry else samples.cases()
    if "correctness" not in only:
        cases = [
            x
            for x in cases
            if x.variant in ("", VARIANT) and (session.dry or (x.dtype == "bfloat16" and x.width in (64, 128)))
        ]
    done = 0

    def report(case: samples.Case, result: dict[str, object]) -> None:
        nonlocal done
        done += 1
        wrong = [f"{step}: {result[step]}" for step in plan.STEPS if result[step]]
        session.screen.say(f"check {done}/{len(cases)} {case.key}: {'; '.join(wrong) or 'pass'}")

    verdicts.run(
        cases, session.verdicts, script=session.script, device=session.device, tiny=session.dry,
        workers=session.workers, seconds=0.35 * session.budget, report=report,
    )  # fmt: skip
    session.report.data["correctness"] = session.verdicts.rows()


def run(session: Session, only: list[str]) -> None:
    """All stages that were asked for; the report is written after each."""
    data = session.report.data
    data["environment"] = environment(session.device, session.script)
    session.screen.say(", ".join(f"{name} {value}" for name, value in data["environment"].items()))

    def stage(name: str, call: Callable[[], object]) -> None:
        begin = time.perf_counter()
        _, words = attempt(call)
        data["stages"][name] = {"seconds": time.perf_counter() - begin, "words": words}
        if words:
            session.screen.say(f"{name} broke off: {words}")
        session.report.write()

    timed = [name for name, _ in WEIGHTS if name in only]
    if "ceilings" in only or {"forward", "backward", "moving"} & set(only):
        stage("ceilings", lambda: sweeps.ceilings(session))
    if set(only) - {"ceilings"}:
        stage("correctness", lambda: correctness(session, only))
    if "properties" in only:
        stage("properties", lambda: properties.run(session))
    calls: dict[str, Callable[[float], object]] = {
        "forward": lambda seconds: sweeps.sweep(session, "forward", seconds),
        "backward": lambda seconds: sweeps.sweep(session, "backward", seconds),
        "parts": lambda seconds: stages.parts(session, seconds),
        "moving": lambda seconds: moving.moving(session, seconds),
        "search": lambda seconds: stages.search(session, seconds),
        "baselines": lambda seconds: baselines.run(session, seconds),
    }
    for number, name in enumerate(timed):
        waiting = [pair for pair in WEIGHTS if pair[0] in timed[number:]]
        seconds = plan.shares(session.left, waiting)[name]
        stage(name, lambda name=name, seconds=seconds: calls[name](seconds))
    missing = session.report.plot()
    if missing:
        session.screen.say(missing)
    session.report.write()


def summary(report: Report) -> str:
    """The last lines of a run."""
    data = report.data
    count = {"pass": 0, "fail": 0, "not measured": 0}
    for row in data["correctness"]:
        count[row["status"]] += 1
    lines = [report.title, "correctness: " + ", ".join(f"{number} {name}" for name, number in count.items())]
    lines += [f"property {x['name']}: {x['status']} {x['words']}".rstrip() for x in data["properties"]]
    for step in plan.STEPS:
        lines += [
            f"{step} S={x['slots']} H={x['heads']} D={x['head_dim']} {x['block'][0]}x{x['block'][1]} {sweeps.line(x)}"
            for x in data[step]
        ]
    lines += [f"search S={x['slots']}: {x['status']} {x.get('of_dense', x['words'])}" for x in data["search"]]
    if data["dry_run"]:
        lines = [f"{line} ({DRY})" if number else line for number, line in enumerate(lines)]
    lines += [f"{len(data['dropped'])} groups dropped for lack of time", f"written to {report.folder}"]
    return "\n".join(lines)


def main() -> int:
    given = arguments()
    if given.dry_run:
        torch.set_num_threads(1)
    if given.worker:
        verdicts.serve(torch.device(given.worker), tiny=given.dry_run)
        return 0
    if given.first_call:
        print(json.dumps(properties.time_first_call(torch.device(given.first_call))))
        return 0
    if not given.dry_run and not torch.cuda.is_available():
        print("bench_kernels: no CUDA device here; --dry-run goes through the stages on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if given.dry_run else "cuda")
    workers = given.workers if given.workers is not None else 1 if given.dry_run else verdicts.default_workers()
    report = Report(given.out, dry=given.dry_run)
    screen = Screen(DRY if given.dry_run else "")
    session = Session(device, given.dry_run, given.budget, Path(__file__).resolve(), workers, report, screen)
    run(session, given.only)
    print(summary(report))
    broken = any(stage["words"] for stage in report.data["stages"].values())
    rows = [row for name in ("correctness", *plan.STEPS, "parts", "moving") for row in report.data[name]]
    return int(broken or any(row["status"] in ("fail", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
