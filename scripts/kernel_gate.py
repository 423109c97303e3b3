"""Compile the Triton kernels without a GPU and hold the machine code to limits: `make gate`.

Each kernel is compiled ahead of time with the arguments that the launcher would hand over, specialised as Triton does
on a first launch. Read from the result: registers, spills, shared memory, programs per multiprocessor, matrix products,
the width of copies, and how far copies run ahead of the loop. The limits of block-sparse attention stand beside each
configuration in `kernels/block_sparse/tuning.py`, those of the other kernels and all exemptions in
`kernel_code/limits.py`; `kernel_gate.json` remembers registers and occupancy, so that a change for the worse fails, and
a digest of the sources.
What it cannot show: speed.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from kernel_code.cases import ARCHITECTURES, Case, shipped
from kernel_code.figures import Figures, measure
from kernel_code.limits import drift, judged
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

BASELINE = Path(__file__).with_suffix(".json")
WORKERS = 2
FEW = 8  # one of so many


def write_file(path: Path, text: str) -> None:
    """Replace a file at once, so that nobody reads half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def digest() -> str:
    """Of all sources that a kernel or its arguments come from, as they are now."""
    folders = (BASELINE.parents[1] / "kernels", BASELINE.parent / "kernel_code")
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def baseline_text(version: str, sources: str, kernels: dict[str, dict[str, int]]) -> str:
    """The baseline as JSON, one kernel a line."""
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(kernels.items()))
    head = f'  "triton": {json.dumps(version)},\n  "sources": {json.dumps(sources)},\n'
    return f'{{\n{head}  "kernels": {{\n{rows}\n  }}\n}}\n'


COLUMNS = ("tile", "warps", "stages", "regs", "spill", "KB", "per SM", "products", "copies", "narrow", "slack")


def table_of(rows: list[tuple[Case, Figures, list[str]]]) -> Table:
    """All kernels, those in breach in red."""
    table = Table(title="kernels as compiled", box=box.SIMPLE_HEAD, row_styles=["", "dim"])
    table.add_column("kernel", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for case, figures, found in rows:
        kinds = (("wgmma", figures.wgmma), ("mma", figures.mma), ("tcgen", figures.tcgen))
        products = " ".join(f"{count} {kind}" for kind, count in kinds if count) + (" serial" if figures.serial else "")
        copies = f"{figures.copies}" if not figures.tma else f"{figures.copies} + {figures.tma} TMA"
        table.add_row(
            case.name,
            f"{figures.bm}x{figures.bn}",
            *(str(x) for x in (figures.warps, figures.stages, figures.registers, figures.spill)),
            f"{figures.shared / 1024:.1f}",
            str(figures.occupancy),
            products or "-",
            copies,
            str(figures.narrow),
            str(figures.slack),
            style="red" if found else None,
        )
    return table


def run(cases: list[Case], console: Console) -> tuple[list[tuple[Case, Figures]], dict[str, list[str]]]:
    """Compile all cases in processes apart; those that fail to compile come back in words."""
    done: dict[Case, Figures] = {}
    failed: dict[str, list[str]] = {}
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        started: dict[Future[Figures], Case] = {pool.submit(measure, case): case for case in cases}
        for future in track(as_completed(started), "compiling", total=len(cases), console=console):
            case, error = started[future], future.exception()
            if error is None:
                done[case] = future.result()
            else:
                failed[case.name] = [f"does not compile: {type(error).__name__}: {error}"]
    return [(case, done[case]) for case in cases if case in done], failed


def in_turn(cases: list[Case]) -> list[Case]:
    """Of the cases that differ in their architecture alone one each, another one each time."""
    found: dict[Case, list[Case]] = {}
    for case in cases:
        found.setdefault(dc.replace(case, arch=0), []).append(case)
    return [alike[i % len(alike)] for i, alike in enumerate(found.values())]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="only these; may be repeated")
    parser.add_argument("--all", action="store_true", help="every architecture and size of block-sparse attention")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="each kernel on one architecture, in turn; a few where the sources are those of the baseline",
    )
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--write", action="store_true", help="make these figures the baseline, if no limit is broken")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: interpreted kernels are never compiled. Unset it and run again.")
        return 1
    import triton

    start = time.perf_counter()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    cases = shipped(tuple(given.arch or (ARCHITECTURES if given.all else (80, 90))), given.all)
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"triton": triton.__version__, "kernels": {}}
    comparable = known["triton"] == triton.__version__
    sources = digest()
    if given.quick:
        cases = in_turn(cases)
        if comparable and known.get("sources") == sources:
            cases = cases[::FEW]
            console.print("The sources are those of the baseline: a few kernels are compiled, to see that they do.")
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}  # for the workers: nothing is compiled here
        measured, problems = run(cases, console)
    expected = set(shipped((80, 90), False))  # the rest of the table may have a baseline, but need not
    rows = []
    for case, figures in measured:
        found = judged(case, figures)
        if comparable and not given.write and (case.name in known["kernels"] or case in expected):
            found += drift(figures, known["kernels"].get(case.name))
        rows.append((case, figures, found))
        if found:
            problems[case.name] = found
    console.print(table_of(rows))
    if given.json:
        kernels = {case.name: dc.asdict(figures) for case, figures in measured}
        report = {"triton": triton.__version__, "kernels": kernels, "problems": problems}
        write_file(given.json, json.dumps(report, indent=2) + "\n")
    for name, found in problems.items():
        for line in found:
            console.print(f"{name}: {line}", style="red", soft_wrap=True, highlight=False)
    if not comparable and not given.write:
        console.print(f"The baseline is of triton {known['triton']}, not {triton.__version__}: drift is not judged.")
    if given.write and not problems:
        now = {case.name: {"registers": f.registers, "occupancy": f.occupancy} for case, f in measured}
        kept = known["kernels"] if comparable else {}
        names = {case.name for everything in (False, True) for case in shipped(ARCHITECTURES, everything)}
        merged = {name: row for name, row in {**kept, **now}.items() if name in names}
        whole = expected <= {case for case, _ in measured}
        write_file(BASELINE, baseline_text(triton.__version__, sources if whole else known.get("sources", ""), merged))
    took = f"{len(cases)} kernels in {time.perf_counter() - start:.0f} s, triton {triton.__version__}"
    console.print(
        f"{took}: {len(problems)} of them fail"
        if problems
        else f"{took}: all within their limits, none worse than the baseline"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
