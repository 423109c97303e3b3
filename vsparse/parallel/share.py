"""What one process has of a video: some of its tokens between attentions, some of its heads inside them."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vsparse.geometry import Grid
from vsparse.parallel.balance import Assignment
from vsparse.parallel.collectives import all_to_all, gather, total
from vsparse.parallel.context import Groups
from vsparse.parallel.shard import Shard

__all__ = ["ALL", "Cut", "Share", "even"]


def even(amount: int, parts: int) -> tuple[int, ...]:
    """As equal as can be, the first ones larger."""
    return tuple(amount // parts + (i < amount % parts) for i in range(parts))


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Cut:
    """Which tokens of the video each process holds between attentions. Text is held by all.

    Args:
        groups: The processes. grid: of the whole video.
        sizes: Tokens of each process, in the order of the context group: those that share heads are neighbours.
        order: ``[video]`` int64, the tokens by their holder, counted from the first of the video; None: in host order.
    """

    groups: Groups
    grid: Grid
    sizes: tuple[int, ...]
    order: Tensor | None = None

    @property
    def first(self) -> int:
        """Where the tokens of this process begin in the order."""
        return sum(self.sizes[: self.groups.all.rank])

    @property
    def video(self) -> int:
        """Tokens of the video that this process holds."""
        return self.sizes[self.groups.all.rank]

    @property
    def shards(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each process, by the processes that share them."""
        each = self.groups.heads.size
        return tuple(self.sizes[i : i + each] for i in range(0, len(self.sizes), each))

    def take(self, x: Tensor, dim: int) -> Tensor:
        """The part of this process along a dimension that holds the tokens of the video, with or without the text.

        Anything else, a part that is already cut among it, comes back as it is.
        """
        dim %= x.ndim
        size = x.shape[dim]
        if size not in (self.grid.video, self.grid.tokens) or self.groups.alone:
            return x
        before = self.grid.text_before if size != self.grid.video else 0
        after = size - before - self.grid.video
        mine = x.narrow(dim, before + self.first, self.video)
        if self.order is not None:
            mine = x.narrow(dim, before, self.grid.video).index_select(dim, self.order[self.first :][: self.video])
        if not before and not after:
            # A copy even of one sample, whose part is contiguous as a view: it would keep the whole tensor, and its
            # strides, unlike those of every later layer, would cost a compiled block another graph.
            return mine.clone(memory_format=torch.contiguous_format)
        return torch.cat((x.narrow(dim, 0, before), mine, x.narrow(dim, size - after, after)), dim)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """The tokens of all processes along a dimension, in host order; on which all go on to one loss."""
        if self.groups.alone:
            return x
        if x.shape[dim] != self.video:
            raise ValueError(
                f"context parallel: this process holds {self.video} tokens of {self.grid}, and its output has "
                f"{x.shape[dim]}"
            )
        if self.groups.scale != 1.0:
            x = _Scaled.apply(x, self.groups.scale)  # type: ignore[no-untyped-call]
        found = gather(self.groups.all, x, self.sizes, dim=dim, what="output", adjoint="once")
        return found if self.order is None else found.index_select(dim, self.order.argsort())


class _Scaled(torch.autograd.Function):
    """A tensor whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None  # type: ignore[attr-defined]


class Share:
    """The part of one attention that one process computes.

    Args:
        cut: Who holds which tokens. heads: that each process of the head group computes, ascending.
        shard: The rows of this process where others compute other rows; None: it has all of them.
    """

    def __init__(self, cut: Cut | None = None, heads: Assignment = (), shard: Shard | None = None) -> None:
        self.cut, self.heads, self.shard = cut, heads, shard
        self.alone = cut is None or cut.groups.alone
        if cut is not None and not self.alone:
            self._group = cut.groups.heads
            self._sizes = cut.shards[cut.groups.rows.rank]
            flat = [head for part in heads for head in part]
            device = None if cut.order is None else cut.order.device
            self._back = None if flat == sorted(flat) else torch.tensor(flat, device=device).argsort()

    @property
    def mine(self) -> tuple[int, ...]:
        """Heads of this process."""
        return self.heads[self._group.rank]

    def tokens(self, grid: Grid) -> int:
        """Tokens that this process holds between attentions, the text among them."""
        return grid.tokens if self.cut is None else self.cut.video + grid.text

    def heads_of(self, heads: int) -> int:
        """How many of all heads this process computes."""
        return heads if self.alone else len(self.mine)

    # ---- between tokens and heads -----------------------------------------------------------------------------------

    def exchange(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Own tokens of all heads -> all tokens of the shard, of own heads, in one message to each process.

        Args:
            tensors: ``[B, n, H, any]``: q, k, v and what else is chosen by. n: the tokens of this process, with or
                without the text around them.
        """
        if self.alone or self._group.size == 1:
            return tensors
        grid, me = self._grid, self._group.rank
        parts = [self._apart(x, self._sizes[me]) for x in tensors]
        sent = [self._of(video, heads) for heads in self.heads for _, video, _ in parts]
        shapes = [(x.shape[0], size, len(self.mine), x.shape[3]) for size in self._sizes for x in tensors]
        came = all_to_all(self._group, sent, shapes, what="heads")
        found = []
        for i, (before, _, after) in enumerate(parts):
            pieces = [came[j * len(tensors) + i] for j in range(self._group.size)]
            if before is not None and after is not None and grid.text:
                pieces = [self._of(before, self.mine), *pieces, self._of(after, self.mine)]
            found.append(torch.cat(pieces, 1))
        return tuple(found)

    def restore(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The way back: all tokens of the shard, of own heads -> own tokens of all heads; text of all heads."""
        if self.alone or self._group.size == 1:
            return tensors
        shard = sum(self._sizes)
        parts = [self._apart(x, shard) for x in tensors]
        sent = []
        for first, size in zip(accumulate(self._sizes, initial=0), self._sizes, strict=False):
            for before, video, after in parts:
                piece = video.narrow(1, first, size)
                sent.append(piece if before is None or after is None else torch.cat((before, piece, after), 1))
        mine = self._sizes[self._group.rank]
        shapes = [
            (x.shape[0], mine + x.shape[1] - shard, len(heads), x.shape[3]) for heads in self.heads for x in tensors
        ]
        came = all_to_all(self._group, sent, shapes, what="heads")
        return tuple(self._ascending(came[i :: len(tensors)], 2) for i in range(len(tensors)))

    def all_heads(self, x: Tensor, dim: int) -> Tensor:
        """What each process has of its heads, of all heads, everywhere."""
        if self.alone or self._group.size == 1:
            return x
        found = gather(self._group, x, [len(part) for part in self.heads], dim=dim, what="heads of all")
        return found if self._back is None else found.index_select(dim, self._back.to(x.device))

    def own_heads(self, x: Tensor, dim: int) -> Tensor:
        """Of what is known of all heads, that of the heads of this process."""
        if self.alone or self._group.size == 1:
            return x
        return _select(x, self.mine, dim)

    def loss(self, part: Tensor) -> Tensor:
        """The sum of the parts of a loss that processes have for their heads; a part's gradient stays with its process.

        Processes that share tokens must have the same parts.
        """
        if self.cut is None:
            return part
        groups = self.cut.groups
        if groups.scale != 1.0:
            part = _Scaled.apply(part, groups.scale)  # type: ignore[no-untyped-call]
        return total(groups.heads, part, what="loss", adjoint="once")

    def of_shard(self, x: Tensor, dim: int) -> Tensor:
        """Of the video tokens of the shard, those of this process."""
        if self.alone or self._group.size == 1:
            return x
        me = self._group.rank
        return x.narrow(dim, sum(self._sizes[:me]), self._sizes[me])

    # ---- parts of tensors -------------------------------------------------------------------------------------------

    @property
    def _grid(self) -> Grid:
        assert self.cut is not None
        return self.cut.grid

    def _apart(self, x: Tensor, video: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Text before, video, text after; without text where the tensor has none."""
        if x.shape[1] == video:
            return None, x, None
        grid = self._grid
        if x.shape[1] != video + grid.text:
            raise ValueError(
                f"context parallel: {x.shape[1]} tokens, expected {video}, or {video + grid.text} with the text"
            )
        first, second = grid.text_before, grid.text_before + video
        return x[:, :first], x[:, first:second], x[:, second:]

    @staticmethod
    def _of(x: Tensor, heads: Sequence[int]) -> Tensor:
        return _select(x, heads, 2)

    def _ascending(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        found = torch.cat(list(parts), dim)
        return found if self._back is None else found.index_select(dim, self._back.to(found.device))


def _select(x: Tensor, places: Sequence[int], dim: int) -> Tensor:
    if not places:
        return x.narrow(dim, 0, 0)
    if places[-1] - places[0] == len(places) - 1:
        return x.narrow(dim, places[0], len(places))
    return x.index_select(dim, torch.tensor(places, device=x.device))


ALL = Share()
"""Of a process that has everything."""
