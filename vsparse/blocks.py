"""BlockMap: which key blocks every query block attends to. The only value that passes from policy to kernel."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from vsparse.layouts import Blocking

__all__ = ["BlockMap", "Transposed", "lists", "pack_bits", "unpack_bits"]


def lists(keep: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """``keep [..., K]`` bool -> the first ``capacity`` kept places of each row, ascending, and how many are kept."""
    rank = keep.cumsum(-1) - 1
    place = torch.where(keep, rank, capacity).clamp_max(capacity)
    index = torch.zeros(*keep.shape[:-1], capacity + 1, dtype=torch.int32, device=keep.device)
    block = torch.arange(keep.shape[-1], device=keep.device, dtype=torch.int32).expand_as(keep)
    return index.scatter(-1, place, block)[..., :capacity].contiguous(), keep.sum(-1, dtype=torch.int32)


def pack_bits(keep: Tensor) -> Tensor:
    """``[..., K]`` bool -> ``[..., ceil(K / 8)]`` uint8; bit ``j % 8`` of byte ``j // 8`` is entry j."""
    keep = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % 8))
    weight = torch.arange(8, device=keep.device, dtype=torch.int32).exp2().to(torch.uint8)
    bits: Tensor = keep.unflatten(-1, (keep.shape[-1] // 8, 8)) * weight
    return bits.sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, entries: int) -> Tensor:
    """Inverse of `pack_bits` for ``K = entries``."""
    shift = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] >> shift) & 1).flatten(-2)[..., :entries].bool()


@dc.dataclass(frozen=True, eq=False)
class Transposed:
    """Key-major lists in CSR form, and the rows that need none.

    The query blocks that list key block j are ``row[..., offset[j]:offset[j+1]]``; those that keep every key block
    stand in ``full`` alone.

    Args:
        offset: ``[B|1, H|1, K + 1]`` int32.
        row: ``[B|1, H|1, Q * M]`` int32, ascending within a key block; entries past ``offset[K]`` are Q.
        full: ``[B|1, H|1, Q]`` int32, ascending; entries past ``full_count`` are Q.
        full_count: ``[B|1, H|1]`` int32.
    """

    offset: Tensor
    row: Tensor
    full: Tensor
    full_count: Tensor


@dc.dataclass(frozen=True, eq=False)
class BlockMap:
    """The kept key blocks of every query block.

    Args:
        index: ``[B|1, H|1, Q, M]`` int32; the first ``count`` entries of a row are kept key blocks, ascending and
            free of duplicates. Entries past ``count`` are never read.
        count: ``[B|1, H|1, Q]`` int32. A row with ``count == K`` is full and needs no list; 0 is an empty row, whose
            output is 0 and whose LSE is -inf.
        q, k: Blockings of the query and the key sequence.
        key_bias: ``[B|1, H|1, K]`` float, added to the natural-log logits of every key of a block; not differentiated.
    """

    index: Tensor
    count: Tensor
    q: Blocking
    k: Blocking
    key_bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.ndim != 4 or self.index.dtype != torch.int32:
            raise ValueError(f"index must be int32 [B|1, H|1, Q, M], got {self.index.dtype} {tuple(self.index.shape)}")
        if self.count.dtype != torch.int32 or self.count.shape != self.index.shape[:3]:
            raise ValueError(
                f"count must be int32 {tuple(self.index.shape[:3])}, got {self.count.dtype} {tuple(self.count.shape)}"
            )
        if self.index.shape[2] != self.q.blocks:
            raise ValueError(f"index has {self.index.shape[2]} rows, but the query blocking has {self.q.blocks} blocks")
        if self.key_bias is not None and self.key_bias.shape[-1] != self.k.blocks:
            raise ValueError(f"key_bias must be [B|1, H|1, K={self.k.blocks}], got {tuple(self.key_bias.shape)}")

    @property
    def capacity(self) -> int:
        """M: list entries per row."""
        return self.index.shape[-1]

    @classmethod
    def from_mask(
        cls, keep: Tensor, q: Blocking, k: Blocking | None = None, *, capacity: int | None = None
    ) -> BlockMap:
        """Lists from a dense mask.

        Args:
            keep: ``[B|1, H|1, Q, K]`` bool.
            q: Blocking of the queries. k: blocking of the keys; None: the same as ``q``.
            capacity: M. The caller vouches that no row other than a full one keeps more; None: K.
        """
        k = q if k is None else k
        if keep.ndim != 4 or keep.dtype != torch.bool or keep.shape[2:] != (q.blocks, k.blocks):
            raise ValueError(
                f"keep must be bool [B|1, H|1, Q={q.blocks}, K={k.blocks}], got {keep.dtype} {tuple(keep.shape)}"
            )
        return cls(*lists(keep, k.blocks if capacity is None else min(capacity, k.blocks)), q, k)

    @classmethod
    def full(cls, q: Blocking, k: Blocking | None = None) -> BlockMap:
        """Every query block attends to every key block; no lists (M = 0)."""
        k = q if k is None else k
        count = torch.full((1, 1, q.blocks), k.blocks, dtype=torch.int32, device=q.length.device)
        return cls(count.new_zeros(1, 1, q.blocks, 0), count, q, k)

    @classmethod
    def from_bits(
        cls, bits: Tensor, q: Blocking, k: Blocking | None = None, *, capacity: int | None = None
    ) -> BlockMap:
        """Inverse of `to_bits`: ``[B|1, H|1, Q, ceil(K / 8)]`` uint8."""
        k = q if k is None else k
        return cls.from_mask(unpack_bits(bits, k.blocks), q, k, capacity=capacity)

    def widened(self, capacity: int) -> BlockMap:
        """The same map with room for ``capacity`` entries in each row; itself when it has as many or more."""
        more = capacity - self.capacity
        return self if more <= 0 else dc.replace(self, index=torch.nn.functional.pad(self.index, (0, more)))

    def used(self) -> Tensor:
        """``[B|1, H|1, Q, M]`` bool: entries that hold a block; none of a full row, whose list may hold anything."""
        counted = torch.arange(self.capacity, device=self.count.device) < self.count[..., None]
        return counted & (self.count < self.k.blocks)[..., None]

    def kept(self) -> Tensor:
        """``[B|1, H|1, K]`` bool: key blocks that some row keeps."""
        blocks = self.k.blocks
        found = torch.zeros(*self.count.shape[:2], blocks + 1, dtype=torch.bool, device=self.count.device)
        listed = torch.where(self.used(), self.index, blocks).flatten(-2).long()
        return found.scatter(-1, listed, True)[..., :blocks] | (self.count == blocks).any(-1, keepdim=True)

    def to_mask(self) -> Tensor:
        """``[B|1, H|1, Q, K]`` bool, the dense form."""
        blocks = self.k.blocks
        keep = torch.zeros(*self.count.shape, blocks + 1, dtype=torch.bool, device=self.count.device)
        keep = keep.scatter(-1, torch.where(self.used(), self.index, blocks).long(), True)[..., :blocks]
        return keep | (self.count == blocks)[..., None]

    def to_bits(self) -> Tensor:
        """``[B|1, H|1, Q, ceil(K / 8)]`` uint8, one bit per block pair."""
        return pack_bits(self.to_mask())

    def transpose(self) -> Transposed:
        """Key-major lists, deterministic, without a device sync."""
        queries, keys = self.count.shape[-1], self.k.blocks
        full = self.count == keys
        by_key, entry = torch.where(self.used(), self.index, keys).flatten(-2).sort(dim=-1, stable=True)
        row = torch.where(by_key < keys, entry // max(1, self.capacity), queries)
        key = torch.arange(keys + 1, device=self.count.device, dtype=by_key.dtype)
        offset = torch.searchsorted(by_key, key.expand(*by_key.shape[:2], -1).contiguous(), out_int32=True)
        full_count = full.sum(-1, dtype=torch.int32)
        rest, first = (~full).to(torch.uint8).sort(dim=-1, stable=True)
        return Transposed(offset, row.int(), torch.where(rest == 0, first, queries).int(), full_count)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Computed and possible query-key token pairs, each ``[B|1, H|1]`` float64; padding counts for nothing."""
        q, k = self.q.length.double(), self.k.length.double()
        blocks = self.k.blocks
        used = self.used()
        lengths = k[:, :, None].expand(-1, -1, self.q.blocks, -1)
        shape = torch.broadcast_shapes(self.index.shape[:3], lengths.shape[:3])
        index = torch.where(used, self.index, 0).expand(*shape, self.capacity).long()
        listed = lengths.expand(*shape, blocks).gather(-1, index)
        kept = torch.where(self.count == blocks, lengths.sum(-1), torch.where(used, listed, 0).sum(-1))
        return (q * kept).sum(-1), q.sum(-1) * k.sum(-1)

    def density(self) -> Tensor:
        """Executed density, ``[B|1, H|1]`` float64: computed token pairs / all valid token pairs."""
        computed, possible = self.pairs()
        return computed / possible

    def union(self, other: BlockMap) -> BlockMap:
        """Block pairs that either map keeps. Both must have the same blockings."""
        if (self.q.blocks, self.k.blocks) != (other.q.blocks, other.k.blocks):
            raise ValueError(
                f"union: maps of {self.q.blocks}x{self.k.blocks} and {other.q.blocks}x{other.k.blocks} blocks"
            )
        if self.key_bias is not None or other.key_bias is not None:
            raise NotImplementedError("union of maps with key_bias: the bias of a shared block would be ambiguous")
        return BlockMap.from_mask(self.to_mask() | other.to_mask(), self.q, self.k)

    def validate(self) -> BlockMap:
        """Deep check of the lists; reads them on the host, so call it in tests and tools, never in a loop.

        Raises:
            ValueError: a count out of range, a list that is not ascending or holds an index out of range, a length
                that exceeds its block.
        """
        count, blocks = self.count, self.k.blocks
        _refuse(
            (count < 0) | ((count > self.capacity) & (count != blocks)),
            count,
            f"count must lie in [0, M={self.capacity}] or equal K={blocks}",
        )
        used = self.used()
        outside = used & ((self.index < 0) | (self.index >= blocks))
        _refuse(outside, self.index, f"index must hold key blocks in [0, K={blocks})")
        falling = torch.zeros_like(used)
        falling[..., 1:] = used[..., 1:] & (self.index[..., 1:] <= self.index[..., :-1])
        _refuse(falling, self.index, "index must be ascending and free of duplicates within a row")
        for name, side in (("q", self.q), ("k", self.k)):
            wrong = (side.length < 0) | (side.length > side.block)
            _refuse(wrong, side.length, f"{name}.length must lie in [0, block={side.block}]")
        return self


def _refuse(wrong: Tensor, value: Tensor, words: str) -> None:
    """Raise if any entry is wrong, with the place and the value of the first."""
    if bool(wrong.any()):
        place = [int(i) for i in wrong.nonzero()[0]]
        axes = ("sample", "head", "block", "entry")
        where = ", ".join(f"{axis} {i}" for axis, i in zip(axes, place, strict=False))
        raise ValueError(f"{words}, got {int(value[tuple(place)])} at {where} ({int(wrong.sum())} in all)")
