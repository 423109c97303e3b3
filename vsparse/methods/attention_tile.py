"""attention_tile: every frame attends to itself and to a few global frames, which see and are seen by all."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vsparse.geometry import Grid
from vsparse.layouts import Layout, RasterLayout
from vsparse.methods.base import Paper, Site, SparseAttention
from vsparse.methods.pattern import StaticMethod
from vsparse.methods.samples import Sample, alike, attended, distance
from vsparse.patterns import Axis, Pattern, block_map

__all__ = ["AttentionTile", "FrameTiles", "search_global_frames"]


@dc.dataclass(frozen=True, kw_only=True)
class FrameTiles:
    """Tiles of frame pairs: the diagonal, and the rows and columns of ``count`` frames spread evenly over the video.

    Of F frames those are ``floor(i F / count)``, the first one among them; with count >= F all are global.
    """

    count: int

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """The rule between frames ``q [F, 1]`` and ``k [1, F]``."""
        frames = k.shape[-1]
        count = min(self.count, frames)
        chosen = torch.zeros(frames, dtype=torch.bool)
        chosen[torch.arange(count) * frames // count] = True
        return (q == k) | chosen[q] | chosen[k]


@dc.dataclass(frozen=True, kw_only=True)
class AttentionTile(StaticMethod):
    """Attention tiles of Efficient-vDiT (arXiv 2502.06155): linear in the number of frames.

    With k global frames of F, ``(F - k)(F - k - 1) / F^2`` of the frame pairs are left out.

    Args:
        global_frames: How many, one number or a tuple with one for each layer of the model. The paper searches them
            layer by layer (`search_global_frames`); its fastest masks are 1 of 8 frames and 3 of 24.
        block: Slots of a block; no block straddles two frames, whatever the frame size.

    Joint text is always attended and its rows are full. Differs from the paper: it gives no rule for which frames are
    global; here they are spread evenly, the first one included. The paper's three stages, with both distillations, are
    `vsparse.training.efficient_vdit`.
    """

    key: ClassVar[str] = "attention_tile"
    paper: ClassVar[Paper] = Paper(title="Efficient-vDiT: attention tile", arxiv="2502.06155", trained=True)
    advice: ClassVar[str] = (
        "You can distil: linear in the frames, and a fixed map that a calibration run chooses layer by layer."
    )

    global_frames: int | tuple[int, ...] = 3
    block: int = 64

    def __post_init__(self) -> None:
        given = self.global_frames
        counts = tuple(given) if isinstance(given, tuple | list) else (given,)
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
            raise ValueError(
                f"attention_tile: global_frames must be an integer >= 1 or a tuple with one per layer, got {given!r}"
            )
        object.__setattr__(self, "global_frames", counts if isinstance(given, tuple | list) else given)
        RasterLayout(Grid(t=1, h=1, w=1), block=self.block)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """Host order in blocks, every frame and the text in blocks of their own."""
        return RasterLayout(grid, block=self.block, break_at="frame")

    def static_pattern(self, site: Site) -> Pattern:
        """The tiles of the site's layer."""
        given = self.global_frames
        return _tiles(given[site.layer] if isinstance(given, tuple) else given)

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        given = self.global_frames
        if isinstance(given, tuple) and len(given) != site.layers:
            raise ValueError(
                f"attention_tile: global_frames has {len(given)} entries, and {site.root} has {site.layers} layers; "
                "search them for this model, or give one number"
            )
        return super().build(site)


def _tiles(count: int) -> Pattern:
    return Axis(axis="t", rule=FrameTiles(count=count))


def search_global_frames(
    samples: Sequence[Sequence[Sample]], *, bound: float, candidates: Sequence[int] | None = None, block: int = 64
) -> tuple[int, ...]:
    """For each layer the fewest global frames with which attention stays within an error on calibration prompts.

    Args:
        samples: For each layer, its samples (`vsparse.measure.calibrate.recording`).
        bound: Greatest relative L1 error ``sum |O - O'| / sum |O|`` of the attention output, the mean over samples and
            heads. The paper bounds the error of the output and names no norm; this one is SpargeAttn's.
        candidates: Numbers of global frames to try; None: 1 to F. All F frames, full attention, are tried at last.
        block: As in `AttentionTile`.

    Returns:
        ``global_frames`` of `AttentionTile`.

    Raises:
        ValueError: a bound that is not positive, no layer, a layer without samples or with samples of several shapes.
    """
    if not bound > 0.0:
        raise ValueError(f"attention_tile: bound must be positive, got {bound!r}")
    if not samples:
        raise ValueError("attention_tile: no layer has calibration samples")
    return tuple(
        _fewest(f"attention_tile: layer {layer}", given, bound, candidates, block)
        for layer, given in enumerate(samples)
    )


@torch.no_grad()
def _fewest(name: str, samples: Sequence[Sample], bound: float, candidates: Sequence[int] | None, block: int) -> int:
    grid = alike(name, samples).grid
    layout = RasterLayout(grid, block=block, break_at="frame").to(samples[0].q.device)
    bound_to = [layout.bind(sample.text_length) for sample in samples]
    wanted = [attended(sample, blocking) for sample, blocking in zip(samples, bound_to, strict=True)]
    tried = sorted(set(range(1, grid.t) if candidates is None else candidates))
    for count in (n for n in tried if n < grid.t):
        tiles = block_map(_tiles(count), layout)
        errors = [
            distance(attended(sample, blocking, dc.replace(tiles, q=blocking, k=blocking)), full)
            for sample, blocking, full in zip(samples, bound_to, wanted, strict=True)
        ]
        if float(torch.stack(errors).mean()) <= bound:
            return count
    return grid.t
