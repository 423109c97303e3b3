"""Compile the block-sparse kernels without a GPU and hold the machine code to limits: `make gate`.

Each kernel is compiled ahead of time with the arguments that the launcher would hand over, specialised as Triton does
on a first launch. Read from the result: registers, spills, shared memory, programs per multiprocessor, matrix products,
the width of copies, and how far copies run ahead of the loop. The limits stand beside each configuration in
`kernels/block_sparse/tuning.py`; `gate.json` there remembers registers and occupancy, so that a change for the worse
fails. What it cannot show: speed.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest import mock

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "kernels" / "block_sparse" / "gate.json"
STEPS = ("attend", "grad_queries", "grad_keys")
ARCHITECTURES = (80, 89, 90, 100)
DTYPES = {"bf16": ("bfloat16", 2), "fp16": ("float16", 2), "fp32": ("float32", 4)}
WORKERS = 2
# Blocks, heads, batch and list length: numbers that no specialisation of Triton (1, multiples of 16) favours.
BLOCKS, HEADS, BATCH, LISTED = 18, 3, 2, 5


@dc.dataclass(frozen=True)
class Machine:
    """A multiprocessor: shared memory in KB (of one program, of all), threads, programs, columns of tensor memory."""

    program_kb: int
    shared_kb: int
    threads: int
    programs: int
    columns: int = 0


MACHINES = {
    80: Machine(163, 164, 2048, 32),
    89: Machine(99, 100, 1536, 24),
    90: Machine(227, 228, 2048, 32),
    100: Machine(227, 228, 2048, 32, 512),
}
REGISTERS = 65536
RIPPLE = 8  # registers by which a kernel may exceed its baseline: moving a line of source shifts a few


@dc.dataclass(frozen=True)
class Case:
    """One kernel that a launch on this architecture would compile."""

    step: str
    arch: int
    dtype: str
    d: int
    bq: int
    bk: int

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def name(self) -> str:
        return f"{self.step} sm_{self.arch} {self.dtype} D{self.d} {self.bq}x{self.bk}"


@dc.dataclass(frozen=True)
class Figures:
    """What the compiled code holds; instructions are counted in the whole kernel, ``narrow`` and ``slack`` in its loop.

    Args:
        registers: Per thread. spill: bytes a thread spills. shared: bytes. tensor_columns: tensor memory (sm_100).
        occupancy: programs that fit a multiprocessor. wgmma, mma, tcgen: matrix products by kind. serial: whether every
            product of a warp group is waited for. tma, copies: asynchronous copies by kind. narrow: copies of fewer
            than 16 bytes. local: loads and stores of spilled values. slack: groups of copies that may be under way
            when the loop first waits. seconds: to compile.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    registers: int
    spill: int
    shared: int
    tensor_columns: int
    occupancy: int
    wgmma: int
    mma: int
    tcgen: int
    serial: bool
    tma: int
    copies: int
    narrow: int
    local: int
    slack: int
    seconds: float


def shipped(architectures: tuple[int, ...], everything: bool) -> list[Case]:
    """The cases of a run: bf16 at two block sizes, or the whole table."""
    if not everything:
        return [
            Case(step, arch, "bf16", d, block, block)
            for arch, step, d, block in itertools.product(architectures, STEPS, (64, 80, 96, 128), (64, 128))
        ]
    blocks = tuple(itertools.product((64, 128), (64, 128)))
    found = []
    for arch, step, d in itertools.product(architectures, STEPS, (32, 64, 80, 96, 128, 256)):
        found += [Case(step, arch, "bf16", d, bq, bk) for bq, bk in blocks]
        found += [Case(step, arch, dtype, d, 64, 64) for dtype in ("fp16", "fp32")]
    return found


def occupancy(arch: int, registers: int, warps: int, shared: int, tensor_columns: int = 0) -> int:
    """Programs that a multiprocessor holds at once: registers come in units of 8 a thread and 4 warps, shared memory
    costs 1 KB more than asked for.
    """
    machine = MACHINES[arch]
    per_warp = -(-max(registers, 1) // 8) * 8 * 32
    bounds = [
        REGISTERS // per_warp // 4 * 4 // warps,
        machine.shared_kb * 1024 // (shared + 1024),
        machine.threads // (32 * warps),
        machine.programs,
    ]
    if tensor_columns:
        bounds.append(machine.columns // tensor_columns)
    return min(bounds)


MATRIX = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b")


def main_loop(sass: str) -> str:
    """The shortest loop among those with the most matrix products; empty without one."""
    lines, labels, loops = sass.splitlines(), {}, []
    for number, line in enumerate(lines):
        if found := re.match(r"\s*(\.L_\w+):", line):
            labels[found[1]] = number
        elif (found := re.search(r"\bBRA\b[^`]*`\((\.L_\w+)\)", line)) and found[1] in labels:
            loops.append("\n".join(lines[labels[found[1]] : number + 1]))
    loops = [loop for loop in loops if MATRIX.search(loop)]
    return max(loops, key=lambda loop: (len(MATRIX.findall(loop)), -len(loop)), default="")


def code_figures(sass: str) -> dict[str, int]:
    """Counts of instructions in disassembled code."""

    def count(pattern: str, text: str = sass) -> int:
        return len(re.findall(pattern, text))

    loop = main_loop(sass)
    waits = re.findall(r"DEPBAR\.LE SB0, 0x([0-9a-f]+)", loop)
    return {
        "wgmma": count(r"\bHGMMA\b"),
        "mma": count(r"\bHMMA\b"),
        "tcgen": count(r"\bUTC\w*MMA\b"),
        "tma": count(r"\bUTMALDG"),
        "copies": count(r"\bLDGSTS"),
        "narrow": count(r"\bLDGSTS", loop) - count(r"\bLDGSTS\S*\.128", loop),
        "local": count(r"\b(?:LDL|STL)\b"),
        "slack": int(waits[0], 16) if waits else 0,
    }


def launched(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel, arguments and options that a launch of this case would hand to Triton."""
    import torch
    from triton.runtime.jit import KernelInterface

    from vsparse import BlockMap, Grid, RasterLayout
    from vsparse.kernels.block_sparse import launch

    def side(block: int) -> Any:
        return RasterLayout(Grid(t=1, h=BLOCKS, w=block), block=block).bind()

    index = torch.arange(LISTED, dtype=torch.int32).expand(BATCH, HEADS, BLOCKS, LISTED)
    blocks = BlockMap(index, torch.full(index.shape[:3], LISTED, dtype=torch.int32), side(case.bq), side(case.bk))
    dtype = getattr(torch, DTYPES[case.dtype][0])
    q, k, v = (torch.empty(BATCH, BLOCKS * block, HEADS, case.d, dtype=dtype) for block in (case.bq, case.bk, case.bk))
    found: dict[str, Any] = {}

    def record(kernel: Any, _grid: Any) -> Any:
        return lambda *given, **options: found.update({kernel.__name__: (kernel, given, options)})

    with (
        mock.patch.object(KernelInterface, "__getitem__", record),
        mock.patch.object(launch, "architecture", return_value=case.arch),
    ):
        out, lse = launch.block_sparse_attention(q, k, v, blocks, scale=case.d**-0.5)
        if case.step != "attend":
            launch.block_sparse_attention_backward(out, None, q, k, v, out, lse, blocks, scale=case.d**-0.5)
    return found[case.step]  # type: ignore[no-any-return]


def said(command: list[Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def measure(case: Case) -> Figures:
    """Compile one case and read its code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, given, chosen = launched(case)
    target = GPUTarget("cuda", case.arch, 32)
    backend = make_backend(target)
    start = time.perf_counter()
    bound, special, rest = create_function_from_signature(kernel.signature, kernel.params, backend)(*given, **chosen)
    options, signature, constants, attributes = kernel._pack_args(backend, dict(chosen), bound, special, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        ptx, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        binary.write_bytes(compiled.asm["cubin"])
        assembler = [get_ptxas(case.arch).path, "-v", f"--gpu-name={sm_arch_from_capability(case.arch)}"]
        told = said([*assembler, ptx, "-o", Path(folder, "again")]).stderr
        sass = said([triton.knobs.nvidia.nvdisasm.path, "-c", binary]).stdout
    registers = re.search(r"Used (\d+) registers", told)
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    if registers is None or spill is None or "EXIT" not in sass:
        raise RuntimeError(f"the output of ptxas or nvdisasm reads differently than expected:\n{told}")
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    warps = compiled.metadata.num_warps
    return Figures(
        bm=chosen["BM"],
        bn=chosen["BN"],
        warps=warps,
        stages=chosen["num_stages"],
        registers=int(registers[1]),
        spill=max(int(spill[1]), int(spill[2])),
        shared=shared,
        tensor_columns=columns,
        occupancy=occupancy(case.arch, int(registers[1]), warps, shared, columns),
        serial="wgmma.mma_async instructions are serialized" in told,
        seconds=round(seconds, 2),
        **code_figures(sass),
    )


def breaches(case: Case, figures: Figures, limits: Any) -> Iterator[str]:
    """What the code of a case does that its limits forbid, in words."""
    most = MACHINES[case.arch].program_kb
    if figures.shared > most * 1024:
        yield f"needs {figures.shared / 1024:.1f} KB of shared memory, and a program can have {most} KB"
    if figures.occupancy < limits.occupancy:
        yield (
            f"{figures.occupancy} programs fit a multiprocessor with {figures.registers} registers and "
            f"{figures.shared / 1024:.1f} KB of shared memory each; the target is {limits.occupancy}"
        )
    if figures.spill > limits.spill:
        yield f"a thread spills {figures.spill} bytes, at most {limits.spill}"
    if figures.local and not limits.spill:
        yield f"{figures.local} loads and stores of local memory, where none is expected"
    if case.itemsize == 4:
        return
    rows = figures.bn if case.step == "grad_keys" else figures.bm
    kind = {90: "wgmma", 100: "tcgen"}.get(case.arch, "mma") if rows >= 64 else "mma"
    if not getattr(figures, kind):
        yield f"no {kind} instructions: the products do not run on the tensor cores as they should"
    if kind == "wgmma" and figures.mma:
        yield f"{figures.mma} products of single warps (HMMA) beside those of warp groups"
    if figures.serial and not limits.serial:
        yield "the assembler puts a wait behind every product of a warp group, for want of registers"
    if figures.narrow > limits.narrow:
        yield f"{figures.narrow} copies in a loop step move fewer than 16 bytes, at most {limits.narrow}"
    if figures.slack < limits.slack:
        yield f"the loop waits until {figures.slack} groups of copies are under way, where {limits.slack} may stay so"


def drift(now: Figures, then: dict[str, int] | None) -> Iterator[str]:
    """What became worse since the baseline was written, in words."""
    if then is None:
        yield "has no baseline; look at the figures, then run with --write"
        return
    if now.registers > then["registers"] + RIPPLE:
        yield f"{now.registers} registers, {then['registers']} in the baseline"
    if now.occupancy < then["occupancy"]:
        yield f"{now.occupancy} programs per multiprocessor, {then['occupancy']} in the baseline"


def write_file(path: Path, text: str) -> None:
    """Replace a file at once, so that nobody reads half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def baseline_text(version: str, kernels: dict[str, dict[str, int]]) -> str:
    """The baseline as JSON, one kernel a line."""
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(kernels.items()))
    return f'{{\n  "triton": {json.dumps(version)},\n  "kernels": {{\n{rows}\n  }}\n}}\n'


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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="only these; may be repeated")
    parser.add_argument("--all", action="store_true", help="every architecture, dtype, head dimension and block size")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--write", action="store_true", help="make these figures the baseline, if no limit is broken")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: interpreted kernels are never compiled. Unset it and run again.")
        return 1
    import triton

    from vsparse.kernels.block_sparse import tuning
    from vsparse.kernels.tiles import Width

    start = time.perf_counter()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    cases = shipped(tuple(given.arch or (ARCHITECTURES if given.all else (80, 90))), given.all)
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}  # for the workers: nothing is compiled here
        measured, problems = run(cases, console)
    expected = set(shipped((80, 90), False))  # the rest of the table may have a baseline, but need not
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"triton": triton.__version__, "kernels": {}}
    comparable = known["triton"] == triton.__version__
    rows = []
    for case, figures in measured:
        width = Width.of(case.d)
        limits = tuning.limits(case.step, case.arch, width, case.bq, case.bk, case.itemsize)
        found = list(breaches(case, figures, limits))
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
        write_file(BASELINE, baseline_text(triton.__version__, merged))
    took = f"{len(cases)} kernels in {time.perf_counter() - start:.0f} s, triton {triton.__version__}"
    console.print(
        f"{took}: {len(problems)} of them fail"
        if problems
        else f"{took}: all within their limits, none worse than the baseline"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
