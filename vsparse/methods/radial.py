"""Radial attention: a band of positions in every pair of frames, whose width halves as their distance doubles."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import ClassVar

from vsparse.geometry import Grid
from vsparse.layouts import Layout, RasterLayout
from vsparse.methods.base import Paper, Site
from vsparse.methods.pattern import StaticMethod
from vsparse.patterns import FrameBand, KeyFrames, Pattern
from vsparse.schedule import Schedule

__all__ = ["LogDecay", "Radial"]


@dc.dataclass(frozen=True, kw_only=True)
class LogDecay:
    """Width of the band for a distance of frames; the field values are those of `Radial`."""

    decay_factor: float
    adjacent: float
    least: int

    def __call__(self, distance: int, grid: Grid) -> int:
        """Positions on either side that a query sees in a frame at a distance; -1: it does not see the frame."""
        if distance == 0:
            return grid.frame
        if distance == 1:
            return math.floor(self.adjacent * grid.frame)
        reach = 2.0 ** (grid.frame.bit_length() - distance.bit_length())
        if reach < self.least and distance % int(self.least / reach):
            return -1
        return math.floor(max(reach * self.decay_factor, self.least))


@dc.dataclass(frozen=True, kw_only=True)
class Radial(StaticMethod):
    """Radial Attention (arXiv 2506.19852, section 4): static, O(n log n) in the number of frames.

    With s positions in a frame and ``reach = 2^bitlen(s) / 2^bitlen(d)``, a query sees, in a frame at distance d, the
    positions at most ``max(decay_factor * reach, least)`` from its own. Once ``reach < least`` only every
    ``int(least / reach)``-th distance is seen at all. The own frame is seen in full.

    Args:
        decay_factor: Published: 0.2 for Wan 2.1, 0.8 for Wan 2.2, 0.95 for HunyuanVideo.
        adjacent: Width of the band in the next frame, as a share of s: 0.5 for Wan, 1 for HunyuanVideo.
        sink_frames: Leading frames that every query sees: 1 for Wan, 0 for HunyuanVideo. A single frame is seen whole.
        least: Narrowest band; 128, the block of the published code.
        block: Slots of a block.

    Schedule: the first layer and the first 12 of 50 steps dense (Wan 2.1; Wan 2.2: 1 and 11, HunyuanVideo: 0 and 12;
    longer videos with the published LoRA: 2 and 2). Joint text is always attended and its rows are full.

    Differs from the released code, which keeps a block of 128 only if more than 60 % of its non-empty columns are more
    than a third full and drops the tokens after the last whole block: here a block is kept if the rule keeps any pair
    in it, so no pair of the rule is lost and somewhat more is computed; any grid, text on either side, any batch.
    """

    key: ClassVar[str] = "radial"
    paper: ClassVar[Paper] = Paper(title="Radial attention", arxiv="2506.19852", trained=False)
    advice: ClassVar[str] = (
        "Long videos: the pairs grow as n log n with the frames, without a search; for longer ones its "
        "authors train a LoRA."
    )
    default_schedule: ClassVar[Schedule] = Schedule(dense_steps=0.24, dense_layers=1)

    decay_factor: float = 0.2
    adjacent: float = 0.5
    sink_frames: int = 1
    least: int = 128
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("decay_factor", "adjacent"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
                raise ValueError(f"radial: {name} must be a number >= 0, got {value!r}")
        for name, low in (("sink_frames", 0), ("least", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"radial: {name} must be an integer >= {low}, got {value!r}")
        RasterLayout(Grid(t=1, h=1, w=1), block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Host order in blocks; text starts a block of its own."""
        return RasterLayout(grid, block=self.block)

    def static_pattern(self, site: Site) -> Pattern:
        """The band, and the first frames as keys."""
        band = FrameBand(width=LogDecay(decay_factor=self.decay_factor, adjacent=self.adjacent, least=self.least))
        return band | KeyFrames(frames=tuple(range(self.sink_frames))) if self.sink_frames else band
