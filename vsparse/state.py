"""RunState: what outlives one call of an attention site (cached LSE, maps as bits, centroids)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ["RunState", "Version"]

Version = Mapping[str, Tensor]
_EMPTY: Version = MappingProxyType({})


class RunState:
    """State of one site, one immutable version per CFG branch.

    A call reads the version that its root bound before the call, and stages what it found; the root commits the staged
    tensors after the call as the next version. Nothing is written in place, so a recomputation under gradient
    checkpointing that is bound to an older version reads exactly what the first run read, and what it stages is
    dropped.
    """

    def __init__(self) -> None:
        self.bound: dict[str, Tensor] = {}
        self.staged: dict[str, Tensor] = {}
        self._versions: dict[str, Version] = {}
        self._stamps: dict[str, int | None] = {}
        self._deaf = False

    def read(self, name: str) -> Tensor:
        """The tensor of the bound version."""
        return self.bound[name]

    def stage(self, name: str, value: Tensor) -> None:
        """Offer a tensor for the next version; the caller gives it away."""
        self.hand_out(name, value.detach())

    def hand_out(self, name: str, value: Tensor) -> None:
        """Leave a tensor with its graph for the root to take after the call: a loss. It is no part of a version."""
        if not self._deaf:
            self.staged[name] = value

    def bind(self, version: Version, *, again: bool = False) -> None:
        """Make a version the one that is read, and drop what is staged.

        Args:
            again: For a recomputation: what it stages is not even kept. A loss would keep its whole graph.
        """
        self.bound, self._deaf = dict(version), again
        self.staged = {}

    def version(self, branch: str) -> Version:
        """The committed version of a branch; empty when there is none."""
        return self._versions.get(branch, _EMPTY)

    def stamp(self, branch: str) -> int | None:
        """Denoising step of the last commit to a branch."""
        return self._stamps.get(branch)

    def commit(self, branch: str, step: int | None) -> None:
        """Turn what is staged into the next version of a branch; tensors not staged carry over."""
        fresh = {name: _ordinary(value) for name, value in self.staged.items()}
        self._versions[branch] = MappingProxyType({**self.version(branch), **fresh})
        self._stamps[branch] = step
        self.staged = {}

    def clear(self) -> None:
        """Forget everything."""
        self.bound, self.staged = {}, {}
        self._versions.clear()
        self._stamps.clear()

    @property
    def empty(self) -> bool:
        """Whether no branch has a version."""
        return not self._versions

    def nbytes(self) -> int:
        """Bytes held by the committed versions."""
        return sum(x.numel() * x.element_size() for v in self._versions.values() for x in v.values())

    def __deepcopy__(self, memo: dict[int, object]) -> RunState:
        """A copied model starts a run of its own."""
        return RunState()


def _ordinary(value: Tensor) -> Tensor:
    """A tensor made under inference mode cannot be saved for a backward later: copy it out."""
    if not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()
