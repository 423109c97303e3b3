"""What one sparse generation executed: density of each head, layer and step, and one of its maps."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.host import find_roots
from vsparse.measure.capture import tapped
from vsparse.methods import SparseAttention
from vsparse.patch import Patch

__all__ = ["Executed", "Watcher", "watching"]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Executed:
    """What ran.

    Args:
        density: Computed share of the token pairs, ``[steps][layers][heads]``, mean over the calls of a step; 1 where a
            layer ran dense, 0 where it gave a cached output again.
        phases: ``[steps][layers]``, the phase of the last call of a step.
        stats: Of the patch.
        blocks: The map of one sparse call, its layer and step; None without a sparse call.
    """

    density: list[list[list[float]]]
    phases: list[list[str]]
    stats: dict[str, Any]
    blocks: BlockMap | None = None
    layer: int = 0
    step: int = 0

    @property
    def dense_steps(self) -> int:
        """Steps in which every layer computed every pair."""
        return sum(all(x == 1.0 for layer in step for x in layer) for step in self.density)

    @property
    def dense_layers(self) -> int:
        """Layers that computed every pair in every step."""
        layers = len(self.density[0]) if self.density else 0
        return sum(all(x == 1.0 for step in self.density for x in step[layer]) for layer in range(layers))


class _Call(NamedTuple):
    step: Tensor | None
    site: SparseAttention
    phase: str
    kept: list[Tensor]


class Watcher:
    """Gathers densities as tensors of the device, without waiting for it, and one map of a layer in the middle."""

    def __init__(self, patch: Patch, steps: int) -> None:
        self._patch, self._steps = patch, steps
        self._calls: list[_Call] = []
        self._kept: dict[int, list[Tensor]] = {}
        self._maps: list[tuple[int, BlockMap]] = []  # with the number of the call
        self._middle = (max((site.site.layer for site in patch.sites), default=0) + 1) // 2

    def told(self, site: SparseAttention, blocks: BlockMap) -> None:
        """Of a map that a site executes."""
        self._kept.setdefault(id(site), []).append(blocks.density().mean(0).expand(site.site.heads))
        if site.site.layer == self._middle and len(self._maps) <= self._steps // 2:
            self._maps.append((len(self._calls), blocks))

    def passed(self, sites: list[SparseAttention]) -> None:
        """Of a forward that is over, and of the sites in it."""
        for site in sites:
            step = None if site.call is None else site.call.step
            self._calls.append(_Call(step, site, site.phase, self._kept.pop(id(site), [])))

    def executed(self) -> Executed:
        """Read everything from the device."""
        step_of = [-1 if call.step is None else int(call.step) for call in self._calls]
        layers = max((call.site.site.layer for call in self._calls), default=-1) + 1
        steps = max(step_of, default=-1) + 1
        found: list[list[list[list[float]]]] = [[[] for _ in range(layers)] for _ in range(steps)]
        phases = [["dense"] * layers for _ in range(steps)]
        for step, call in zip(step_of, self._calls, strict=True):
            if step >= 0:
                layer = call.site.site.layer
                phases[step][layer] = call.phase
                found[step][layer].append(_densities(call))
        blocks, number = (self._maps[-1][1], self._maps[-1][0]) if self._maps else (None, 0)
        return Executed(
            density=[[_means(calls) for calls in step] for step in found],
            phases=phases,
            stats=self._patch.stats(),
            blocks=blocks,
            layer=self._middle,
            step=max(0, step_of[number]) if step_of else 0,
        )


def _densities(call: _Call) -> list[float]:
    """Of each head; several maps of one call are disjoint, so their shares add up."""
    if call.kept:
        return [sum(column) for column in zip(*(one.tolist() for one in call.kept), strict=True)]
    return [0.0 if call.phase == "output" else 1.0] * call.site.site.heads


def _means(calls: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*calls, strict=True)] if calls else [1.0]


@contextlib.contextmanager
def watching(target: Any, patch: Patch, steps: int) -> Iterator[Watcher]:
    """Watch the sparse calls of a patched target inside the block; ask the watcher when it is over."""
    watcher = Watcher(patch, steps)
    with contextlib.ExitStack() as undo:
        for site in patch.sites:
            undo.enter_context(tapped(site, lambda blocks, site=site: watcher.told(site, blocks)))  # type: ignore[misc]
        for root in find_roots(target)[1]:
            mine = [site for site in patch.sites if site.site.root == root.name]
            undo.callback(root.module.register_forward_hook(lambda *_, mine=mine: watcher.passed(mine)).remove)
        yield watcher
