"""Time launch configurations of block-sparse attention on a GPU against those that ship. `make tune-gpu`.

For each kernel, head dimension and block (of queries and of keys alike), beside the shipped configuration: tiles of
64 or 128 rows, no larger than the block; 1 to 4 stages; 4 warps with no cap, 128 or 168 registers (not for 128 x 128,
whose logits alone take 128), 8 warps with no cap or 128 (with 168 no second program fits, as with none). For the
forward on Hopper and later, each also with K and V read through tensor descriptors.

Each is first checked by the law, in processes that leave the code in the compiler's cache: ragged ends, empty and full
rows, NaN in keys that nobody keeps, poisoned outputs, the same bits twice. What does not compile, does not fit or is
wrong is never timed. Fewest changes from the shipped one come first. Then the kernel alone is timed, without its
launcher: all in turns, and the fastest `FINAL` with the shipped one once more.
Nothing is edited: the row to write is printed, with the limits of the shipped one; `make gate` says whether they hold.
In ``--out``: ``tune_kernels.txt``, and ``tune_kernels.json`` with ``environment`` and shape, ``rows`` (``ratio``: time
of the shipped over the best), ``trials`` (``status`` "timed", "refused", "failed" or "dropped" for lack of time,
``words``, ``errors`` as shares of the allowed, ``ms``, ``final``: timed once more, ``n_regs``, ``n_spills``).
Exit codes: 0; 1 when a shipped configuration is wrong or fails; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses as dc
import functools
import itertools
import json
import os
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1" if "--dry-run" in sys.argv else "0"  # read when triton is imported

import torch
from kernel_bench import check, inputs, report, verdicts
from kernel_bench.clock import Candidate, attempt, interleaved
from kernel_bench.law import law, poison
from kernel_bench.plan import Group
from kernel_bench.samples import Case, Sample, sample
from kernel_bench.session import Screen, Session, environment
from torch.nn.functional import pad

from vsparse import BlockMap
from vsparse.kernels.block_sparse import launch, tuning
from vsparse.kernels.tiles import Width, architecture

OUTPUTS = {"attend": ("out", "lse"), "grad_queries": ("dq",), "grad_keys": ("dk", "dv")}
WIDTHS, BLOCKS = (128, 64, 96, 80), (64, 128)  # what comes last is dropped first
CHECKS = 0.6  # share of the budget after which no check starts
LEAST = 4.0  # seconds that a row takes at the least
FINAL = 5
NEAR = 1.03  # times the best: a shipped configuration within it stays
LATE = "the time for checks was over"


@dc.dataclass(frozen=True)
class Row:
    """What one configuration is chosen for. ``block``: BQ and BK. ``key``: what `tuning.config` takes."""

    step: str
    width: int
    block: int

    def __str__(self) -> str:
        return f"{self.step} D={self.width} {self.block}x{self.block}"

    def key(self, device: torch.device) -> tuple[str, int, Width, int, int, int]:
        return self.step, architecture(device), Width.of(self.width), self.block, self.block, 2


@dc.dataclass(frozen=True)
class Trial(Row):
    """A configuration for it, flat, so that a worker can be handed it."""

    bm: int
    bn: int
    warps: int
    stages: int
    registers: int | None
    tma: bool = False

    @property
    def label(self) -> str:
        cap = f" r{self.registers}" if self.registers else ""
        return f"{self.bm}x{self.bn} w{self.warps} s{self.stages}{cap}{' tma' * self.tma}"

    def choice(self, device: torch.device) -> str:
        """The row of `tuning.py` that would make this the shipped configuration."""
        (step, arch, width, *_), cap = self.key(device), f", registers={self.registers}" if self.registers else ""
        row = f"Choice({self.bm}, {self.warps}, {self.stages}, {tuning.limits(*self.key(device), self.tma)}{cap})"
        tall, tile = "tall" if self.block > 64 else "not tall", "" if self.bn == 64 else f"; BN {self.bn}, now 64"
        if self.tma:
            step, tile = f"{step}_tma", f"{tile}; a row of DESCRIPTORS"
        return f"_{step}, arch {arch}, columns {width.D1 + width.D2}, {tall}: {row}{tile}"


def trials(row: Row, session: Session) -> list[Trial]:
    """The shipped configuration, that of the table with descriptors, then candidates, the fewest changes first;
    few and tiny ones when dry.
    """
    first = dc.astuple(tuning.config(*row.key(session.device)))
    sizes = [size for size in (64, 128) if size <= row.block]
    every = itertools.product(sizes, sizes, (4, 8), (1, 2, 3, 4), (None, 128, 168))
    found = [x for x in every if (x[2], x[4]) != (8, 168) and x[:3] != (128, 128, 4)]
    found = [(32, 64, 4, 1, None), (64, 32, 4, 2, 128)] if session.dry else found
    described = dc.astuple(tuning.config(*row.key(session.device), True))
    kinds = (False, True) if described[-1] else (False,)
    found = dict.fromkeys([first, described, *((*x, tma) for tma in kinds for x in found)])
    changes = {x: sum(a != b for a, b in zip(x, first, strict=True)) for x in found}
    ordered = sorted(found, key=lambda x: (x != first, x != described, changes[x]))
    return [Trial(*dc.astuple(row), *config) for config in ordered]


@contextlib.contextmanager
def force(trial: Trial) -> Iterator[None]:
    """Let the launcher take this configuration for its kernel."""
    shipped, chosen = launch.config, tuning.Config(*dc.astuple(trial)[3:])
    with mock.patch.object(launch, "config", lambda x, *rest: chosen if x == trial.step else shipped(x, *rest)):
        yield


def run(step: str, qkv: Any, made: Any, weights: Any, blocks: BlockMap) -> tuple[torch.Tensor, ...]:
    """The launcher that the kernel belongs to: the forward, or the backward of what the forward made."""
    scale = qkv[0].shape[-1] ** -0.5
    if step == "attend":
        return launch.block_sparse_attention(*qkv, blocks, scale=scale)
    return launch.block_sparse_attention_backward(*weights, *qkv, *made, blocks, scale=scale)


@functools.cache
def known(width: int, block: int, number: int, device: torch.device) -> tuple[Sample, dict[str, Any], list[Any]]:
    """Inputs of a check with this many blocks, the truth, and the reference in bfloat16."""
    # Capacity and number of blocks are multiples of 16, as in the shape that is timed, so that the code is the same.
    given = sample(Case("attention", width, block, block, "bfloat16"), device, (number * block, number * block))
    given.blocks = dc.replace(given.blocks, index=pad(given.blocks.index, (0, -given.blocks.capacity % 16)))
    plain = check._plain(given, torch.bfloat16)
    working = [plain, check._formula(given, plain), *([check._fused(given)] if device.type == "cpu" else [])]
    return given, check._plain(given, torch.float64), working


def examine(trial: Trial, device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Check one configuration; never raises. ``forward``: "" or what is wrong, whichever kernel it is."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    errors: dict[str, float] = {}

    def judge() -> str:
        given, truth, working = known(trial.width, trial.block, 3 if tiny else 16, device)
        if trial.tma and (against := launch.undescribed_keys(*given.planted[1:], given.blocks, trial.bn)):
            raise NotImplementedError("; ".join(against))
        made = out, lse = working[0]["out"], working[0]["lse"]
        weights = given.weights[0].to(out.dtype), torch.where(lse.isfinite(), given.weights[1], 0).to(lse.dtype)
        runs = []
        for _ in range(2):
            with force(trial), poison():
                found = run(trial.step, given.planted, made, weights, given.blocks)
                inputs.synchronize(device)
            runs.append(dict(zip(("out", "lse") if trial.step == "attend" else ("dq", "dk", "dv"), found, strict=True)))
        wrong = []
        for name in OUTPUTS[trial.step]:
            first, second = (each[name] for each in runs)
            words, errors[name] = law(name, first, [w[name] for w in working if name in w], truth[name])
            same = torch.equal(first.nan_to_num(1e30), second.nan_to_num(1e30))
            wrong += [words] * bool(words) + [f"{name}: two runs differ"] * (not same)
        return "; ".join(wrong)

    words, raised = attempt(judge)
    return {"forward": raised or words, "errors": errors}


def time_row(session: Session, row: Row, right: list[Trial], shape: Any, seconds: float) -> dict[str, dict[str, Any]]:
    """Timings of the configurations that were found right, the shipped one first, by label."""
    group = Group(shape.slots, shape.heads, row.width, (row.block, row.block), ())
    made = inputs.make(group, session.device, session.dtype, 1)
    blocks = inputs.random_map(made.q, made.k, shape.heads, min(1.0, shape.kept / made.k.blocks), seed=7)
    forwards = [run("attend", x, (), (), blocks) for x in made.sets]
    kernel, compiled = getattr(launch, row.step), {}

    def record(trial: Trial, i: int) -> list[Any]:
        noted: list[Any] = []
        note = {"__getitem__": lambda _, grid: lambda *args, **options: noted.extend((grid, args, options))}
        with force(trial), mock.patch.object(launch, row.step, type("Kernel", (), note)()):
            run(row.step, made.sets[i], forwards[i], (made.gradients[i], None), blocks)
        return noted

    # Pointers and strides of each input set do not depend on the configuration, so that outputs are shared; descriptors
    # of K and V, which stand among the options, do.
    args = [record(right[0], i)[1] for i in range(len(made.sets))]

    def replay(trial: Trial) -> Callable[[int], None]:
        noted = [record(trial, i) for i in range(len(args) if trial.tma else 1)]
        grid, options = noted[0][0], [each[2] for each in noted]
        return lambda i: compiled.update({trial.label: kernel[grid](*args[i % len(args)], **options[i % len(options)])})

    runs, found = [Candidate(trial.label, replay(trial)) for trial in right], {}
    if len(runs) > FINAL + 1:
        found = interleaved(runs, session.device, 0.3 * seconds)
        good = (x for x in runs[1:] if not found[x.name].words)
        runs = [runs[0], *sorted(good, key=lambda x: found[x.name].ms)[:FINAL]]
    last = interleaved(runs, session.device, min(session.turn, 0.3 * seconds))
    for name, x in {**found, **last}.items():
        code = {key: getattr(compiled.get(name), key, None) for key in ("n_regs", "n_spills")}
        state = {"status": "failed" if x.words else "timed", "words": x.words, "final": name in last}
        found[name] = {**state, **x.json(), **code}
    return found


def judge_row(session: Session, row: Row, shape: Any, seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of the report, and one for each of its trials."""
    listed, found = trials(row, session), {}
    results = {trial.label: session.verdicts.found[trial] for trial in listed}
    first, words = listed[0], results[listed[0].label]["forward"]
    status = "dropped" if words == LATE else "refused" if words else "failed"
    if not words and seconds < LEAST and not session.dry:
        status, words = "dropped", f"{max(0.0, seconds):.1f} s of the budget left, at least {LEAST:.0f} wanted"
    elif not words:
        right = [trial for trial in listed if not results[trial.label]["forward"]]
        found, words = attempt(lambda: time_row(session, row, right, shape, seconds))
        session.free()
    entries = {}
    for trial in listed:
        wrong = results[trial.label]["forward"]
        state = "refused" if wrong not in ("", LATE) else "failed" if status == "failed" and not wrong else "dropped"
        entry = {**dc.asdict(trial), "status": state, "words": wrong or words, "errors": results[trial.label]["errors"]}
        entries[trial.label] = {**entry, **(found or {}).get(trial.label, {})}
    timed = {t.label: t for t in listed if entries[t.label]["status"] == "timed" and entries[t.label]["final"]}
    if first.label not in timed:
        words = f"the shipped one: {words or entries[first.label]['words']}"
        return {**dc.asdict(row), "status": status, "words": words}, [*entries.values()]
    best = timed[min(timed, key=lambda label: entries[label]["ms"])]
    pair = {x: {"config": t.label, "ms": entries[t.label]["ms"]} for x, t in (("shipped", first), ("best", best))}
    behind = (ratio := pair["shipped"]["ms"] / pair["best"]["ms"]) > NEAR
    out = {"status": "measured", "words": f"shipped/best {ratio:.3f}", **pair, "ratio": ratio, "behind": behind}
    return {**dc.asdict(row), **out, "write": best.choice(session.device) if behind else ""}, [*entries.values()]


def text(data: dict[str, Any]) -> str:
    """The table, and the rows to write."""
    note = f" ({report.DRY})" if data["dry_run"] else ""
    cells = [["kernel", "D", "block", "shipped", "ms", "best", "ms", "shipped/best", ""]]
    for x in data["rows"]:
        figures, last = ["-"] * 5, f"{x['status']}: {x['words']}"
        if x["status"] == "measured":
            figures = [y for z in (x["shipped"], x["best"]) for y in (z["config"], f"{z['ms']:.4g}")]
            figures, last = [*figures, f"{x['ratio']:.3f}"], ("behind" if x["behind"] else "stays") + note
        cells.append([x["step"], str(x["width"]), str(x["block"]), *figures, last])
    sizes = [max(map(len, column)) for column in list(zip(*cells, strict=True))[:-1]]
    lines = ["  ".join([*map(str.ljust, line, sizes), line[-1]]).rstrip() for line in cells]
    slow = [f"  {x['write']}{note}" for x in data["rows"] if x.get("behind")]
    lines += ["", f"{len(slow)} shipped configurations are more than {NEAR - 1:.0%} behind{note}", *slow]
    states = ("timed", "refused", "failed", "dropped")
    count = [f"{sum(x['status'] == state for x in data['trials'])} {state}" for state in states]
    return "\n".join([f"Launch configurations{note}", "", *lines, f"configurations: {', '.join(count)}", ""])


def tune(session: Session, rows: list[Row], shape: Any) -> None:
    """Check everything, then time row by row; the report is written after each."""
    data, say, done = session.report.data, session.screen.say, itertools.count(1)
    ranked = sorted((pair for row in rows for pair in enumerate(trials(row, session))), key=lambda pair: pair[0])
    verdicts.run(
        [trial for _, trial in ranked], session.verdicts, script=session.script, device=session.device,
        tiny=session.dry, workers=session.workers, seconds=CHECKS * session.budget,
        report=lambda x, y: say(f"check {next(done)}/{len(ranked)} {x} {x.label}: {y['forward'] or 'pass'}"),
    )  # fmt: skip
    for number, row in enumerate(rows):
        found, entries = judge_row(session, row, shape, session.left / (len(rows) - number))
        data |= {"rows": [*data["rows"], found], "trials": data["trials"] + entries}
        say(f"row {number + 1}/{len(rows)} {row}: {found['status']}, {found['words']}")
        for kind, made in (("json", json.dumps(report._plain(data), indent=1) + "\n"), ("txt", text(data))):
            report._put(session.report.folder / f"tune_kernels.{kind}", lambda path, made=made: path.write_text(made))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", nargs="+", choices=OUTPUTS, default=[*OUTPUTS], help="kernels")
    parser.add_argument("--widths", nargs="+", type=int, choices=WIDTHS, default=WIDTHS, help="head dimensions")
    for name, size, words in (("slots", 32768, "tokens"), ("heads", 12, "heads"), ("kept", 64, "kept blocks per row")):
        parser.add_argument(f"--{name}", type=int, default=size, help=words)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for the whole run")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/tune"), help="folder")
    parser.add_argument("--workers", type=int, help="processes that check; 0: none but this one")
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted on the CPU; timings have no meaning")
    parser.add_argument("--worker", metavar="DEVICE", help=argparse.SUPPRESS)
    found = parser.parse_args()
    dry, script, blocks = found.dry_run, Path(__file__).resolve(), BLOCKS
    if not dry and not torch.cuda.is_available():
        print("tune_kernels: no CUDA device here; --dry-run goes the same way on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if dry else "cuda")
    if dry:
        runpy.run_path(str(script.parents[1] / "tests" / "interpreter.py"))  # mends it
        torch.set_num_threads(1)
        found.slots, found.heads, found.kept, found.widths, blocks = 128, 1, 1, found.widths[:1], BLOCKS[:1]
    check.run, verdicts.Case = examine, Trial  # what workers run, and what they are handed
    if found.worker:
        return verdicts.serve(device, tiny=dry) or 0
    stamp = environment(device, script) | {"command": shlex.join(["tune_kernels.py", *sys.argv[1:]])}
    stamp |= {name: getattr(found, name) for name in ("slots", "heads", "kept")}
    made = report.Report(found.out, dry=dry)
    made.folder.mkdir(parents=True, exist_ok=True)
    kept = {name: made.data[name] for name in ("schema", "dry_run", "timings")}
    made.data = {**kept, "environment": stamp, "rows": [], "trials": []}
    workers = found.workers if found.workers is not None else 1 if dry else verdicts.default_workers()
    session = Session(device, dry, found.budget, script, workers, made, Screen(report.DRY if dry else ""))
    session.screen.say(", ".join(f"{name} {value}" for name, value in stamp.items()))
    tune(session, [Row(step, *x) for x in itertools.product(found.widths, blocks) for step in found.steps], found)
    print(f"\n{text(made.data)}written to {found.out}")
    return int(any(x["status"] in ("refused", "failed") for x in made.data["rows"]))


if __name__ == "__main__":
    sys.exit(main())
