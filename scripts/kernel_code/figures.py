"""Compile a case ahead of time and read its machine code."""

from __future__ import annotations

import dataclasses as dc
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from .cases import Case, launched


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


@dc.dataclass(frozen=True)
class Figures:
    """What the compiled code holds; instructions are counted in the whole kernel, ``narrow`` and ``slack`` in its loop.

    Args:
        bm, bn: Rows and columns of a tile. warps: of a program. stages: depth of the copy pipeline.
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
        sass = said([triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", binary]).stdout
    registers = re.search(r"Used (\d+) registers", told)
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    if registers is None or spill is None or "EXIT" not in sass:
        raise RuntimeError(f"the output of ptxas or nvdisasm reads differently than expected:\n{told}")
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    warps = compiled.metadata.num_warps
    return Figures(
        bm=chosen.get("BM", chosen.get("ROWS", 1)),
        bn=chosen.get("BN", chosen.get("COLUMNS", case.d)),
        warps=warps,
        stages=compiled.metadata.num_stages,
        registers=int(registers[1]),
        spill=max(int(spill[1]), int(spill[2])),
        shared=shared,
        tensor_columns=columns,
        occupancy=occupancy(case.arch, int(registers[1]), warps, shared, columns),
        serial="wgmma.mma_async instructions are serialized" in told,
        seconds=round(seconds, 2),
        **code_figures(sass),
    )
