"""What a density costs and does in each layer and head: errors of attention, and what the model makes of them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses as dc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vsparse.geometry import kept_blocks
from vsparse.host import find_roots
from vsparse.measure.calibrate import hearing
from vsparse.measure.recall import heard
from vsparse.methods import Method, Site
from vsparse.methods.by_layer import ByLayer
from vsparse.methods.samples import Sample
from vsparse.patch import apply
from vsparse.schedule import Schedule

__all__ = ["DENSITIES", "Inputs", "Table", "inputs_of", "probed", "sensitivity", "spread_over"]

DENSITIES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1.0)
"""What a head may be given; 1 is full attention."""

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
Cells = list[list[list[float]]]


@dc.dataclass(frozen=True, kw_only=True)
class Table:
    """One method at several densities, means over the calls that were probed.

    Args:
        densities: J of them, rising, the last one 1.
        executed: ``[layers][heads][J]``, computed share of the token pairs.
        error: ``[layers][heads][J]``, squared distance of a head's output from full attention, as a share of the
            squared size of the output of all heads.
        calls: How many calls of a layer were probed.
    """

    densities: tuple[float, ...]
    executed: Cells
    error: Cells
    calls: int

    def nearest(self, density: float) -> int:
        """Number of the density nearest to one, full attention aside."""
        return min(range(len(self.densities) - 1), key=lambda j: abs(self.densities[j] - density))


def spread_over(call: int, share: float) -> bool:
    """Whether a call is among a share of all, evenly spread, without knowing how many there will be."""
    return call * _GOLDEN % 1.0 < share


class _Sums:
    """Sums over calls, by layer."""

    def __init__(self, method: Method, densities: Sequence[float]) -> None:
        self.method, self.densities = method, tuple(densities)
        self.layers: dict[int, tuple[Tensor, Tensor, int]] = {}

    def add(self, site: Site, sample: Sample, exact: Tensor) -> None:
        """Every density on one call."""
        size = exact.double().square().sum()
        executed, error = [], []
        for density in self.densities:
            if density == 1.0:
                executed.append(torch.ones(site.heads, dtype=torch.float64))
                error.append(torch.zeros(site.heads, dtype=torch.float64))
                continue
            maps, out = heard(self.method.replace(density=density), sample, layer=site.layer)
            shares = [blocks.density().mean(0).expand(site.heads).double().cpu() for blocks in maps]
            executed.append(torch.stack(shares).sum(0))
            off = (out.double() - exact.double()).square().sum((0, 1, 3)) / size
            error.append(off.cpu())
        found = torch.stack(executed, 1), torch.stack(error, 1)
        known = self.layers.get(site.layer)
        if known is None:
            self.layers[site.layer] = (*found, 1)
        else:
            self.layers[site.layer] = (known[0] + found[0], known[1] + found[1], known[2] + 1)

    def table(self) -> Table:
        """The means."""
        order = sorted(self.layers)
        return Table(
            densities=self.densities,
            executed=[(self.layers[i][0] / self.layers[i][2]).tolist() for i in order],
            error=[(self.layers[i][1] / self.layers[i][2]).tolist() for i in order],
            calls=min(self.layers[i][2] for i in order),
        )


def probed(
    target: object,
    methods: Mapping[str, Method],
    run: Callable[[], object],
    *,
    densities: Sequence[float] = DENSITIES,
    share: float = 0.25,
) -> dict[str, Table]:
    """Try methods at several densities on what the attention layers of a model are given, while it runs dense.

    No tensor of a call is kept: each is tried at once, and its figures are added up.

    Args:
        target: A pipeline or model, not patched. methods: what is tried, each with a ``density`` for each head.
        run: Makes the target work: a few generations. densities: rising, the last one 1.
        share: Of the calls of a layer, spread over all steps and branches.

    Raises:
        ValueError: as of `hearing`; densities that do not rise to 1; or nothing was run.
    """
    if not densities or list(densities) != sorted(set(densities)) or densities[-1] != 1.0 or densities[0] <= 0.0:
        raise ValueError(f"probed: densities must rise to 1, got {tuple(densities)}")
    sums: dict[str, _Sums] = {}
    calls: dict[tuple[str, int], int] = {}

    def told(site: Site, sample: Sample, exact: Tensor) -> None:
        key = (site.root, site.layer)
        calls[key] = calls.get(key, -1) + 1
        if not spread_over(calls[key], share):
            return
        for name, method in methods.items():
            if name not in sums:
                sums[name] = _Sums(method, _distinct(method, sample, site, densities))
            sums[name].add(site, sample, exact)

    with hearing(target, told):
        run()
    if not sums:
        raise ValueError("probed: nothing was run")
    return {name: found.table() for name, found in sums.items()}


def _distinct(method: Method, sample: Sample, site: Site, densities: Sequence[float]) -> tuple[float, ...]:
    """Densities that keep different numbers of blocks on this grid."""
    tiles = method.layout(sample.grid, site).video_tiles
    least = {kept_blocks(density, tiles): density for density in reversed(densities)}
    return (*sorted(density for count, density in least.items() if count < tiles), 1.0)


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What a root was called with once, and what it answered."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor


@contextlib.contextmanager
def inputs_of(target: object, *, share: float) -> Iterator[list[Inputs]]:
    """Gather a share of the calls of the models of a target, copied, while it runs."""
    found: list[Inputs] = []
    calls: dict[str, int] = {}
    with contextlib.ExitStack() as undo:
        for root in find_roots(target)[1]:

            def told(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = root.name) -> None:
                calls[name] = calls.get(name, -1) + 1
                if spread_over(calls[name], share):
                    given, named = copy.deepcopy((args, kwargs))
                    found.append(Inputs(module=module, args=given, kwargs=named, output=output[0].detach().clone()))

            undo.callback(root.module.register_forward_hook(told, with_kwargs=True).remove)
        yield found


@torch.no_grad()
def sensitivity(inputs: Sequence[Inputs], method: Method, density: float, layer: int, head: int | None) -> float:
    """How far a model's answer moves when one layer, or one head of it, is sparse and everything else is dense.

    Args:
        inputs: Of the models, dense. method, density: of the sparse part. layer, head: which; None: all heads.

    Returns:
        The mean over the inputs of ``|y - y'|^2 / |y|^2``, y the model's answer.
    """
    off = []
    for one in inputs:
        heads = next(claim.site.heads for claim in find_roots(one.module)[1][0].claims if claim.site.layer == layer)
        given = density if head is None else tuple(density if i == head else 1.0 for i in range(heads))
        part = ByLayer(parts=((str(layer), method.replace(density=given)),))
        schedule = Schedule(search_at=(0.0,)) if method.state_phases else Schedule()
        steps = 2 if method.state_phases else 1  # the first call finds the map that the second one runs
        with apply(one.module, part, schedule=schedule) as patch, patch.generation(steps):
            for step in range(steps):
                with patch.step(step):
                    found = one.module(*one.args, **one.kwargs)[0]
        off.append(float((found.double() - one.output.double()).square().sum() / one.output.double().square().sum()))
    return sum(off) / len(off)
