"""Which samples make which batch: a function of the step, so that a resumed run goes on where it was."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vsparse.training.draws import Draws

__all__ = ["BatchPlan", "Place"]


@dc.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a batch begins: in the order that ``epoch`` gives to ``group``, at position ``first``."""

    epoch: int
    group: int
    first: int


@dc.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Deals samples to steps, micro-batches and ranks, epoch after epoch.

    In each epoch every group is shuffled and cut into batches, and the batches of all groups are shuffled. The last
    batch of a group is filled up from the beginning of the group's own order, so all batches are full and every sample
    appears in every epoch, some of them twice; a group with fewer samples than a batch repeats them within it. Batches
    are dealt in order: to the ranks of a micro-batch, to the micro-batches of a step, to the steps; a step may span two
    epochs.

    Args:
        groups: For each sample a number >= 0; a batch has samples of one group.
        batch_size: Samples of a batch. world_size: processes. accumulate: micro-batches of a step.
        seed: Of the shuffling.

    Raises:
        ValueError: a value out of range, or no samples.
    """

    groups: Sequence[int]
    batch_size: int
    world_size: int = 1
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        lows = {"batch_size": 1, "world_size": 1, "accumulate": 1, "seed": 0}
        for name, value, low in [
            *((name, getattr(self, name), low) for name, low in lows.items()),
            *(("groups", group, 0) for group in self.groups),
        ]:
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"batches: {name} must be integers >= {low}, got {value!r}")
        if not self.groups:
            raise ValueError("batches: there are no samples")

    @property
    def batches(self) -> int:
        """Batches of an epoch, over all ranks."""
        return len(self._starts)

    def place(self, step: int, micro: int, rank: int) -> Place:
        """Where the batch of a rank in a micro-batch of a step begins, all counted from 0.

        Raises:
            ValueError: a number out of range.
        """
        if step < 0 or not 0 <= micro < self.accumulate or not 0 <= rank < self.world_size:
            raise ValueError(
                f"batches: step must be >= 0, micro in [0, {self.accumulate}), rank in [0, {self.world_size}); "
                f"got {step}, {micro}, {rank}"
            )
        number = (step * self.accumulate + micro) * self.world_size + rank
        epoch, turn = divmod(number, self.batches)
        order = _shuffled(self.batches, (self.seed, "batches", epoch))
        group, first = self._starts[int(order[turn])]
        return Place(epoch=epoch, group=group, first=first)

    def sample(self, place: Place, offset: int) -> int:
        """The sample that stands ``offset`` after a place in the order of its group; the end joins the beginning."""
        members = self._members[place.group]
        order = _shuffled(len(members), (self.seed, "samples", place.epoch, place.group))
        return members[int(order[(place.first + offset) % len(members)])]

    def indices(self, step: int, micro: int, rank: int) -> tuple[int, ...]:
        """Samples of one batch; arguments and errors as of `place`."""
        place = self.place(step, micro, rank)
        return tuple(self.sample(place, i) for i in range(self.batch_size))

    def size(self, group: int) -> int:
        """How many samples a group has."""
        return len(self._members[group])

    @functools.cached_property
    def _members(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, list[int]] = {group: [] for group in sorted(set(self.groups))}
        for index, group in enumerate(self.groups):
            found[group].append(index)
        return {group: tuple(members) for group, members in found.items()}

    @functools.cached_property
    def _starts(self) -> tuple[tuple[int, int], ...]:
        """Group and first position of every batch of an epoch, before they are shuffled."""
        sizes = {group: len(members) for group, members in self._members.items()}
        return tuple((group, first) for group, size in sizes.items() for first in range(0, size, self.batch_size))


@functools.lru_cache(maxsize=64)
def _shuffled(count: int, key: tuple[int | str, ...]) -> Tensor:
    return torch.randperm(count, generator=Draws(key).generator())
