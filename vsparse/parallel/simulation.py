"""What a map means for several processes: how many pairs each computes, and which key blocks of others it needs."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking
from vsparse.parallel.balance import Assignment, assign_heads, heads_in_order, split_blocks

__all__ = ["Shards", "Split", "even_split", "hop", "simulate", "simulate_all"]

Shards = Literal["tokens", "work"]
"""Where shards end: as many key slots in each, or as many computed pairs in the rows of each."""


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One attention on ``U * R`` processes: place u in the head group, shard s of the sequence; one sample.

    Args:
        heads: Of each place, as `assign_heads` gives them.
        bounds: ``R + 1``, key blocks at which shards begin (columns of the map); empty where there was no map.
        slots: ``[R]`` float64, video slots of each shard.
        pairs: ``[U, R, R]`` float64, query-key pairs that process (u, s) computes with keys of shard s', over its
            heads, padding of blocks included; text keys count as its own.
        needed: ``[U, R, R]`` float64, key slots of shard s' that any row of process (u, s) needs, summed over its
            heads; 0 for its own. This is the union over its rows: with pairs that lie elsewhere for every row it is far
            more than the density of one row.
        naive: Slowest over mean of the pairs with the heads in their order and shards of equal tokens.
    """

    heads: Assignment
    bounds: tuple[int, ...]
    slots: Tensor
    pairs: Tensor
    needed: Tensor
    naive: float

    @property
    def ulysses(self) -> int:
        """U: processes of a head group."""
        return self.pairs.shape[0]

    @property
    def ring(self) -> int:
        """R: processes of a sequence group, which are the shards."""
        return self.pairs.shape[1]

    @property
    def balanced(self) -> float:
        """Slowest over mean of the pairs."""
        return _over_mean(self.pairs.sum(-1))

    @property
    def dense(self) -> Tensor:
        """``[U, R]`` float64: head-slots that a dense ring brings to each process: all that is not its own."""
        counts = torch.tensor([len(group) for group in self.heads], dtype=torch.float64)
        return counts[:, None] * (self.slots.sum() - self.slots)

    @property
    def union(self) -> float:
        """Needed head-slots of others over those of the dense ring, over all processes; 0 where there are no others."""
        dense = float(self.dense.sum())
        return float(self.needed.sum()) / dense if dense else 0.0

    @property
    def union_most(self) -> float:
        """The same of the process that needs most."""
        dense = self.dense
        return float((self.needed.sum(-1) / dense).max()) if float(dense.sum()) else 0.0

    @property
    def skipped(self) -> int:
        """Exchanges of the ring in which nobody of any sequence group needs anything."""
        hops = [hop(self.needed, i) for i in range(1, self.ring)]
        return sum(not bool(one.any()) for one in hops)


def even_split(tokens: int, heads: int, ulysses: int, ring: int, *, density: float = 1.0, union: float = 1.0) -> Split:
    """A split from figures instead of maps: heads alike, rows alike, needs alike.

    Args:
        tokens: N. heads: H, at least ``ulysses``. density: computed share of the pairs.
        union: Share of the key blocks of others that a process needs, measured (`Split.union`). It does not follow from
            the density: rows that choose differently need more together than each alone.

    Raises:
        ValueError: a count below 1, more places than heads, a share outside (0, 1] (``union``: [0, 1]).
    """
    for name, value in (("tokens", tokens), ("ring", ring)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"even_split: {name} must be an integer >= 1, got {value!r}")
    for name, share in (("density", density), ("union", union)):
        if not (0 < share <= 1 or (name == "union" and share == 0)):
            raise ValueError(f"even_split: {name} must be a share of at most 1, got {share!r}")
    groups = heads_in_order(heads, ulysses)
    counts = torch.tensor([len(group) for group in groups], dtype=torch.float64)[:, None, None]
    each = tokens / ring
    pairs = (density * counts * each**2).expand(-1, ring, ring).contiguous()
    needed = (union * counts * each * (1 - torch.eye(ring, dtype=torch.float64))).contiguous()
    return Split(
        heads=groups,
        bounds=(),
        slots=torch.full((ring,), each, dtype=torch.float64),
        pairs=pairs,
        needed=needed,
        naive=_over_mean(pairs.sum(-1)),
    )


def simulate(
    maps: BlockMap | Sequence[BlockMap],
    ulysses: int,
    ring: int,
    *,
    heads: int | None = None,
    equal: bool = True,
    shards: Shards = "tokens",
) -> Split:
    """Who computes and needs what, if these maps run on ``ulysses * ring`` processes.

    Shards are ranges of video key blocks in the order of the layout. Text is on every process: its keys are never
    sent, and its rows, which are full, are computed by every process over its own keys and merged. The head assignment
    is one for all shards, by the loads summed over them; it must be, as keys are exchanged between equal places.

    Args:
        maps: Of one layer, their heads side by side, all with the blockings of one layout. Samples count by their mean.
        ulysses: U, at most H. ring: R, at most the video key blocks.
        heads: H; the heads of the maps are repeated in turn up to it. None: as many as the maps have.
        equal: Counts of heads differ by at most one (`assign_heads`).
        shards: "tokens", or "work": shards of equal work have unequal tokens, and the rest of the model waits instead.

    Raises:
        ValueError: a wrong count or name, more places than heads, fewer blocks than shards; maps of several layouts; a
            ring over blocks that start anywhere (an order found from data).
    """
    return simulate_all(maps, [(ulysses, ring)], heads=heads, equal=equal, shards=shards)[0]


def simulate_all(
    maps: BlockMap | Sequence[BlockMap],
    factors: Sequence[tuple[int, int]],
    *,
    heads: int | None = None,
    equal: bool = True,
    shards: Shards = "tokens",
) -> list[Split]:
    """`simulate` for several ``(U, R)``; the maps are read once for each R.

    Args:
        factors: For example those of `factorisations`. maps, heads, equal, shards: as of `simulate`.

    Raises:
        ValueError: as of `simulate`.
    """
    maps = [maps] if isinstance(maps, BlockMap) else list(maps)
    if shards not in ("tokens", "work"):
        raise ValueError(f"simulate: shards must be 'tokens' or 'work', got {shards!r}")
    found = {ring: _by_head(maps, ring, shards) for ring in sorted({ring for _, ring in factors})}
    return [_split(found[ring], ulysses, heads, equal) for ulysses, ring in factors]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class _ByHead:
    """Of one R: ``pairs``, ``needed`` and, with shards of equal tokens, ``naive``, each ``[H, R, R]``."""

    bounds: tuple[int, ...]
    slots: Tensor
    pairs: Tensor
    needed: Tensor
    naive: Tensor


def _by_head(maps: Sequence[BlockMap], ring: int, shards: Shards) -> _ByHead:
    columns = _columns(maps, ring)
    even = bounds = _bounds(columns, columns.size, ring)
    if shards == "work":
        work = torch.zeros(columns.q_size.shape[0], dtype=torch.float64)
        for keep in (one.to_mask() for one in maps):
            work += ((keep.double() @ columns.size) * columns.q_size).sum((0, 1)) / keep.shape[0]
        by_column = torch.zeros_like(columns.size).index_add(0, columns.of_row, torch.where(columns.q_text, 0, work))
        bounds = _bounds(columns, by_column, ring)
    pairs, needed = _of_heads(maps, columns, bounds)
    sums = torch.nn.functional.pad(torch.where(columns.text, 0, columns.size).cumsum(0), (1, 0))
    return _ByHead(
        bounds=bounds,
        slots=sums[list(bounds)].diff(),
        pairs=pairs,
        needed=needed,
        naive=pairs if bounds == even else _of_heads(maps, columns, even)[0],
    )


def _split(found: _ByHead, ulysses: int, heads: int | None, equal: bool) -> Split:
    have = found.pairs.shape[0]
    turn = torch.arange(have if heads is None else heads) % have
    pairs = found.pairs[turn]
    groups = assign_heads(pairs.sum((1, 2)).tolist(), ulysses, equal=equal)
    naive = _grouped(found.naive[turn], heads_in_order(len(turn), ulysses))
    return Split(
        heads=groups,
        bounds=found.bounds,
        slots=found.slots,
        pairs=_grouped(pairs, groups),
        needed=_grouped(found.needed[turn], groups),
        naive=_over_mean(naive.sum(-1)),
    )


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class _Columns:
    """Sizes of the blocks of all maps: slots, or tokens where blocks start anywhere; ``of_row``: column of each row."""

    size: Tensor
    text: Tensor
    q_size: Tensor
    q_text: Tensor
    of_row: Tensor
    granularity: int


def _columns(maps: Sequence[BlockMap], ring: int) -> _Columns:
    if not maps:
        raise ValueError("simulate: maps must hold at least one BlockMap, got none")
    first = maps[0]
    for one in maps:
        for name, a, b in (("q", first.q, one.q), ("k", first.k, one.k)):
            if (a.blocks, a.block, a.start is None) != (b.blocks, b.block, b.start is None):
                raise ValueError(
                    f"simulate: maps must share one layout, got {name} of {a.blocks} and of {b.blocks} blocks"
                )
    if ring > 1 and (first.q.start is not None or first.k.start is not None):
        raise ValueError(f"simulate: ring must be 1 where blocks start anywhere (an order found from data), got {ring}")
    rows, row_block, block = first.q.blocks, first.q.block, first.k.block
    if ring > 1 and (rows * row_block != first.k.blocks * block or max(row_block, block) % min(row_block, block)):
        raise ValueError(
            f"simulate: rows must stand over the same slots as columns, got {rows} of {row_block} and "
            f"{first.k.blocks} of {block}"
        )
    per_tile = 1 if first.k.layout is None else first.k.layout.blocks_per_tile
    of_row = (torch.arange(rows) * row_block // block).clamp_max(first.k.blocks - 1)
    return _Columns(
        size=_sizes(first.k),
        text=_text(first.k),
        q_size=_sizes(first.q),
        q_text=_text(first.q),
        of_row=of_row,
        granularity=math.lcm(max(1, row_block // block), per_tile),
    )


def _sizes(side: Blocking) -> Tensor:
    """``[K]`` float64: slots of blocks that hold tokens; tokens, by their mean, where blocks start anywhere."""
    length = side.length.double()
    counted = length if side.start is not None else (length > 0).double() * side.block
    return counted.mean((0, 1))


def _text(side: Blocking) -> Tensor:
    if side.layout is None or side.text is None:
        return torch.zeros(side.blocks, dtype=torch.bool)
    per_block = side.text
    return per_block.repeat_interleave(side.blocks // len(per_block)) if len(per_block) != side.blocks else per_block


def _bounds(columns: _Columns, weights: Tensor, ring: int) -> tuple[int, ...]:
    video = (~columns.text).nonzero().flatten()
    first, count = int(video[0]), len(video)
    if isinstance(ring, bool) or not isinstance(ring, int) or not 1 <= ring <= -(-count // columns.granularity):
        raise ValueError(
            f"simulate: ring must be an integer from 1 to the {count} video blocks in units of {columns.granularity}, "
            f"got {ring!r}"
        )
    cut = split_blocks(weights[first : first + count].tolist(), ring, granularity=columns.granularity)
    return tuple(first + bound for bound in cut)


def _of_heads(maps: Sequence[BlockMap], columns: _Columns, bounds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``[H, R, R]`` each: pairs and needed slots of every head, by the shard of the rows and of the keys."""
    ring = len(bounds) - 1
    shard = torch.bucketize(torch.arange(len(columns.size)), torch.tensor(bounds[1:-1]), right=True)
    owned = torch.zeros(len(columns.size), ring, dtype=torch.float64)
    owned[torch.arange(len(shard)), shard] = torch.where(columns.text, 0, columns.size)
    text = torch.where(columns.text, columns.size, 0)
    row_shard, here = shard[columns.of_row], torch.arange(ring)
    pairs, needed = [], []
    for one in maps:
        keep = one.to_mask()
        found = torch.zeros(keep.shape[1], ring, ring, dtype=torch.float64)
        wanted = torch.zeros_like(found)
        for rows in range(ring):
            mine = (row_shard == rows) & ~columns.q_text
            kept = keep[:, :, mine]
            by_column = torch.einsum("bhqk,q->hk", kept.double(), columns.q_size[mine]) / keep.shape[0]
            found[:, rows] = by_column @ owned
            found[:, rows, rows] += by_column @ text
            wanted[:, rows] = kept.any(2).double().mean(0) @ owned
        if bool(columns.q_text.any()):
            of_text = torch.einsum("bhqk,q->hk", keep[:, :, columns.q_text].double(), columns.q_size[columns.q_text])
            found[:, here, here] += (of_text @ owned + (of_text @ text)[:, None] / ring) / keep.shape[0]
        wanted[:, here, here] = 0
        pairs.append(found)
        needed.append(wanted)
    return torch.cat(pairs), torch.cat(needed)


def _grouped(x: Tensor, groups: Assignment) -> Tensor:
    """``[H, R, R]`` -> ``[U, R, R]``: summed over the heads of each place."""
    return torch.stack([x[list(group)].sum(0) for group in groups])


def hop(x: Tensor, i: int) -> Tensor:
    """``[U, R]`` of ``[U, R, R]``: what process s has of shard ``(s + i) % R``."""
    here = torch.arange(x.shape[1])
    return x[:, here, (here + i) % x.shape[1]]


def _over_mean(x: Tensor) -> float:
    total = float(x.sum())
    return float(x.max()) * x.numel() / total if total else 1.0
