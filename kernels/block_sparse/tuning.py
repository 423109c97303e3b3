"""The launch configuration of each kernel: a pure function of architecture, shape and dtype."""

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
    """

    bm: int
    bn: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton takes beside the arguments of the kernel."""
        chosen = {"num_warps": self.warps, "num_stages": self.stages}
        return chosen if self.registers is None else {**chosen, "maxnreg": self.registers}


def config(step: str, arch: int, width: Width, q_block: int, k_block: int, itemsize: int) -> Config:
    """The configuration of a kernel.

    Args:
        step: One of `PASSES`. arch: 80, 89, 90, ...; 0: unknown, the smallest is chosen. width: head dimension.
        q_block, k_block: BQ and BK of the map. itemsize: bytes of an element of q.
    """
    columns = width.D1 + width.D2
    wide, large = columns > 64, columns > 128
    if itemsize == 4 or large:
        # Products in full float32 and very wide heads: small tiles, so that nothing spills and shared memory suffices.
        side = 32 if itemsize == 4 or step != "attend" else 64
        return Config(tile_rows(q_block, side), tile_rows(k_block, 32), 4, 1)
    bm, bn = tile_rows(q_block, 128), tile_rows(k_block, 64)
    if step == "attend":
        if bm == 128:
            return Config(bm, bn, 8, 2, 128 if arch == 90 else None)
        return Config(bm, bn, 4, 2 if not wide or arch != 90 else 1)
    if step == "grad_queries":
        return Config(bm, bn, 8 if bm == 128 else 4, 2 if arch >= 80 and arch != 89 else 1)
    return Config(tile_rows(q_block, 64), bn, 4, 1)
