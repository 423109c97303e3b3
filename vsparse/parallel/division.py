"""How the forwards of one model are divided: who holds which tokens at which size, and who computes which heads."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vsparse.geometry import Grid
from vsparse.layouts import Layout
from vsparse.parallel.balance import HeadBalance
from vsparse.parallel.collectives import ALONE, gather, total
from vsparse.parallel.context import ContextParallel, Groups, agree, open_groups
from vsparse.parallel.shard import Shard, cannot_shard, order_of, shard_of
from vsparse.parallel.share import ALL, Cut, Share, even

__all__ = ["Division"]

LOOK_EVERY = 4
"""Least forwards between two looks at what the heads have to do: each reads from the device."""
SIZES = 8
"""Sizes of videos whose division is kept."""


class Division:
    """The division of one root.

    Args:
        setting: How many processes, in which roles. groups: of this process.
    """

    def __init__(self, setting: ContextParallel, groups: Groups) -> None:
        self.setting, self.groups = setting, groups
        self._followed: object | None = None
        self.cut: Cut | None = None
        self.shard: Shard | None = None
        self._cuts: dict[tuple[object, ...], tuple[Cut, Shard | None]] = {}
        self._shares: dict[tuple[object, ...], Share] = {}
        self._balance: dict[int, HeadBalance] = {}
        self._loads: dict[int, Tensor] = {}
        self._unseen = 0

    @property
    def alone(self) -> bool:
        """Whether this process has everything."""
        return self.groups.alone

    def follow(self, other: ContextParallel | None, heads: int, device: torch.device) -> None:
        """Take over a division that the host makes by itself, or its end: it cuts tokens evenly, in its own order.

        Heads are shared between all of its processes, whatever roles the host gives them: its tokens are not cut where
        blocks end.

        Args:
            other: Of the host, with its mesh; None: it makes none. heads: of the model. device: of its tensors.

        Raises:
            ValueError: a division of our own as well, or more processes than heads.
        """
        if other is None and self._followed is None:
            return
        if other is None:
            self.setting, self.groups, self._followed = ContextParallel(), Groups(), None
            self._forget()
            return
        if self._followed is other.mesh:
            return
        if self._followed is None and not self.alone:
            raise ValueError(
                "context parallel: this model has a division of diffusers (enable_parallelism) and one of vsparse "
                f"(parallel={self.setting}); use one of them"
            )
        if other.size > heads:
            raise ValueError(
                f"context parallel: {other} of diffusers has {other.size} processes for {heads} heads, and it does not "
                "cut tokens where blocks end, so that only heads can be shared; use at most as many, or leave it out "
                "and share tokens by vsparse.apply(..., parallel=ContextParallel(ulysses=..., ring=...))"
            )
        if other.ring > 1:
            warnings.warn(
                f"vsparse: heads are shared between all {other.size} processes of diffusers' {other}: its ring does "
                "not cut tokens where blocks end",
                stacklevel=2,
            )
        groups = open_groups(other, device)
        self.groups = dc.replace(groups, heads=groups.all, rows=ALONE)
        self.setting, self._followed = other, other.mesh
        self._forget()

    def _forget(self) -> None:
        self.cut = self.shard = None
        for known in (self._cuts, self._shares, self._balance, self._loads):
            known.clear()

    def begin(
        self, grid: Grid, batch: int, device: torch.device, layouts: Sequence[Layout], *, movable: bool = False
    ) -> None:
        """Divide a forward; all processes of the video must come with the same size.

        Args:
            layouts: Of all sites, on the device.
            movable: Whether heads may go to other processes: no site keeps anything of its heads between calls.

        Raises:
            ValueError: another size or batch on another process, or a video too small to divide.
            NotImplementedError: tokens cannot be shared in the order of these layouts.
        """
        if self.alone:
            return
        agree(self.groups.all, "a forward", {"grid": grid, "batch": batch})
        key = (grid, batch, device)
        if key not in self._cuts:
            if len(self._cuts) >= SIZES:
                self._cuts.clear()
                self._shares.clear()
            self._cuts[key] = self._divide(grid, layouts)
        self.cut, self.shard = self._cuts[key]
        self._unseen += 1
        if movable and self._loads and self._unseen >= LOOK_EVERY:
            self._rebalance()
            self._unseen = 0

    def observe(self, layer: int, loads: Tensor) -> None:
        """Hear what the heads of this process computed in a layer, ``[h]``; read from the device now and then only."""
        if self.groups.heads.size > 1 and self.setting.balance is not None:
            self._loads[layer] = loads

    def _rebalance(self) -> None:
        """Give heads to other processes where the slowest has too much to do; all processes come to the same."""
        layers = sorted(self._loads)
        # One assignment holds for all that share tokens: keys travel between equal places.
        mine = total(self.groups.rows, torch.cat([self._loads[layer] for layer in layers]), what="loads")
        count = self.groups.heads.size
        sizes = [sum(len(self._balance[layer].assignment[i]) for layer in layers) for i in range(count)]
        everyone = gather(self.groups.heads, mine, sizes, dim=0, what="loads").tolist()
        place = 0
        loads = {layer: [0.0] * sum(map(len, self._balance[layer].assignment)) for layer in layers}
        for process in range(count):
            for layer in layers:
                for head in self._balance[layer].assignment[process]:
                    loads[layer][head], place = everyone[place], place + 1
        for layer in layers:
            self._balance[layer].update(loads[layer])
        self._loads.clear()

    def imbalance(self) -> dict[str, float] | None:
        """Slowest over mean of the worst layer, when heads were last looked at: in their order, and as they are.

        Returns:
            ``naive`` and ``now``; None while nothing was looked at.
        """
        seen = [balance.last for balance in self._balance.values() if balance.last is not None]
        if not seen:
            return None
        return {"naive": max(x.naive for x in seen), "now": max(x.after for x in seen)}

    def _divide(self, grid: Grid, layouts: Sequence[Layout]) -> tuple[Cut, Shard | None]:
        count = self.groups.all.size
        if grid.video < count:
            raise ValueError(
                f"context parallel: {grid} has {grid.video} video tokens for {count} processes; use fewer, or a larger "
                "video"
            )
        if self.groups.rows.size == 1 or not layouts:
            return Cut(groups=self.groups, grid=grid, sizes=even(grid.video, count)), None
        if against := cannot_shard(layouts):
            raise NotImplementedError(
                f"context parallel: {self.setting} shares tokens, which this method does not allow: {against}; share "
                f"heads alone, ulysses={self.setting.size}"
            )
        shard = shard_of(layouts[0], self.groups.rows, self.groups.how)
        sizes = tuple(size for tokens in shard.tokens for size in even(tokens, self.groups.heads.size))
        if not all(sizes):
            raise ValueError(
                f"context parallel: {self.setting} leaves a process without a token of {grid}, whose parts have "
                f"{shard.tokens} video tokens; use fewer processes, or a larger video"
            )
        return Cut(groups=self.groups, grid=grid, sizes=sizes, order=order_of(layouts[0])), shard

    def enter(self) -> None:
        """A forward begins, here and elsewhere: what stopped an earlier one is past."""
        board = self.groups.all.board
        if board is not None:
            board.begin()

    def failed(self, error: BaseException | None, *, ahead: int = 0) -> None:
        """Tell those who wait for this process why its forward has ended, or why some that are ahead will not come."""
        board = self.groups.all.board
        if board is not None and error is not None:
            rank = self.groups.all.rank
            board.write(f"process {rank} of {self.groups.all.size}: {type(error).__name__}: {error}", ahead=ahead)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Around a loop of forwards, and of backwards between them: what ends it here is told to the others."""
        try:
            yield
        except Exception as error:
            self.failed(error, ahead=1)
            raise
        finally:
            if self.groups.all.board is not None:
                self.groups.all.board.leave()

    def share(self, layer: int, heads: int) -> Share:
        """What this process computes of an attention."""
        if self.cut is None or self.alone:
            return ALL
        if layer not in self._balance:
            bound = self.setting.balance or 1.0
            self._balance[layer] = HeadBalance(heads, self.groups.heads.size, bound=bound)
        key = (id(self.cut), self._balance[layer].assignment)
        if key not in self._shares:
            self._shares[key] = Share(self.cut, self._balance[layer].assignment, self.shard)
        return self._shares[key]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up gradients over the processes of the video; one that some of them lack is zero there.

        Raises:
            ValueError: they are averaged elsewhere.
        """
        if self.alone:
            return
        if self.setting.gradients == "mean":
            raise ValueError(
                'context parallel: gradients="mean" leaves them to DDP or fully_shard, which average them; to add them '
                'up here, use gradients="sum"'
            )
        group = self.groups.all
        trained = [x for x in parameters if x.requires_grad]
        if not trained:
            return
        known = torch.tensor([x.grad is not None for x in trained], dtype=torch.uint8, device=trained[0].device)
        with group.sending("gradients"):
            dist.all_reduce(known, dist.ReduceOp.MAX, group=group.handle)
        used = [x for x, anywhere in zip(trained, known.tolist(), strict=True) if anywhere]
        for dtype in sorted({x.dtype for x in used}, key=str):
            some = [x for x in used if x.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(x) if x.grad is None else x.grad).flatten() for x in some])
            with group.sending("gradients"):
                dist.all_reduce(flat, group=group.handle)
            for parameter, grad in zip(some, flat.split([x.numel() for x in some]), strict=True):
                parameter.grad = grad.view_as(parameter).clone()

    def __deepcopy__(self, memo: dict[int, object]) -> Division:
        if not self.alone:
            raise NotImplementedError(
                "a model whose video is shared between processes cannot be copied: remove the patch, or copy before"
            )
        return self
