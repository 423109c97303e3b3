"""Token rows: where the tokens of a list of blocks lie in a flat tensor, and how a block map is cut into chunks.

A *lane* is one (batch, head) pair, ``b * H + h``. A *row id* addresses ``[B, S, H, D]`` viewed as ``[B * S * H, D]``:
slot ``s`` of lane ``(b, h)`` is row ``(b * S + s) * H + h``. Everything here yields row ids; nothing reads q, k or v.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking

__all__ = ["Chunk", "Lanes", "Plan", "Tokens", "flat", "lane_groups", "tokens", "upto"]

# PIECE: bytes of one gathered tensor in a piece, counted in the dtype of q; large problems take pieces up to four times
# as large, for fewer calls. K and V of a piece are gathered in float32 and then take 1 MiB (2 MiB for bfloat16), which
# the second-level caches of two cores hold. PIECES: of a chunk. GROUP: elements of one tensor in a group of lanes: what
# one pass keeps warm, and what its sums take. PART: queries of a key-major set.
PIECE = 1 << 19
PIECES = 3
GROUP = 1 << 19
PART = 512


def upto(n: int) -> Tensor:
    """0, 1, ... n - 1 as int64 on the CPU, whatever the default device is."""
    return torch.arange(n, device="cpu")


def flat(x: Tensor) -> Tensor:
    """``[B, S, H, ...]`` -> ``[B * S * H, ...]``, a view when x is contiguous."""
    return x.contiguous().flatten(0, 2)


@dc.dataclass(frozen=True)
class Tokens:
    """Tokens of ``n`` lists of blocks, shorter lists padded by repeating their first token.

    Args:
        row: ``[n, L]`` int64 row ids. valid: ``[n, L]`` bool, or None when nothing is padded.
        label: ``[n, L]``, the label of the block each token came from (None when none was asked for).
    """

    row: Tensor
    valid: Tensor | None
    label: Tensor | None

    def take(self, x: Tensor, dtype: torch.dtype, room: Tensor | None = None) -> Tensor:
        """Rows of ``x [B * S * H, ...]`` as ``[n, L, ...]`` in ``dtype``; ``room [n * L or more, ...]``: where."""
        row = self.row.flatten()
        if room is None:
            taken = x.index_select(0, row).to(dtype)
        elif x.dtype == dtype:
            taken = torch.index_select(x, 0, row, out=room[: len(row)])
        else:
            taken = room[: len(row)].copy_(x.index_select(0, row))
        return taken.view(*self.row.shape, *x.shape[1:])

    def part(self, lists: slice, width: int | None = None) -> Tokens:
        """Some of the lists, none of which is longer than ``width``."""
        row, valid, label = (None if x is None else x[lists, :width] for x in (self.row, self.valid, self.label))
        assert row is not None
        return Tokens(row, None if valid is None or bool(valid.all()) else valid, label)

    def put(self, x: Tensor, value: Tensor) -> None:
        """Write ``value [n, L, ...]`` to the rows of ``x``, padding left out."""
        row, value = self.row.flatten(), value.flatten(0, 1)
        if self.valid is not None:
            kept = self.valid.flatten().nonzero().squeeze(1)
            row, value = row[kept], value[kept]
        x[row] = value.to(x.dtype)


def tokens(
    start: Tensor, length: Tensor, stride: int, *, label: Tensor | None = None, offsets: Tensor | None = None
) -> Tokens:
    """Row ids of all valid tokens of ``n`` lists of ``c`` blocks, list by list, block by block.

    Args:
        start: ``[n, c]`` int64, row id of the first slot of each block. length: ``[n, c]`` int64, its valid tokens.
            No list may be without tokens.
        stride: Rows between two slots of a block. label: ``[n, c]``, carried along.
        offsets: ``[R]`` int64, the slots of a block to list, those past its length left out; None: all valid ones.
    """
    shortest, longest = (int(x) for x in length.aminmax())
    place = upto(longest) if offsets is None else offsets
    row = start[..., None] + place * stride
    wide = None if label is None else label[..., None].expand_as(row)
    if offsets is None and shortest == longest:
        return Tokens(row.flatten(1), None, None if wide is None else wide.flatten(1))
    used = length > 0
    if offsets is None and bool(((length == longest) == used).all()) and bool(used.all(1).any()):
        # Whole blocks, but lists of different counts: pad by blocks, which is much cheaper than by tokens.
        first = used.to(torch.int8).argmax(1, keepdim=True)
        row = torch.where(used[..., None], row, row.gather(1, first[..., None].expand(-1, -1, longest)))
        valid = used[..., None].expand_as(row).flatten(1)
        return Tokens(row.flatten(1), valid, None if wide is None else wide.flatten(1))
    inside = place < length[..., None]
    size = inside.sum((1, 2))
    valid = upto(int(size.max())) < size[:, None]
    first = size.cumsum(0) - size

    def padded(x: Tensor) -> Tensor:
        kept = x[inside]
        return kept[first][:, None].repeat(1, valid.shape[1]).masked_scatter(valid, kept)

    return Tokens(padded(row), None if bool(valid.all()) else valid, None if wide is None else padded(wide))


class Lanes:
    """The blocks of one sequence as row ids.

    Args:
        blocking: The blocking. x: ``[B, S, H, ...]``, for its shape.
        offsets: ``[R]`` int64, the only slots of a block to list; None: all.

    Attributes: ``start``, ``length`` and ``size`` (tokens to list) of each block, ``[B * H, K]`` int64, and ``stride``,
    the rows between two slots.
    """

    def __init__(self, blocking: Blocking, x: Tensor, offsets: Tensor | None = None) -> None:
        batch, slots, heads = x.shape[:3]
        start = blocking.start
        if start is None:
            start = (upto(blocking.blocks) * blocking.block)[None, None]
        first = upto(batch)[:, None] * (slots * heads) + upto(heads)
        shape = (batch, heads, blocking.blocks)
        self.start = (start.long() * heads + first[..., None]).expand(shape).flatten(0, 1)
        self.length = blocking.length.long().expand(shape).flatten(0, 1)
        self.offsets = offsets
        self.size = self.length if offsets is None else (offsets < self.length[..., None]).sum(-1)
        self.stride, self.slots = heads, slots

    def tokens(self, lanes: Tensor, *, keep: Tensor | None = None, label: bool = False) -> Tokens:
        """Tokens of whole lanes ``[n]``, or of the blocks that ``keep [n, K]`` marks; ``label`` asks for block ids."""
        length = self.length[lanes] if keep is None else torch.where(keep, self.length[lanes], 0)
        block = upto(length.shape[1]).expand_as(length) if label else None
        return tokens(self.start[lanes], length, self.stride, label=block, offsets=self.offsets)

    def listed(self, lanes: Tensor, block: Tensor, *, label: bool = False) -> Tokens:
        """Tokens of the blocks ``[n, c]`` of each lane ``[n]``."""
        place = lanes[:, None] * self.start.shape[1] + block
        start, length = self.start.take(place), self.length.take(place)
        return tokens(start, length, self.stride, label=block if label else None, offsets=self.offsets)


def lane_groups(lanes: int, elements: int, least: int = 1) -> Iterator[Tensor]:
    """Runs of ``least`` or more lanes, each lane with ``elements`` elements, about ``GROUP`` elements together."""
    yield from upto(lanes).split(max(least, GROUP // elements))


@dc.dataclass(frozen=True)
class Chunk:
    """``n`` sets of queries, each attending to one set of keys.

    Args:
        q: Query tokens ``[n, A]``. k: key tokens ``[n, L]``; labels are key blocks if the plan was asked for them.
        bias: ``[n, L]`` added to the logits, -inf on padding, or None.
        target: ``[n]`` int64, ``lane * Q + i`` of the query block, for chunks of listed rows.
        room: Sets whose keys are gathered at once.
    """

    q: Tokens
    k: Tokens
    bias: Tensor | None
    target: Tensor
    room: int

    def pieces(self) -> Iterator[tuple[slice, Tokens, Tensor | None]]:
        """``room`` sets after the other: where they stand in the chunk, their keys and their part of ``bias``."""
        bias = self.bias
        for begin in range(0, len(self.target), self.room):
            part = slice(begin, begin + self.room)
            width = self.k.row.shape[1] if self.k.valid is None else int(self.k.valid[part].sum(1).max())
            yield part, self.k.part(part, width), None if bias is None else bias[part, :width]


class Plan:
    """A block map over concrete q and k, cut into chunks.

    Full rows (every key block) of a lane form one set of queries against all its keys. The other rows are listed:
    row-major chunks gather the keys of each query block; key-major chunks gather the queries of each key block.
    """

    def __init__(
        self,
        blocks: BlockMap,
        q: Tensor,
        k: Tensor,
        dtype: torch.dtype,
        *,
        label: bool = False,
        offsets: Tensor | None = None,
        itemsize: int | None = None,
    ) -> None:
        lead = (q.shape[0], q.shape[2])
        self.q, self.k = Lanes(blocks.q, q, offsets), Lanes(blocks.k, k)
        self.lanes, self.width, self.dtype = lead[0] * lead[1], q.shape[-1], dtype
        itemsize = q.element_size() if itemsize is None else itemsize
        self.piece = min(max(PIECE, q.nbytes // 16), 4 * PIECE) // (self.width * itemsize)
        count = blocks.count.long().expand(*lead, -1).flatten(0, 1)
        self.full = (count == blocks.k.blocks) & (self.q.size > 0)
        self.count = torch.where(self.full | (self.q.size == 0), 0, count)
        self.index = blocks.index.flatten(0, 1)
        lists = upto(len(self.index)).view(blocks.index.shape[:2])
        self.list_of_lane = lists.expand(lead).flatten()
        self.bias = None
        if blocks.key_bias is not None:
            self.bias = blocks.key_bias.to(dtype).expand(*lead, -1).flatten(0, 1)
        self.label = label or self.bias is not None

    @property
    def complete(self) -> bool:
        """Whether every query slot is written: disjoint blocks hold all of them, and every row has keys."""
        if self.key_major or self.q.slots * self.lanes != int(self.q.size.sum()):
            return False
        return bool((self.k.size > 0).all()) and bool((self.full | (self.count > 0)).all())

    @property
    def key_major(self) -> bool:
        """Whether query blocks are so short that gathering keys for each of them would cost more than attending."""
        queries, keys = int(self.q.length.max()), int(self.k.length.max())
        return queries < 32 and 8 * queries <= keys

    def groups(self) -> Iterator[Tensor]:
        """Lanes in runs that one pass keeps warm; full rows need one lane per thread, listed rows do not."""
        least = torch.get_num_threads() if bool(self.full.any()) else 1
        return lane_groups(self.lanes, max(self.q.slots, self.k.slots) * self.width, least)

    def _chunk(self, lane: Tensor, q: Tokens, k: Tokens, target: Tensor, room: int) -> Chunk:
        bias = None if self.bias is None or k.label is None else self.bias[lane].gather(1, k.label)
        if k.valid is not None:
            bias = k.row.new_zeros(k.row.shape, dtype=self.dtype) if bias is None else bias
            bias = bias.masked_fill(~k.valid, -torch.inf)
        return Chunk(q, k, bias, target, room)

    def full_rows(self, lanes: Tensor) -> Iterator[Chunk]:
        """Chunks of lanes, each with the queries of its full rows against all its keys."""
        keys = self.k.size[lanes].sum(1)
        order = _by_size((self.q.size[lanes] * self.full[lanes]).sum(1), keys)
        lanes, keys = lanes[order], keys[order]
        for part, room in _cut(keys, self.piece):
            lane = lanes[part]
            q = self.q.tokens(lane, keep=self.full[lane], label=self.label)
            yield self._chunk(lane, q, self.k.tokens(lane, label=self.label), lane, room)

    def listed_rows(self, lanes: Tensor) -> Iterator[Chunk]:
        """Row-major chunks: query blocks with the keys they keep, those of like size together."""
        count, index, used = self._lists(lanes)
        index = torch.where(used, index, 0)
        length = torch.where(used, self.k.length[lanes][:, None].expand(-1, count.shape[1], -1).gather(2, index), 0)
        size, queries = length.sum(2).flatten(), self.q.size[lanes].flatten()
        # Flash attention on CPU works on tiles of 32 queries: lists with as many tiles go together.
        order = _by_size((queries + 31) // 32, size)
        if not len(order):
            return
        lane, block = lanes[order // count.shape[1]], order % count.shape[1]
        index, length = index.flatten(0, 1)[order], length.flatten(0, 1)[order]
        start = self.k.start.take(lane[:, None] * self.k.start.shape[1] + index)
        q, target = self.q.listed(lane, block[:, None]), lane * count.shape[1] + block
        counts, widths = count.flatten()[order].tolist(), queries[order].tolist()
        for part, room in _cut(size[order], self.piece, PIECES):
            entries = max(counts[part])
            label = index[part, :entries] if self.label else None
            k = tokens(start[part, :entries], length[part, :entries], self.k.stride, label=label)
            yield self._chunk(lane[part], q.part(part, max(widths[part])), k, target[part], room)

    def listed_columns(self, lanes: Tensor) -> Iterator[Chunk]:
        """Key-major chunks: one key block of each lane with the queries that keep it; no query twice in a chunk."""
        count, index, used = self._lists(lanes)
        blocks = self.k.size.shape[1]
        keep = count.new_zeros(*count.shape, blocks + 1, dtype=torch.bool)
        keep = keep.scatter_(2, torch.where(used, index, blocks), True).transpose(1, 2).contiguous()
        for block in range(blocks):
            rows = keep[:, block] & (self.q.size[lanes] > 0)
            busy = (rows.any(1) & (self.k.size[lanes, block] > 0)).nonzero().squeeze(1)
            if not len(busy):
                continue
            q = _in_parts(self.q.tokens(lanes[busy], keep=rows[busy]))
            lane = lanes[busy].repeat_interleave(len(q.row) // len(busy))
            k = self.k.listed(lane, torch.full_like(lane, block)[:, None], label=self.label)
            yield self._chunk(lane, q, k, lane, len(lane))

    def _lists(self, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``count [n, Q]``, ``index [n, Q, M]`` int64 and which of its entries are used, full rows left out."""
        count = self.count[lanes]
        index = self.index[self.list_of_lane[lanes], :, : int(count.max())].long()
        return count, index, upto(index.shape[2]) < count[..., None]


def _by_size(major: Tensor, minor: Tensor) -> Tensor:
    """Order of the items that have work, largest first; ties keep their order."""
    work = ((major > 0) & (minor > 0)).nonzero().squeeze(1)
    key = major[work] * (int(minor.max()) + 1) + minor[work]
    return work[key.argsort(descending=True, stable=True)]


def _cut(size: Tensor, room: int, pieces: int = 1) -> Iterator[tuple[slice, int]]:
    """Cut items of ``size`` tokens, largest first, into chunks of pieces of ``room`` tokens or one item per thread.

    Yields the items of each chunk and how many of them are a piece.
    """
    sizes, begin = size.tolist(), 0
    while begin < len(sizes):
        piece = max(torch.get_num_threads(), room // sizes[begin])
        yield slice(begin, begin + pieces * piece), piece
        begin += pieces * piece


def _in_parts(q: Tokens) -> Tokens:
    """Split the lists of a few lanes so that every thread has some; keys are gathered once more for each part."""
    parts = -(-q.row.shape[1] // PART)
    if parts == 1:
        return q
    width = -(-q.row.shape[1] // parts)
    short = parts * width - q.row.shape[1]
    row = torch.cat([q.row, q.row[:, :1].expand(-1, short)], 1).view(-1, width)
    valid = torch.ones_like(q.row, dtype=torch.bool) if q.valid is None else q.valid
    return Tokens(row, torch.nn.functional.pad(valid, (0, short)).view(-1, width), None)
