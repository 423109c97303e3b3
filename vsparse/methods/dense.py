"""dense: the host's own attention, without the keys of padded text."""

from __future__ import annotations

import dataclasses as dc
from typing import ClassVar

from vsparse.geometry import Grid
from vsparse.layouts import Layout, RasterLayout
from vsparse.methods.base import Method, Paper, Site, SparseAttention
from vsparse.schedule import Schedule

__all__ = ["Dense"]


@dc.dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Full attention through the host's own backend; padded text keys are cut off instead of masked.

    Exact. On hosts with padded joint text (HunyuanVideo) the cut removes the mask at batch 1, and with it the slow
    masked kernels; on the others it is the host itself.
    """

    key: ClassVar[str] = "dense"
    paper: ClassVar[Paper] = Paper(title="full attention, padded text trimmed", arxiv="", trained=False)
    advice: ClassVar[str] = (
        "To take the mask of padded text out of HunyuanVideo at batch 1, and as the reference beside the others."
    )
    chooses: ClassVar[bool] = False
    default_schedule: ClassVar[Schedule] = Schedule(dense_steps=1.0)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Raster order; used for accounting only."""
        return RasterLayout(grid)

    def build(self, site: Site) -> SparseAttention:
        """A module without a sparse path."""
        return SparseAttention(self, site)
