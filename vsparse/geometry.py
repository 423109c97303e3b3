"""The token lattice of a video transformer: how many latent frames, rows and columns, and where text stands."""

from __future__ import annotations

import dataclasses as dc
import enum
import math

__all__ = ["Grid", "Segment", "kept_blocks"]


class Segment(enum.IntEnum):
    """What the tokens of a block are. A block never straddles two segments."""

    TEXT = 0
    CONDITION = 1
    VIDEO = 2


@dc.dataclass(frozen=True, kw_only=True)
class Grid:
    """Latent token lattice after patchify; hashable, the key of every static cache.

    Args:
        t, h, w: Latent frames, rows and columns, each at least 1. Tokens of the video are in raster order
            ``n = (t * H + h) * W + w``.
        text_before: Text token slots that stand before the video (0 when text is not part of self-attention).
        text_after: Text token slots that stand after the video.
        condition_frames: Leading frames of ``t`` that are conditioning frames; they form a segment of their own.

    Raises:
        ValueError: a size is not an integer of the accepted range.
    """

    t: int
    h: int
    w: int
    text_before: int = 0
    text_after: int = 0
    condition_frames: int = 0

    def __post_init__(self) -> None:
        for name, least in (("t", 1), ("h", 1), ("w", 1), ("text_before", 0), ("text_after", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Grid: {name} must be an integer >= {least}, got {value!r}")
        if not isinstance(self.condition_frames, int) or not 0 <= self.condition_frames < self.t:
            raise ValueError(f"Grid: condition_frames must lie in [0, t={self.t}), got {self.condition_frames!r}")

    @property
    def frame(self) -> int:
        """Tokens in one latent frame."""
        return self.h * self.w

    @property
    def video(self) -> int:
        """Tokens of the video, conditioning frames included."""
        return self.t * self.frame

    @property
    def text(self) -> int:
        """Text token slots, before and after the video."""
        return self.text_before + self.text_after

    @property
    def tokens(self) -> int:
        """N: all tokens of the attention sequence in host order."""
        return self.video + self.text

    def segments(self) -> tuple[tuple[Segment, int, int], ...]:
        """Non-empty runs of the sequence in host order, as ``(segment, first token, one past the last)``."""
        start, runs = 0, []
        condition = self.condition_frames * self.frame
        for segment, size in (
            (Segment.TEXT, self.text_before),
            (Segment.CONDITION, condition),
            (Segment.VIDEO, self.video - condition),
            (Segment.TEXT, self.text_after),
        ):
            if size:
                runs.append((segment, start, start + size))
            start += size
        return tuple(runs)


def kept_blocks(density: float, blocks: int) -> int:
    """Number of key blocks that a density keeps: ``max(1, ceil(density * blocks - 1e-9))``, at most ``blocks``."""
    if not math.isfinite(density) or not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density!r}")
    return min(blocks, max(1, math.ceil(density * blocks - 1e-9)))
