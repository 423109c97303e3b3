"""Call: what one forward of a root knows, handed to every site."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Blocking, Layout
from vsparse.parallel.collectives import total
from vsparse.parallel.share import ALL, Share

__all__ = ["Call", "check_hidden"]


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """What one forward of a root knows; a new object per forward, restored for its backward.

    Args:
        layout: Order and blocking of this site. blocking: the layout bound to the text lengths.
        text_length: ``[B]`` int, or None when the host has no padded text.
        step: 0-d int64, denoising step, -1 when unknown. density: 0-d float64, the budget of this call, or ``[h]`` with
            one for each head that `core` sees.
        trim: A tensor whose size is the number of tokens up to the longest valid text, or None when there is no text
            to trim: a size, not a Python int, so that prompts of different length share one graph.
        static: The method's static map, bound to the text lengths, of all rows; None when it has none.
        share: What this process has of the video, of which `core` sees the heads and `combine` the tokens.
        features: What `SparseAttention.features` has made of the attention input, of all tokens and own heads.
    """

    layout: Layout
    blocking: Blocking
    text_length: Tensor | None
    step: Tensor
    density: Tensor
    trim: Tensor | None = None
    static: BlockMap | None = None
    share: Share = ALL
    features: tuple[Tensor, ...] = ()
    shard_rows: Blocking | None = None

    def budget(self, blocks: int) -> Tensor:
        """How many of some blocks a row keeps: int32, to be broadcast against ``[B, h, Q]``."""
        count = select.budget(self.density, blocks)
        return count.unsqueeze(-1) if count.ndim else count

    @property
    def rows(self) -> Blocking:
        """The blocks of the queries that `core` sees: all of them, unless processes share the tokens.

        Keys are chosen from all blocks, `blocking`; q, k and v are packed and unpacked by this one.
        """
        return self.blocking if self.shard_rows is None else self.shard_rows

    @property
    def video(self) -> slice:
        """Where the video stands among the tokens that `core` sees."""
        rows = self.rows.layout
        assert rows is not None
        return slice(self.grid.text_before, rows.tokens - self.grid.text_after)

    @property
    def own_static(self) -> BlockMap | None:
        """`static` for the rows that `core` sees."""
        return None if self.static is None else self.own_rows(self.static, self.rows)

    def own_rows(self, blocks: BlockMap, rows: Blocking) -> BlockMap:
        """Of a map of all rows those that `core` sees, whose blocking ``rows`` is."""
        shard = self.share.shard
        return blocks if shard is None else shard.own_rows(blocks, rows)

    def all_blocks(self, x: Tensor, dim: int = 1) -> Tensor:
        """What was found for each block, or tile, of the rows that `core` sees, for all of the sequence."""
        shard = self.share.shard
        return x if shard is None else shard.all_blocks(x, dim)

    def all_slots(self, x: Tensor) -> Tensor:
        """Packed ``[B, S, H, D]`` of the rows that `core` sees, of all of the sequence."""
        shard = self.share.shard
        return x if shard is None else shard.all_slots(x)

    def all_sum(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over all slots, ``[B, 1, H, D]``, of what is packed for the rows that `core` sees."""
        shard = self.share.shard
        return x.sum(1, keepdim=True, dtype=dtype) if shard is None else shard.sum_slots(x, dtype)

    def over_shards(self, x: Tensor, *, once: bool = False) -> Tensor:
        """The sum of what processes that share the tokens have found for theirs.

        Args:
            once: All go on with it in the same way, to a loss that counts once.
        """
        shard = self.share.shard
        return x if shard is None else total(shard.group, x, what="sums", adjoint="once" if once else "each")

    def slots_anywhere(self, x: Tensor, slots: Tensor) -> Tensor:
        """Some slots of the sequence, those of the video, on every process.

        Args:
            x: ``[B, S, H, D]`` packed for the rows that `core` sees. slots: ``[R]`` int64, of `blocking`.
        """
        shard = self.share.shard
        return x.index_select(1, slots) if shard is None else shard.slots_anywhere(x, slots)

    def tokens_anywhere(self, x: Tensor, token: Tensor) -> Tensor:
        """Some tokens of the video, on every process.

        Args:
            x: ``[B, n, H, D]``, the video tokens that `core` sees. token: ``[R]`` int64, in host order.
        """
        shard = self.share.shard
        if shard is None:
            return x.index_select(1, token)
        slots = shard.layout.token_slot[0, 0, self.grid.text_before + token]
        padded = F.pad(x, (0, 0, 0, 0, self.grid.text_before, self.grid.text_after))
        return shard.slots_anywhere(self.rows.pack(padded), slots)

    def attend_anywhere(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap) -> Tensor:
        """Attention of queries that every process has, to all keys.

        Args:
            q: ``[B, R, H, D]``. k, v: packed for the rows that `core` sees. blocks: from q to `blocking`.
        """
        shard = self.share.shard
        found = ops.block_sparse_attention(q, k, v, blocks) if shard is None else shard.attend_anywhere(q, k, v, blocks)
        return found[0]

    def own_video(self, x: Tensor, dim: int = 1) -> Tensor:
        """Of the tokens that `core` sees, with or without text, those of the video that `combine` sees."""
        found = x.narrow(dim, self.video.start, self.video.stop - self.video.start) if self.grid.text else x
        return self.share.of_shard(found, dim)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *maps: BlockMap,
        packed: Sequence[Tensor],
        skip_threshold: float | None = None,
    ) -> Tensor:
        """`ops.host_order_attention` of the tokens that `core` sees, to keys of other processes as well.

        Args:
            q, k, v: ``[B, n, H, D]`` in the order in which `core` has them. maps: from `rows` to `blocking`.
            packed: The same in slots, as `rows` packs them.
            skip_threshold: As of `ops.block_sparse_attention`.
        """
        shard = self.share.shard
        if shard is None:
            return ops.host_order_attention(q, k, v, *maps, packed=packed, skip_threshold=skip_threshold)
        if len(maps) > 1 or skip_threshold is not None:
            raise NotImplementedError("context parallel: tokens cannot be shared with several maps or a skip_threshold")
        # With gradients the packing is part of the graph.
        slots = [self.rows.pack(x) for x in (q, k, v)] if torch.is_grad_enabled() else packed
        return self.rows.unpack(shard.attend(slots[0], slots[1], slots[2], maps[0])[0])

    @property
    def grid(self) -> Grid:
        """The lattice. One home for it: two references that are sometimes the same object cost a recompilation."""
        return self.layout.grid

    def keys(self, batch: int) -> tuple[int, Tensor | None]:
        """What full attention needs as keys, padded text left out.

        Args:
            batch: B; a single sample needs no mask, which is faster.

        Returns:
            How many tokens, n, from the first; and which of them are valid, ``[B, 1, 1, n]`` bool, None: all.
        """
        if self.trim is None or self.text_length is None:
            return self.grid.tokens, None
        size = self.trim.shape[0]
        if batch == 1:
            return size, None
        last = self.grid.video + self.text_length
        return size, (torch.arange(size, device=last.device) < last[:, None])[:, None, None]


def check_hidden(key: str, hidden: Tensor, call: Call) -> None:
    """Refuse an attention input that is not that of the video tokens which this process holds."""
    expected = call.grid.video if call.share.cut is None else call.share.cut.video
    if hidden.shape[1] != expected:
        raise ValueError(
            f"{key}: the attention input has {hidden.shape[1]} tokens, {call.grid} has {expected} of video"
        )
