"""What the machine code is held to, and what is allowed beyond, in words."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any

from vsparse.kernels.block_sparse import tuning
from vsparse.kernels.gather.tuning import KEYS_LIMITS
from vsparse.kernels.tiles import Width

from .cases import KERNELS, STEPS, Case
from .figures import MACHINES, Figures

RIPPLE = 8  # registers by which a kernel may exceed its baseline: moving a line of source shifts a few

OTHERS = tuning.Limits(spill=32)  # kernels for which no `tuning.py` has limits: eight registers may be spilled


@dc.dataclass(frozen=True)
class Exemption:
    """What one case need not keep to: the limits that take the place of its own, and why."""

    limits: dict[str, Any]
    reason: str


EXEMPTIONS = {
    "attend/skip sm_90 bf16 D128 64x64": Exemption(
        {"slack": 1}, "V is read only once the tile is known to count, so copies of K alone run ahead of the loop"
    ),
}


def limits_of(case: Case) -> tuning.Limits:
    """What the code of a case must keep to."""
    if case.step in STEPS:
        tma = case.variant.startswith("tma")
        return tuning.limits(case.step, case.arch, Width.of(case.d), case.bq, case.bk, case.itemsize, tma)
    return KEYS_LIMITS.get(case.step, OTHERS)


def judged(case: Case, figures: Figures) -> list[str]:
    """What is wrong with the code of a case, or with its exemption, in words."""
    limits, exemption = limits_of(case), EXEMPTIONS.get(case.name)
    if exemption is None:
        return list(breaches(case, figures, limits))
    if not list(breaches(case, figures, limits)):
        return ["keeps to its limits without the exemption that is made for it, which can go"]
    return list(breaches(case, figures, dc.replace(limits, **exemption.limits)))


def breaches(case: Case, figures: Figures, limits: tuning.Limits) -> Iterator[str]:
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
    if figures.local > limits.spill // 2:
        yield f"{figures.local} loads and stores of local memory, at most {limits.spill // 2}"
    if limits.tma and not figures.tma:
        yield "no copies by tensor descriptors (UTMALDG)"
    if case.itemsize == 4 or (case.step in KERNELS and not KERNELS[case.step].products):
        return
    rows = figures.bn if case.step in ("grad_keys", "grad_blocks", "grad_entries") else figures.bm
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
