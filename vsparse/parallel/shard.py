"""The rows of one process where several share the tokens of a video: whole tiles of a layout, in its order."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.geometry import Segment
from vsparse.layouts import Blocking, Layout
from vsparse.parallel.balance import split_blocks
from vsparse.parallel.collectives import Group, gather, total
from vsparse.parallel.sharded import How, sharded_attention
from vsparse.parallel.spread import spread_attention

__all__ = ["Shard", "cannot_shard", "order_of", "shard_of"]


def cannot_shard(layouts: Sequence[Layout]) -> str | None:
    """Why tokens cannot be shared in the order of these layouts, those of all sites of a model; None when they can."""
    if len({layout.key for layout in layouts}) > 1:
        return "its layers have tokens in several orders"
    (layout,) = {layout.key: layout for layout in layouts}.values()
    if layout.queries is not None:
        return "it finds the order of the tokens in each call"
    if layout.start is not None or layout.slot_token.shape[:2] != (1, 1):
        return "its blocks are no padded grid that all heads share"
    return None


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Shard:
    """What one process has of the tokens of a layout, the text besides.

    Args:
        layout: Of the whole video. own: of this process: the text before, its tiles, the text after; its tokens are
            numbered in that order. group: who shares the tokens. tiles: ``R + 1`` bounds of the processes, counted
            from the first tile of the video. tokens: of the video that each process holds. how: keys come.
    """

    layout: Layout
    own: Layout
    group: Group
    tiles: tuple[int, ...]
    tokens: tuple[int, ...]
    how: How

    @property
    def text(self) -> tuple[int, int]:
        """Tiles of text before and after the video."""
        return _text_tiles(self.layout)

    # ---- of all processes -------------------------------------------------------------------------------------------

    def all_blocks(self, x: Tensor, dim: int, *, what: str = "pooled") -> Tensor:
        """What each process has of its blocks or tiles, of all of them in their order.

        Args:
            x: As many entries along ``dim`` as `own` has blocks, or tiles. what: they are.
        """
        per_tile = x.shape[dim] // self.own.tiled.blocks
        before, after = (n * per_tile for n in self.text)
        video = x.narrow(dim, before, x.shape[dim] - before - after)
        sizes = [per_tile * (last - first) for first, last in pairwise(self.tiles)]
        found = gather(self.group, video, sizes, dim=dim, what=what)
        if not before and not after:
            return found
        return torch.cat((x.narrow(dim, 0, before), found, x.narrow(dim, x.shape[dim] - after, after)), dim)

    def all_slots(self, x: Tensor) -> Tensor:
        """``[B, S, H, D]`` packed, of this process -> of all."""
        return self.all_blocks(x.unflatten(1, (self.own.blocks, -1)), 1, what="keys").flatten(1, 2)

    def each(self, x: Tensor) -> Tensor:
        """What every process has, one after the other."""
        return gather(self.group, x[None], (1,) * self.group.size, dim=0, what="sums")

    def sum_slots(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``[B, S, H, D]`` packed, of this process -> the sum over all slots of all, ``[B, 1, H, D]``."""
        per_tile = self.own.tiled.block
        first, last = self.text[0] * per_tile, x.shape[1] - self.text[1] * per_tile
        found = total(self.group, x[:, first:last].sum(1, keepdim=True, dtype=dtype), what="sums")
        text = [part.sum(1, keepdim=True, dtype=dtype) for part in (x[:, :first], x[:, last:]) if part.shape[1]]
        return sum(text, found)

    def own_rows(self, blocks: BlockMap, rows: Blocking) -> BlockMap:
        """Of a map of all rows, those of this process, whose blocking ``rows`` is."""
        index = self._own_blocks(blocks.index.device, blocks.q.blocks)
        return dc.replace(
            blocks, index=blocks.index.index_select(2, index), count=blocks.count.index_select(2, index), q=rows
        )

    def _own_blocks(self, device: torch.device, blocks: int) -> Tensor:
        return _chosen(self.layout, self.tiles, self.group.rank, blocks // self.layout.tiled.blocks, device)

    # ---- attention --------------------------------------------------------------------------------------------------

    def slots_anywhere(self, x: Tensor, slots: Tensor) -> Tensor:
        """Some slots of the video, numbered as in `layout`, of packed ``[B, S, H, D]``, on every process."""
        per_tile, before = self.own.tiled.block, self.text[0]
        first, last = ((before + tile) * per_tile for tile in self.tiles[self.group.rank :][:2])
        here = (slots >= first) & (slots < last)
        place = torch.where(here, slots - first + before * per_tile, 0)
        found = torch.where(here[:, None, None], x.index_select(1, place) if x.shape[1] else 0, 0)
        return total(self.group, found, what="samples")

    def attend_anywhere(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap) -> tuple[Tensor, Tensor]:
        """Attention of queries that every process has, ``[B, R, H, D]``, to the keys of all; a map to all blocks."""
        chosen, k, v = self._bring(blocks.k, k, v)
        keep = blocks.to_mask().index_select(-1, chosen)
        bias = None if blocks.key_bias is None else blocks.key_bias.index_select(2, chosen)
        keys = Blocking(length=blocks.k.length.index_select(2, chosen), block=blocks.k.block)
        part = dc.replace(BlockMap.from_mask(keep, blocks.q, keys), key_bias=bias)
        return spread_attention(q, k, v, part, group=self.group)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of this process's rows, in slots; rows of text see every key, as in all methods.

        Args:
            q, k, v: ``[B, S, H, D]`` packed as `own` has it. blocks: rows of `own`, columns of the whole layout.

        Returns:
            out ``[B, S, H, D]`` and lse ``[B, S, H]``.
        """
        rows, keys = blocks.q, blocks.k
        per_q, per_k = rows.blocks // self.own.tiled.blocks, keys.blocks // self.layout.tiled.blocks
        before, after = self.text
        video = rows.blocks - (before + after) * per_q
        first = before * per_q
        common = (0, before * per_k) if before else (keys.blocks - after * per_k, keys.blocks)
        bounds = [(before + tile) * per_k for tile in self.tiles]
        middle = _Rows(first, video, rows.block)
        out, lse = sharded_attention(
            middle.take(q),
            k,
            v,
            middle.map(blocks),
            group=self.group,
            bounds=bounds,
            common=common if before or after else (0, 0),
            how=self.how,
            scale=scale,
        )
        if not before and not after:
            return out, lse
        return self._with_text(q, k, v, blocks, out, lse, scale)

    def _with_text(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, out: Tensor, lse: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """The rows of text, too: every process has them, and attends to its own keys; one of them to those of text."""
        rows = blocks.q
        per_q = rows.blocks // self.own.tiled.blocks
        found = [(out, lse)]
        for place, count in enumerate(self.text):
            if not count:
                continue
            some = _Rows(0 if place == 0 else rows.blocks - count * per_q, count * per_q, rows.block)
            chosen, keys, values = self._bring(blocks.k, k, v)
            bias = None if blocks.key_bias is None else blocks.key_bias.index_select(2, chosen)
            length = blocks.k.length.index_select(2, chosen)
            full = BlockMap.full(some.blocking(rows), Blocking(length=length, block=blocks.k.block))
            part = dc.replace(full, key_bias=bias)
            made = spread_attention(some.take(q), keys, values, part, group=self.group, scale=scale)
            found.insert(0 if place == 0 else len(found), made)
        return torch.cat([x for x, _ in found], 1), torch.cat([x for _, x in found], 1)

    def _bring(self, keys: Blocking, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The keys that this process alone brings to rows that all have: its own, the first one those of text, too.

        Returns:
            Their blocks, and k and v of them.
        """
        per_tile = keys.blocks // self.layout.tiled.blocks
        before, after = (n * per_tile for n in self.text)
        chosen = self._own_blocks(k.device, keys.blocks)
        if not self.group.rank:
            return chosen, k, v
        k, v = (x[:, before * keys.block : x.shape[1] - after * keys.block] for x in (k, v))
        return chosen[before : len(chosen) - after], k, v


@dc.dataclass(frozen=True)
class _Rows:
    """Some neighbouring rows of a map."""

    first: int
    count: int
    block: int

    def take(self, x: Tensor) -> Tensor:
        return x[:, self.first * self.block : (self.first + self.count) * self.block]

    def blocking(self, rows: Blocking) -> Blocking:
        return Blocking(length=rows.length[..., self.first : self.first + self.count], block=rows.block)

    def map(self, blocks: BlockMap) -> BlockMap:
        part = slice(self.first, self.first + self.count)
        return dc.replace(
            blocks, index=blocks.index[:, :, part], count=blocks.count[:, :, part], q=self.blocking(blocks.q)
        )


def _text_tiles(layout: Layout) -> tuple[int, int]:
    text = (layout.tiled.segment == int(Segment.TEXT)).tolist()
    before = next((i for i, is_text in enumerate(text) if not is_text), len(text))
    return before, sum(text) - before


def _chosen(layout: Layout, tiles: Sequence[int], place: int, per_tile: int, device: torch.device) -> Tensor:
    """Blocks of a process: the text before, its own, the text after."""
    before, after = _text_tiles(layout)
    count = layout.tiled.blocks
    own = range(before + tiles[place], before + tiles[place + 1])
    chosen = [*range(before), *own, *range(count - after, count)]
    each = torch.tensor(chosen, device=device)[:, None] * per_tile + torch.arange(per_tile, device=device)
    return each.flatten()


def shard_of(layout: Layout, group: Group, how: How) -> Shard:
    """The shard of this process: as many tokens for each as whole tiles allow.

    Raises:
        ValueError: fewer tiles than processes.
    """
    before, after = _text_tiles(layout)
    lengths = layout.tiled.length[0, 0].tolist()
    video = lengths[before : len(lengths) - after]
    if len(video) < group.size:
        raise ValueError(
            f"context parallel: {layout.grid} has {len(video)} tiles of this method for {group.size} processes that "
            "share tokens; use fewer of them (ring, gather) and more that share heads (ulysses), or a larger video"
        )
    tiles = split_blocks(video, group.size)
    tokens = tuple(int(sum(video[first:last])) for first, last in pairwise(tiles))
    return Shard(layout=layout, own=_part(layout, tiles, group.rank), group=group, tiles=tiles, tokens=tokens, how=how)


def _part(layout: Layout, tiles: Sequence[int], place: int) -> Layout:
    """The layout of a process's blocks over its own tokens, numbered in the order of the slots."""
    chosen = _chosen(layout, tiles, place, layout.blocks_per_tile, layout.length.device)
    slots = layout.slot_token.unflatten(-1, (layout.blocks, layout.block))[:, :, chosen].flatten(2)
    held = slots >= 0
    # Text comes in host order in its blocks, as video tokens do here in theirs: numbers rise with the slots.
    slot_token = torch.where(held, held.cumsum(-1) - 1, -1)
    token_slot = held[0, 0].nonzero()[:, 0][None, None]
    return Layout(
        grid=layout.grid,
        key=(*layout.key, "shard", tuple(tiles), place),
        block=layout.block,
        slot_token=slot_token,
        token_slot=token_slot,
        length=layout.length[..., chosen],
        segment=layout.segment[chosen],
        text_offset=layout.text_offset[chosen],
        blocks_per_tile=layout.blocks_per_tile,
    )


def order_of(layout: Layout) -> Tensor:
    """``[video]`` int64: the video tokens in the order of the slots, counted from the first of the video."""
    slots = layout.slot_token[0, 0]
    first = layout.grid.text_before
    return slots[(slots >= first) & (slots < first + layout.grid.video)] - first
