"""Orders and blockings: where each token sits while attention works on blocks, and how it gets back."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vsparse.geometry import Grid, Segment
from vsparse.layouts.reorder import reorder, take

__all__ = ["Blocking", "Layout"]


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Blocking:
    """What an op needs besides q, k and v: the length (and start) of every block of one sequence.

    Args:
        length: ``[B|1, H|1, K]`` int32, valid tokens of each block; they are the first ``length`` slots of the block.
        block: Slots of a block (its capacity).
        start: ``[B|1, H|1, K]`` int32, first slot of each block, or None when block ``i`` starts at ``i * block``.
        layout: The layout that was bound; needed by ``pack``, ``unpack`` and ``expand`` only.
        order: Where text lengths leave tokens out: the token of each slot ``[B|1, H|1, S]`` and the slot of each token
            ``[B|1, H|1, N]``, int64, -1 where there is none or it is not valid. None: the layout's own.
        arranged: The order is not the layout's: it was found from data, by sample and head (`arrange`).
    """

    length: Tensor
    block: int
    start: Tensor | None = None
    layout: Layout | None = None
    order: tuple[Tensor, Tensor] | None = None
    arranged: bool = False

    @property
    def blocks(self) -> int:
        """K: number of blocks."""
        return self.length.shape[-1]

    @property
    def segment(self) -> Tensor:
        """``[K]`` int32, the `Segment` of each block."""
        return self._bound().segment

    @property
    def text(self) -> Tensor | None:
        """``[K]`` bool, blocks that hold text, or None when the sequence has no text."""
        layout = self._bound()
        return layout.segment == int(Segment.TEXT) if layout.grid.text else None

    def _bound(self) -> Layout:
        if self.layout is None:
            raise ValueError("this Blocking carries no layout: make it with Layout.bind(...)")
        return self.layout

    def pack(self, x: Tensor) -> Tensor:
        """``[B, N, H, D]`` in host order -> ``[B, S, H, D]`` in block order; padding and invalid text become zero."""
        layout = self._bound()
        if x.ndim != 4 or x.shape[1] != layout.tokens:
            raise ValueError(f"pack: x must be [B, N={layout.tokens}, H, D] for {layout.grid}, got {tuple(x.shape)}")
        if self.arranged or not layout.identity:
            return reorder(x, *(self.order or (layout.slot_token, layout.token_slot)))
        return x if self.order is None else torch.where((self.order[0] >= 0).transpose(1, 2).unsqueeze(-1), x, 0)

    def unpack(self, y: Tensor) -> Tensor:
        """``[B, S, H, D]`` in block order -> ``[B, N, H, D]`` in host order."""
        layout = self._bound()
        if y.ndim != 4 or y.shape[1] != layout.slots:
            raise ValueError(f"unpack: y must be [B, S={layout.slots}, H, D], got {tuple(y.shape)}")
        if self.arranged and self.order is not None:
            return reorder(y, self.order[1], self.order[0])
        return y if layout.identity else reorder(y, layout.token_slot, layout.slot_token)

    def expand(self, pooled: Tensor) -> Tensor:
        """``[B, K, H, D]`` -> ``[B, N, H, D]`` in host order: every token receives the value of its block."""
        if pooled.ndim != 4 or pooled.shape[1] != self.blocks:
            raise ValueError(f"expand: pooled must be [B, K={self.blocks}, H, D], got {tuple(pooled.shape)}")
        layout = self._bound()
        if self.arranged:
            raise ValueError("expand: blocks of an order found from data differ by sample and head")
        per_tile = layout.blocks // self.blocks
        return take(pooled, layout.token_block // per_tile if per_tile > 1 else layout.token_block)

    def rows(self) -> Blocking:
        """The same slots with one block per slot: the query side of a map that chooses per token."""
        layout = self._bound()
        slot_token = layout.slot_token if self.order is None else self.order[0]
        return dc.replace(self, length=(slot_token >= 0).to(torch.int32), block=1, start=None)

    def tiles(self) -> Blocking:
        """The same slots with one block per tile; equal to this blocking when a tile is one block."""
        layout = self._bound()
        per_tile = layout.blocks_per_tile
        if per_tile == 1:
            return self
        length = self.length.unflatten(-1, (-1, per_tile)).sum(-1, dtype=torch.int32)
        return dc.replace(self, length=length, block=self.block * per_tile, layout=layout.tiled)


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """A static order (permutation of tokens) and blocking (lengths and segments of blocks), built outside any trace.

    Args:
        grid: The lattice.
        key: Ints and strings that determine every tensor here; equal keys mean equal layouts.
        block: Slots of a block.
        slot_token: ``[B|1, H|1, S]`` int64, the token of each slot, -1 for padding.
        token_slot: ``[B|1, H|1, N]`` int64, the slot of each token.
        length: ``[B|1, H|1, K]`` int32, tokens of each block before per-sample text lengths enter.
        segment: ``[K]`` int32, the `Segment` of each block.
        text_offset: ``[K]`` int32, tokens of text before this block (0 for blocks that hold none).
        start: ``[B|1, H|1, K]`` int32 or None for the padded grid.
        blocks_per_tile: Consecutive blocks that together hold one tile.
        queries: The layout of the queries where it has other blocks than that of the keys, which this one is then.
    """

    grid: Grid
    key: tuple[object, ...]
    block: int
    slot_token: Tensor
    token_slot: Tensor
    length: Tensor
    segment: Tensor
    text_offset: Tensor
    start: Tensor | None = None
    blocks_per_tile: int = 1
    queries: Layout | None = None
    identity: bool = dc.field(init=False)
    video_tiles: int = dc.field(init=False)
    padded: bool = dc.field(init=False)
    slot_source: Tensor = dc.field(init=False)
    token_block: Tensor = dc.field(init=False)
    tiled: Layout = dc.field(init=False)

    def __post_init__(self) -> None:
        slots, tokens = self.slot_token.shape[-1], self.token_slot.shape[-1]
        with torch.inference_mode(False), _disable_current_modes():
            video = int((self.segment != int(Segment.TEXT)).sum()) // self.blocks_per_tile
            same = slots == tokens and bool(
                (self.slot_token == torch.arange(slots, device=self.slot_token.device)).all()
            )
            source = self.slot_token.clamp_min(0)
            if self.start is None:
                block = self.token_slot // self.block
            else:
                block = torch.searchsorted(self.start.long(), self.token_slot, right=True) - 1
        for name, value in (
            ("identity", same),
            ("padded", slots != tokens),
            ("slot_source", source),
            ("token_block", block),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "video_tiles", video)
        with torch.inference_mode(False), _disable_current_modes():
            object.__setattr__(self, "tiled", _tiled(self))

    @property
    def slots(self) -> int:
        """S: slots in block order, padding included."""
        return self.slot_token.shape[-1]

    @property
    def tokens(self) -> int:
        """N: tokens in host order."""
        return self.token_slot.shape[-1]

    @property
    def blocks(self) -> int:
        """K: number of blocks."""
        return self.length.shape[-1]

    @property
    def tile_of_block(self) -> Tensor:
        """``[K]`` int64, the tile that each block belongs to."""
        return torch.arange(self.blocks, device=self.length.device) // self.blocks_per_tile

    def bind(self, text_length: Tensor | None = None) -> Blocking:
        """Per-sample lengths enter here and nowhere else.

        Args:
            text_length: ``[B]`` integer tensor, valid text tokens of each sample (a prefix of the text), or None when
                all text tokens are valid.

        Returns:
            The `Blocking` of this layout for that batch.

        Raises:
            ValueError: the grid has no text, or text on both sides, or the tensor has another form.
        """
        if text_length is None:
            return Blocking(length=self.length, block=self.block, start=self.start, layout=self)
        if not self.grid.text:
            raise ValueError(f"text_length was given, but {self.grid} has no text tokens")
        if self.grid.text_before and self.grid.text_after:
            raise ValueError(f"text_length is ambiguous with text on both sides of the video: {self.grid}")
        if text_length.ndim != 1 or text_length.dtype.is_floating_point or text_length.dtype == torch.bool:
            raise ValueError(
                f"text_length must be an integer tensor [B], got {text_length.dtype} {tuple(text_length.shape)}"
            )
        room = text_length.to(torch.int32)[:, None, None] - self.text_offset
        length = torch.where(self.segment == int(Segment.TEXT), room.clamp_min(0).minimum(self.length), self.length)
        lead = torch.broadcast_shapes(length.shape[:2], self.token_slot.shape[:2])
        block = self.token_block.expand(*lead, -1)
        first = block * self.block
        if self.start is not None:
            first = self.start.long().expand(*lead, -1).gather(-1, block)
        valid = self.token_slot - first < length.long().expand(*lead, -1).gather(-1, block)
        kept = valid.gather(-1, self.slot_source.expand(*lead, -1))
        order = torch.where(kept, self.slot_token, -1), torch.where(valid, self.token_slot, -1)
        return Blocking(length=length, block=self.block, start=self.start, layout=self, order=order)

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on another device (itself when it is already there)."""
        return self if self.length.device == torch.device(device) else _moved(self, torch.device(device))


def _fields(layout: Layout) -> dict[str, object]:
    return {f.name: getattr(layout, f.name) for f in dc.fields(Layout) if f.init}


def _moved(layout: Layout, device: torch.device) -> Layout:
    twin = object.__new__(Layout)
    object.__setattr__(twin, "tiled", twin if layout.tiled is layout else _moved(layout.tiled, device))
    with torch.inference_mode(False):
        for field in dc.fields(Layout):
            if field.name == "tiled":
                continue
            value = getattr(layout, field.name)
            moves = isinstance(value, Tensor | Layout)
            object.__setattr__(twin, field.name, value.to(device) if moves else value)
    return twin


def _tiled(layout: Layout) -> Layout:
    """The same order with one block per tile; the layout itself when that is what it has."""
    n = layout.blocks_per_tile
    if n == 1:
        return layout
    values = _fields(layout)
    values |= {
        "block": layout.block * n,
        "length": layout.length.unflatten(-1, (-1, n)).sum(-1, dtype=torch.int32),
        "segment": layout.segment[::n],
        "text_offset": layout.text_offset[::n],
        "key": (*layout.key, "tiled"),
        "blocks_per_tile": 1,
    }
    return Layout(**values)  # type: ignore[arg-type]
