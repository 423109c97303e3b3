"""How the forwards of one model are divided: who holds which tokens at which size, and who computes which heads."""

from __future__ import annotations

import torch

from vsparse.geometry import Grid
from vsparse.parallel.context import ContextParallel, Groups, agree
from vsparse.parallel.share import ALL, Cut, Share, even, even_heads

__all__ = ["Division"]


class Division:
    """The division of one root.

    Args:
        setting: How many processes, in which roles. groups: of this process.
    """

    def __init__(self, setting: ContextParallel, groups: Groups) -> None:
        self.setting, self.groups = setting, groups
        self.cut: Cut | None = None
        self._cuts: dict[tuple[object, ...], Cut] = {}
        self._shares: dict[tuple[object, ...], Share] = {}

    @property
    def alone(self) -> bool:
        """Whether this process has everything."""
        return self.groups.alone

    def begin(self, grid: Grid, batch: int, device: torch.device) -> None:
        """Divide a forward; at a size that is new, all processes of the video must come with the same one.

        Raises:
            ValueError: another size or batch on another process, or a video too small to divide.
        """
        if self.alone:
            return
        key = (grid, batch, device)
        if key not in self._cuts:
            agree(self.groups.all, "context parallel", {"grid": grid, "batch": batch})
            self._cuts[key] = self._divide(grid, device)
        self.cut = self._cuts[key]

    def _divide(self, grid: Grid, device: torch.device) -> Cut:
        count = self.groups.all.size
        if grid.video < count:
            raise ValueError(
                f"context parallel: {grid} has {grid.video} video tokens for {count} processes; use fewer, or a larger "
                "video"
            )
        return Cut(groups=self.groups, grid=grid, sizes=even(grid.video, count))

    def share(self, layer: int, heads: int) -> Share:
        """What this process computes of an attention."""
        if self.cut is None or self.alone:
            return ALL
        key = (id(self.cut), layer, heads)
        if key not in self._shares:
            self._shares[key] = Share(self.cut, even_heads(heads, self.groups.heads.size))
        return self._shares[key]

    def __deepcopy__(self, memo: dict[int, object]) -> Division:
        if not self.alone:
            raise NotImplementedError(
                "a model whose video is shared between processes cannot be copied: remove the patch, or copy before"
            )
        return self
