"""The launch configuration of each kernel, and what its compiled code must keep to: pure functions of sizes.

The figures come from compiled code (`scripts/kernel_gate.py`, triton 3.6.0), not yet from clocks. What they follow:

- Two or more programs on a multiprocessor beat a deeper pipeline, because Triton does not overlap the softmax with the
  products inside one program. Where shared memory and registers allow it anyway, the pipeline is three deep: with two,
  the copies of a step are issued at the end of the step before and waited for at its head.
- 64 query rows take 4 warps: 8 would split the keys between warp groups. 128 rows take 8 where that fits.
- On sm_80 and sm_89, 4 warps of 32 rows each read a tile from shared memory half as often as 8 warps of 16.
"""

from __future__ import annotations

import dataclasses as dc

from vsparse.kernels.tiles import Width, tile_rows

PASSES = ("attend", "grad_queries", "grad_keys")


@dc.dataclass(frozen=True)
class Config:
    """How one kernel is compiled and launched.

    Args:
        bm: Query rows of a tile. bn: key rows of a tile. warps: per program. stages: depth of the copy pipeline.
        registers: Most registers per thread; None: the compiler's choice.
        tma: Whether tiles of K and V are read through tensor descriptors (`attend` only, Hopper and later).
    """

    bm: int
    bn: int
    warps: int
    stages: int
    registers: int | None = None
    tma: bool = False

    @property
    def options(self) -> dict[str, int]:
        """What Triton takes beside the arguments of the kernel."""
        chosen = {"num_warps": self.warps, "num_stages": self.stages}
        return chosen if self.registers is None else {**chosen, "maxnreg": self.registers}


@dc.dataclass(frozen=True)
class Limits:
    """What the compiled code of a configuration must keep to.

    Args:
        occupancy: Fewest programs that fit a multiprocessor at once.
        slack: Fewest groups of copies that may still be under way when the loop first waits for one.
        spill: Most bytes that a thread may spill.
        narrow: Most copies of a loop step that move fewer than 16 bytes.
        serial: Whether the assembler may put a wait behind every product of a warp group.
        tma: Whether there must be copies by tensor descriptors.
    """

    occupancy: int = 1
    slack: int = 0
    spill: int = 0
    narrow: int = 0
    serial: bool = False
    tma: bool = False


@dc.dataclass(frozen=True)
class Choice:
    """A row of the tables: most rows of a tile, launch options, limits."""

    rows: int
    warps: int
    stages: int
    limits: Limits
    registers: int | None = None


def _attend(arch: int, columns: int, tall: bool) -> Choice:
    if arch == 90:
        if tall:
            if columns == 128:
                # 173 registers without a cap, so one program; with it the products wait for each other, but those of
                # another program fill the gaps. To be timed against three stages without a cap.
                return Choice(128, 8, 2, Limits(2, slack=1, serial=True), registers=128)
            return Choice(128, 8, 3, Limits(2, slack=2, narrow=2 if columns == 80 else 0), registers=128)
        return {
            64: Choice(64, 4, 3, Limits(4, slack=2)),
            80: Choice(64, 4, 2, Limits(4, slack=1)),
            96: Choice(64, 4, 2, Limits(3, slack=1)),
            128: Choice(64, 4, 3, Limits(2, slack=2)),
        }[columns]
    if arch == 100:
        if tall:
            narrow = 7 if columns == 80 else 0
            return Choice(128, 8, 3 if columns in (64, 128) else 2, Limits(2 if columns == 64 else 1, narrow=narrow))
        return Choice(64, 4, 3 if columns in (64, 128) else 2, Limits(2))
    if columns == 128:
        if tall:
            return Choice(128, 8, 3 if arch == 80 else 2, Limits(1, slack=1))
        return Choice(64, 4, 2, Limits(2 if arch == 80 else 1, slack=1))
    if tall:
        return Choice(128, 4, 3 if arch == 80 else 2, Limits(2, slack=1))
    three = columns < 96  # programs that fit, with 168 registers each
    return Choice(64, 4, 3 if arch == 80 else 2, Limits(3 if three else 2, slack=1), registers=168 if three else None)


def _grad_queries(arch: int, columns: int, tall: bool) -> Choice:
    if tall and columns == 64 and arch == 90:
        return Choice(128, 8, 3, Limits(2, slack=1), registers=128)
    if arch == 90:
        return Choice(64, 4, 3 if columns == 64 else 2, Limits(2 if columns == 128 else 3))
    return Choice(64, 4, 2, Limits(1 if arch == 89 and columns == 128 else 2, narrow=2 if arch == 100 else 0))


def _grad_keys(arch: int, columns: int, tall: bool) -> Choice:
    # LSE and delta come as one copy of four bytes a thread.
    if arch == 90:
        return Choice(64, 4, 2 if columns == 128 else 3, Limits(2, narrow=1, spill=32 if columns == 128 else 0))
    if arch == 100:
        return Choice(64, 4, 1 if columns == 128 else 2, Limits(2, narrow=3))
    if columns == 128:
        return Choice(64, 8, 2, Limits(1, narrow=4))
    return Choice(64, 4, 2, Limits(2, narrow=1, spill=0 if columns == 64 else 32 if arch == 80 else 64))


def _attend_tma(arch: int, columns: int, tall: bool) -> Choice:
    """`attend` with tensor descriptors, for sm_90 and sm_100. Copies are waited for by barriers: there is no slack."""
    if arch == 100:
        if tall:
            return Choice(128, 8, 2, Limits(1 if columns == 128 else 2, spill=8 if columns in (80, 96) else 0))
        fits = {64: 4, 80: 4, 96: 3, 128: 2}[columns]
        return Choice(64, 4, 2, Limits(fits, spill=8 if columns == 128 else 0))  # with a bias per key block
    if tall:
        if columns == 128:
            return Choice(128, 8, 2, Limits(2, serial=True), registers=128)
        return Choice(128, 8, 3, Limits(2), registers=128)
    if columns == 128:
        # No copy runs ahead: three other programs fill the gap. To be timed against three stages and two programs.
        return Choice(64, 4, 1, Limits(4), registers=128)
    return Choice(64, 4, 2, Limits(3 if columns == 96 else 4))


# (architecture, columns, whether tiles have 128 rows) of `attend` for which descriptors were measured to be faster.
DESCRIPTORS: frozenset[tuple[int, int, bool]] = frozenset()

_TABLES = {"attend": _attend, "grad_queries": _grad_queries, "grad_keys": _grad_keys}


def _family(arch: int) -> int:
    """The architecture with tuned figures that comes closest; the one with the least shared memory if unknown."""
    if arch // 10 == 10:
        return 100
    return arch if arch in (80, 90) else 89


def _choice(
    step: str, arch: int, width: Width, q_block: int, k_block: int, itemsize: int, tma: bool | None
) -> tuple[Config, Limits]:
    columns, tall, family = width.D1 + width.D2, tile_rows(q_block, 128) == 128, _family(arch)
    if tma is None:
        tma = (family, columns, tall) in DESCRIPTORS
    # float32 would spill. An unknown architecture takes them: that is the interpreter.
    tma = tma and step == "attend" and itemsize == 2 and (family in (90, 100) or arch == 0)
    if itemsize == 4:
        # Products in full float32 run without tensor cores and keep whole rows in registers.
        side = 32 if columns <= 128 else 16
        kept = Limits(spill=0 if columns <= 128 else 16)
        return Config(tile_rows(q_block, side), tile_rows(k_block, side), 4 if columns <= 64 else 8, 1), kept
    if columns > 128:
        rows = tile_rows(q_block, 64 if step == "attend" else 32)
        return Config(rows, tile_rows(k_block, 32), 4, 1, tma=tma), Limits(tma=tma)
    table = _attend_tma if tma else _TABLES[step]
    chosen = table(90 if tma and arch == 0 else family, max(columns, 64), tall)
    bm, bn = tile_rows(q_block, chosen.rows), tile_rows(k_block, 64)
    return Config(bm, bn, chosen.warps, chosen.stages, chosen.registers, tma), dc.replace(chosen.limits, tma=tma)


def config(
    step: str, arch: int, width: Width, q_block: int, k_block: int, itemsize: int, tma: bool | None = None
) -> Config:
    """The configuration of a kernel.

    Args:
        step: One of `PASSES`. arch: 80, 89, 90, ...; 0: unknown, the smallest is chosen. width: head dimension.
        q_block, k_block: BQ and BK of the map. itemsize: bytes of an element of q.
        tma: Whether to read through tensor descriptors, where kernel and architecture can; None: as `DESCRIPTORS` says.
    """
    return _choice(step, arch, width, q_block, k_block, itemsize, tma)[0]


def limits(
    step: str, arch: int, width: Width, q_block: int, k_block: int, itemsize: int, tma: bool | None = None
) -> Limits:
    """What the code compiled for `config` of the same arguments must keep to, for blocks of at least 64 slots."""
    return _choice(step, arch, width, q_block, k_block, itemsize, tma)[1]
