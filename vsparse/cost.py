"""FLOPs of attention, dense and sparse, and where they go."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator

from vsparse.layouts import Layout
from vsparse.methods.base import Method, Site
from vsparse.schedule import Phase, Schedule

__all__ = ["AttentionCost", "attention_cost", "attention_flops", "phases"]


@dc.dataclass(frozen=True, kw_only=True)
class AttentionCost:
    """FLOPs of the self-attention of all sites over a whole generation (forward, products only).

    Args:
        dense: With full attention. sparse: what the schedule executes, searches and padding slots included.
        search: The part of ``sparse`` that finds maps. density: executed share of token pairs, mean over all calls.
        sparse_density: The same of a sparse call, mean over the sites.
    """

    dense: float
    sparse: float
    search: float
    density: float
    sparse_density: float


def attention_flops(layout: Layout, site: Site, batch: int, density: float | None = None) -> float:
    """FLOPs of one call: ``4 H N^2 D`` of full attention; with a density ``4 H S^2 D`` times it, padding included."""
    pairs = layout.tokens**2 if density is None else layout.slots**2 * density
    return 4.0 * batch * site.heads * site.head_dim * pairs


def phases(method: Method, schedule: Schedule, site: Site, *, steps: int | None) -> Iterator[Phase]:
    """The phase of a site in each step of a generation, one call a step.

    Args:
        steps: Denoising steps; None: one call without a step rule.
    """
    chosen, filled, stamp = method.of(site), False, None
    for step in range(1 if steps is None else steps):
        known = None if steps is None else step
        phase = method.phase(schedule, step=known, steps=steps, layer=site.layer, filled=filled, stamp=stamp)
        if phase in chosen.state_phases:
            filled, stamp = True, known
        yield phase


def attention_cost(
    method: Method, schedule: Schedule, sites: list[tuple[Site, Layout]], *, steps: int | None, batch: int
) -> AttentionCost:
    """Predict the cost of one generation.

    The padding of ragged tiles counts (`attention_flops`). A call that gives a cached output again computes nothing.

    Args:
        sites: Each site with its layout. steps: denoising steps; None: one call without a step rule.
        batch: Samples per generation, CFG branches included.
    """
    dense = sparse = search = pairs = densities = 0.0
    known: dict[object, float] = {}
    searches: dict[object, float] = {}  # both asked once for each kind of site, as a method may count in its map
    for site, layout in sites:
        chosen = method.of(site)
        kind = (chosen, layout.key, chosen.static_pattern(site), site.heads, site.head_dim)
        if kind not in known:
            known[kind] = chosen.predicted_density(layout, site)
        density = known[kind]
        densities += density
        for phase in phases(method, schedule, site, steps=steps):
            full = attention_flops(layout, site, batch)
            dense += full
            if phase == "output":
                continue
            if (kind, phase) not in searches:
                searches[kind, phase] = 0.0 if phase == "dense" else chosen.search_flops(layout, site, batch, phase)
            extra = searches[kind, phase]
            exact = phase in chosen.exact_phases
            pairs += full if exact else full * density
            sparse += extra + (full if exact else attention_flops(layout, site, batch, density))
            search += extra
    return AttentionCost(
        dense=dense,
        sparse=sparse,
        search=search,
        density=pairs / dense,
        sparse_density=densities / len(sites),
    )
