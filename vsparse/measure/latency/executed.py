"""What one sparse generation executed: density of each head, layer and step, and one of its maps."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.host import find_roots
from vsparse.layouts import Layout
from vsparse.measure.capture import tapped
from vsparse.measure.latency.timeline import CHOOSE, KERNEL, SEARCH
from vsparse.methods import SparseAttention
from vsparse.patch import Patch
from vsparse.schedule import Phase

__all__ = ["Executed", "Watcher", "watching"]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Executed:
    """What ran.

    Args:
        density: Computed share of the token pairs, ``[steps][layers][heads]``, mean over the calls of a step; 1 where a
            layer ran dense, 0 where it gave a cached output again.
        phases: ``[steps][layers]``, the phase of the last call of a step.
        stats: Of the patch.
        flops: Of the sparse kernel (padding counted as the layout has it), of exact searches, and of choosing maps as
            methods declare it, by part.
        blocks: The map of one sparse call, its layer and step; None without a sparse call.
    """

    density: list[list[list[float]]]
    phases: list[list[str]]
    stats: dict[str, Any]
    flops: Mapping[str, float] = dc.field(default_factory=dict)
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
    phase: Phase
    layout: Layout | None
    batch: int
    kept: list[Tensor]
    pairs: list[Tensor]


class Watcher:
    """Gathers densities as tensors of the device, without waiting for it, and one map of a layer in the middle."""

    def __init__(self, patch: Patch, steps: int) -> None:
        self._patch, self._steps = patch, steps
        self._calls: list[_Call] = []
        self._kept: dict[int, list[tuple[Tensor, Tensor, int]]] = {}
        self._maps: list[tuple[int, BlockMap]] = []  # with the number of the call
        self._middle = (max((site.site.layer for site in patch.sites), default=0) + 1) // 2

    def told(self, site: SparseAttention, blocks: BlockMap, batch: int) -> None:
        """Of a map that a site executes."""
        heads = _heads(site)
        density = blocks.density().mean(0).expand(heads)
        pairs = blocks.pairs()[0].expand(batch, heads).sum()
        self._kept.setdefault(id(site), []).append((density, pairs, batch))
        if site.site.layer == self._middle and len(self._maps) <= self._steps // 2:
            self._maps.append((len(self._calls), blocks))

    def passed(self, sites: list[SparseAttention]) -> None:
        """Of a forward that is over, and of the sites in it."""
        for site in sites:
            step, layout = (None, None) if site.call is None else (site.call.step, site.call.layout)
            kept = self._kept.pop(id(site), [])
            batch = kept[0][2] if kept else 0
            densities, pairs = [one[0] for one in kept], [one[1] for one in kept]
            self._calls.append(_Call(step, site, site.phase, layout, batch, densities, pairs))

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
            flops=_flops(self._calls),
            blocks=blocks,
            layer=self._middle,
            step=max(0, step_of[number]) if step_of else 0,
        )


def _densities(call: _Call) -> list[float]:
    """Of each head; several maps of one call are disjoint, so their shares add up."""
    if call.kept:
        return [sum(column) for column in zip(*(one.tolist() for one in call.kept), strict=True)]
    return [0.0 if call.phase == "output" else 1.0] * _heads(call.site)


def _heads(site: SparseAttention) -> int:
    """Heads that this process computes."""
    return site.site.heads if site.call is None else site.call.share.heads_of(site.site.heads)


def _flops(calls: list[_Call]) -> dict[str, float]:
    """By part, over all calls that had a map."""
    found = dict.fromkeys((KERNEL, SEARCH, CHOOSE), 0.0)
    for call in calls:
        if call.layout is None or not call.kept:
            continue
        site, method, layout = call.site.site, call.site.method, call.layout
        padded = 4.0 * site.head_dim * (layout.slots / layout.tokens) ** 2
        computed = padded * sum(float(pairs) for pairs in call.pairs)
        search = method.search_flops(layout, site, call.batch, call.phase)
        if call.phase in method.exact_phases:
            found[SEARCH] += computed + search
        else:
            found[KERNEL] += computed
            found[CHOOSE] += search
    return found


def _means(calls: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*calls, strict=True)] if calls else [1.0]


@contextlib.contextmanager
def watching(target: Any, patch: Patch, steps: int) -> Iterator[Watcher]:
    """Watch the sparse calls of a patched target inside the block; ask the watcher when it is over."""
    watcher = Watcher(patch, steps)
    with contextlib.ExitStack() as undo:
        for site in patch.sites:
            undo.enter_context(tapped(site, lambda *given, site=site: watcher.told(site, *given)))
        for root in find_roots(target)[1]:
            mine = [site for site in patch.sites if site.site.root == root.name]
            undo.callback(root.module.register_forward_hook(lambda *_, mine=mine: watcher.passed(mine)).remove)
        yield watcher
