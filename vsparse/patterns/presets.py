"""Published static patterns, each one expression of the algebra.

Sizes are one number or (frames, rows, columns). Presets that differ by head give a tuple with one pattern per head for
`vsparse.methods.pattern.StaticPattern`; those that alternate by layer give a tuple for its ``by="layer"``.
"""

from __future__ import annotations

from vsparse.patterns.algebra import Pattern
from vsparse.patterns.rules import (
    Cells,
    KeyStride,
    Offset,
    OpenSizes,
    RolledCells,
    Sizes,
    Stride,
    Window,
    same_frame,
    same_position,
)

__all__ = [
    "alternating",
    "divided",
    "global_local",
    "interleaved",
    "neighborhood",
    "shards",
    "shifted_chunks",
    "stripes",
    "unidirectional",
    "window",
]


def neighborhood(*, size: OpenSizes, stride: Sizes = 1, dilation: Sizes = 1) -> Pattern:
    """(Dilated) neighbourhood attention: a window around each token that keeps its size at the borders.

    Args:
        size: Of the window. stride: queries that share a window. dilation: step between its positions.

    Source: NATTEN (arXiv 2204.07143), dilated (2209.15001), strided (2504.16922).
    """
    return Window(size=size, stride=stride, dilation=dilation)


def window(*, size: OpenSizes, shift: Sizes = 0, halo: Sizes = 0) -> Pattern:
    """Windows that do not overlap: a token attends to its own, and ``halo`` positions beyond it.

    Args:
        size: Of a window. shift: how far the windows lie before the first position; half a window in every other layer
            is Swin's alternation (`alternating`). halo: 0: none.

    Source: windowed DiTs (DiT-3D, arXiv 2307.01831), HiDiffusion's shifted windows (2311.17528), halo (2103.12731).
    """
    return Cells(size=size, shift=shift, halo=halo)


def interleaved(*, step: Sizes) -> Pattern:
    """Windows over strided positions: tokens whose positions differ by multiples of ``step`` along every axis.

    Source: the grid attention of MaxViT (arXiv 2204.01697) and the long-distance attention of CrossFormer
    (2108.00154), where a layer of it follows one of `window`: ``alternating(window(...), interleaved(...))``.
    """
    return Stride(step=step)


def alternating(*layers: Pattern) -> tuple[Pattern, ...]:
    """Layer l takes pattern ``l % len(layers)``; for ``StaticPattern(..., by="layer")``."""
    if not layers or not all(isinstance(x, Pattern) for x in layers):
        raise ValueError(f"alternating: every layer must be a Pattern, got {layers!r}")
    return layers


def stripes(*, heads: int, width: Sizes) -> tuple[Pattern, ...]:
    """Cross-shaped windows: a third of the heads each attends in stripes of frames, of rows, of columns.

    Args:
        heads: Of the attention. width: of a stripe, in frames, rows and columns.

    Source: CSWin (arXiv 2107.00652), whose two directions become three.
    """
    t, h, w = width if isinstance(width, tuple | list) else (width,) * 3
    along = (Cells(size=(t, None, None)), Cells(size=(None, h, None)), Cells(size=(None, None, w)))
    return tuple(along[head * 3 // heads] for head in range(_heads("stripes", heads, 3)))


def divided() -> Pattern:
    """The same frame, or the same position over time.

    Source: divided space-time attention (TimeSformer, arXiv 2102.05095), which does one after the other:
    ``alternating(same_position, same_frame)``.
    """
    return same_frame | same_position


def shards(*, heads: int, count: int, local: OpenSizes) -> tuple[Pattern, ...]:
    """Every head its own shard of the frames besides a local window; ``count`` heads cover every frame.

    Args:
        heads: Of the attention, at least ``count``. count: shards; head h sees the frames f with
            ``f % count == h % count``. local: window around the query.

    Source: S2-Attention (arXiv 2407.17678), over frames instead of blocks of a text.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"shards: count must be an integer >= 1, got {count!r}")
    near = Window(size=local)
    return tuple(
        near | KeyStride(step=(count, 1, 1), offset=(head % count, 0, 0))
        for head in range(_heads("shards", heads, count))
    )


def shifted_chunks(*, heads: int, size: int, groups: int = 2, dilation: int = 1) -> tuple[Pattern, ...]:
    """Chunks of frames, whose keys each group of heads rolls further: group g by ``g size / groups`` frames.

    Args:
        heads: Of the attention, at least ``groups``. size: frames of a chunk. groups: groups of heads, in a row.
        dilation: Above 1, the last group attends to every ``dilation``-th frame from its own instead of a chunk.

    Source: shifted cross chunk attention (arXiv 2312.07305), over frames; its dilated heads are the last group.
    """
    for name, value in (("size", size), ("groups", groups), ("dilation", dilation)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"shifted_chunks: {name} must be an integer >= 1, got {value!r}")
    found: list[Pattern] = []
    for head in range(_heads("shifted_chunks", heads, groups)):
        group = head * groups // heads
        if dilation > 1 and group == groups - 1:
            found.append(Stride(step=(dilation, 1, 1)))
        else:
            found.append(RolledCells(size=(size, None, None), roll=(group * size // groups, 0, 0)))
    return tuple(found)


def unidirectional(*, block: Sizes, reach: Sizes = 1) -> Pattern:
    """Blocks attend to themselves and to earlier neighbours: at most ``reach`` blocks back along every axis.

    Source: Inf-DiT (arXiv 2405.04312): left, upper and upper left block of an image; here in time, too.
    """
    t, h, w = reach if isinstance(reach, tuple | list) else (reach,) * 3
    return Offset(low=(-t, -h, -w), high=0, unit=block)


def global_local(*, heads: int, size: OpenSizes, step: Sizes, share: float = 0.5) -> tuple[Pattern, ...]:
    """Local windows on some heads, sampled positions of the whole video on the others.

    Args:
        heads: Of the attention, at least 2. size: of a window. step: between the sampled keys.
        share: Of the heads that are local, the first ones; at least one head is of each kind.

    Source: HiLo (arXiv 2205.13213), Twins (2104.13840). They pool the keys of the global heads; a pattern chooses
    tokens, so here it is every ``step``-th one.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"global_local: share must lie between 0 and 1, got {share!r}")
    local = min(max(1, round(share * _heads("global_local", heads, 2))), heads - 1)
    return (Cells(size=size),) * local + (KeyStride(step=step),) * (heads - local)


def _heads(name: str, heads: int, least: int) -> int:
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < least:
        raise ValueError(f"{name}: heads must be an integer >= {least}, got {heads!r}")
    return heads
