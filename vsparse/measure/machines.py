"""Clusters of GPUs that nobody measured: data sheets, and the share of them that is assumed to be reached."""

from __future__ import annotations

from vsparse.parallel.rates import NDR_400, NVLINK_4, PCIE_5, Cluster, assumed_rate
from vsparse.training.predict import DEVICES

__all__ = ["INSIDE", "assumed", "assumed_cluster", "clusters", "room"]

INSIDE = {"nvlink4": ("NVLink 4", NVLINK_4), "pcie5": ("PCIe 5", PCIE_5)}
"""Links inside a node that are assumed: what is typed -> name, figures."""

_H100 = next(device for device in DEVICES if device.name.startswith("H100"))
_PER_NODE = 8
_CALL = 20e-6  # seconds: a launch, and what a short kernel does not reach
_BANDWIDTH = 3.35e12  # bytes per second, data sheet of the H100 SXM
_HALF = 0.5  # of the memory of a GPU for one attention; the rest is for weights and the rest of the model


def room(memory: float) -> float:
    """Bytes of a GPU that one attention may hold: half of what CUDA leaves of its memory."""
    return _HALF * (1 - _H100.spare) * memory


def assumed_cluster(links: str, *, dense: bool) -> Cluster:
    """Nodes of eight H100, with InfiniBand NDR between them; all of it assumed.

    Args:
        links: Inside a node, a key of `INSIDE`. dense: the rate of full attention; else that of sparse attention.

    Raises:
        ValueError: no such link.
    """
    if links not in INSIDE:
        raise ValueError(f"links must be one of {', '.join(INSIDE)}, got {links!r}")
    name, inside = INSIDE[links]
    share = _H100.efficiency if dense else _H100.sparse
    rate = assumed_rate("the H100", _H100.peak, share, overhead=_CALL, memory=_BANDWIDTH)
    memory = room(_H100.memory)
    return Cluster(name=f"H100, {name}", per_node=_PER_NODE, memory=memory, rate=rate, inside=inside, between=NDR_400)


def clusters(dense: bool) -> dict[str, Cluster]:
    """`assumed_cluster` with each link, by its name."""
    return {name: assumed_cluster(links, dense=dense) for links, (name, _) in INSIDE.items()}


def assumed() -> list[str]:
    """Every assumption of `clusters`, a line each."""
    lines = []
    for dense in (False, True):
        for cluster in clusters(dense).values():
            attention, *links = cluster.assumptions()
            lines += [f"{'full' if dense else 'sparse'} {attention}", *links]
    lines.append(f"nodes of {_PER_NODE} GPUs; {clusters(False)['PCIe 5'].memory / 2**30:.0f} GiB for one attention")
    return list(dict.fromkeys(lines))
