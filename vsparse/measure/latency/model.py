"""The cost model: seconds of each part from what it computes and moves and from the rates of a machine."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping

from vsparse.measure.latency.executed import Executed
from vsparse.measure.latency.rates import Rates
from vsparse.measure.latency.timeline import CHOOSE, KERNEL, REST, SCHEDULER, SEARCH, TEXT, VAE
from vsparse.measure.latency.work import Work

__all__ = ["LOW", "ONCE", "generation", "predicted", "sparse_seconds", "steps_of"]

ONCE = (TEXT, VAE, REST)
"""Parts that a generation runs once, however many steps it takes."""

LOW = ((0.05, 0.08), (0.27, 0.45))
"""How far too low the attention kernel and the sum came out, dense and sparse, in the run of docs/latency.md."""


def predicted(work: Work, rates: Rates) -> float:
    """Seconds: products and full attention at their rates, other operators by the bytes they move, and every call."""
    return (
        work.products / rates.products.flops
        + work.attention / rates.dense.flops
        + work.moved / rates.memory
        + work.calls * rates.call
    )


def steps_of(work: Mapping[str, Work], steps: int) -> dict[str, Work]:
    """The work of a generation from that of a generation of one step."""
    return {part: one if part in ONCE else one.times(steps) for part, one in work.items()}


def sparse_seconds(part: str, work: Work, executed: Executed, rates: Rates) -> float:
    """Seconds of a part of a sparse generation.

    The kernel: full attention of dense calls, and the pairs that sparse calls computed at the rate of the sparse
    kernel, with its overhead for each call. A search: at the rate of full attention. Choosing: the products that the
    method declares, and what its operators move.
    """
    base = predicted(work, rates)
    if part == KERNEL and executed.flops.get(KERNEL):
        calls = executed.stats["calls"]
        sparse: int = sum(count for phase, count in calls.items() if phase not in ("dense", "output"))
        return base + executed.flops[KERNEL] / rates.sparse.flops + sparse * rates.sparse.overhead
    if part == SEARCH:
        return base + executed.flops[SEARCH] / rates.dense.flops
    if part == CHOOSE:
        return predicted(dc.replace(work, products=executed.flops[CHOOSE]), rates)
    return base


def generation(
    dense: Mapping[str, Work], sparse: Mapping[str, Work], executed: Executed, rates: Rates
) -> dict[str, dict[str, float]]:
    """Predicted seconds by kind and part.

    Args:
        dense, sparse: What generations of this size compute. executed: by the sparse one.
    """
    first = {part: predicted(work, rates) for part, work in dense.items() if part not in (REST, SCHEDULER)}
    second = {
        part: sparse_seconds(part, work, executed, rates)
        for part, work in sparse.items()
        if part not in (REST, SCHEDULER)
    }
    return {"dense": first, "sparse": second}
