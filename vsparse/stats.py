"""What the runtimes of a patch have counted, together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vsparse.planning import Plan
from vsparse.runtime import Runtime

__all__ = ["stats_of"]


def stats_of(runtimes: Sequence[Runtime], plan: Plan) -> dict[str, Any]:
    """See `Patch.stats`; reads from the device."""
    computed = possible = dense = 0.0
    sites: dict[str, float] = {}
    calls: dict[str, int] = {}
    fallbacks: dict[str, int] = {}
    for runtime in runtimes:
        for name, pairs in runtime.pairs.items():
            done, whole = pairs.tolist()
            computed, possible = computed + done, possible + whole
            sites[f"{runtime.name}.{name}"] = done / whole
        dense += float(runtime.dense_pairs)
        for mine, total in ((runtime.phases, calls), (runtime.fallbacks, fallbacks)):
            for key, count in mine.items():
                total[key] = total.get(key, 0) + count
    everything = possible + dense
    found: dict[str, Any] = {
        "density": (computed + dense) / everything if everything else None,
        "sparse_density": computed / possible if possible else None,
        "sites": sites,
        "calls": calls,
        "searches": calls.get("search", 0) + calls.get("refresh", 0),
        "fallbacks": fallbacks,
        "kernel": plan.kernel,
        "state_bytes": sum(runtime.state_bytes() for runtime in runtimes),
    }
    seen = [x for runtime in runtimes if (x := runtime.division.imbalance()) is not None]
    if seen:
        found["imbalance"] = {name: max(x[name] for x in seen) for name in seen[0]}
    return found
