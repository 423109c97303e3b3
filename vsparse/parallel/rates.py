"""How fast processes compute and send: fitted from measurements, or declared as assumptions, never guessed silently."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Sequence

__all__ = [
    "LINKS",
    "NDR_400",
    "NVLINK_4",
    "PCIE_5",
    "Cluster",
    "Link",
    "Rate",
    "assumed_rate",
    "fit_compute",
    "fit_rate",
]


@dc.dataclass(frozen=True, kw_only=True)
class Link:
    """What one process gets of a link, in one direction: ``seconds = latency + bytes / bandwidth``.

    Args:
        latency: Seconds of one exchange, whatever its size. bandwidth: bytes per second.
        origin: Where the figures come from, in words that a table prints.

    Raises:
        ValueError: a negative latency, a bandwidth that is not positive, no origin.
    """

    latency: float
    bandwidth: float
    origin: str

    def __post_init__(self) -> None:
        _check("Link", "latency", self.latency, least=0.0)
        _check("Link", "bandwidth", self.bandwidth)
        _check_origin("Link", self.origin)

    def seconds(self, amount: float) -> float:
        """Of one exchange of bytes; nothing to send takes no time."""
        return self.latency + amount / self.bandwidth if amount else 0.0


@dc.dataclass(frozen=True, kw_only=True)
class Rate:
    """What one process computes: ``seconds = overhead + FLOPs / flops``.

    Args:
        flops: FLOP per second, of sparse attention at the density that is planned.
        overhead: Seconds of one call, whatever its size. origin: as of `Link`.
        memory: Bytes per second of the memory, which merging partial results takes; None: merging takes no time.

    Raises:
        ValueError: a rate that is not positive, a negative overhead, no origin.
    """

    flops: float
    origin: str
    overhead: float = 0.0
    memory: float | None = None

    def __post_init__(self) -> None:
        _check("Rate", "flops", self.flops)
        _check("Rate", "overhead", self.overhead, least=0.0)
        if self.memory is not None:
            _check("Rate", "memory", self.memory)
        _check_origin("Rate", self.origin)

    def seconds(self, amount: float) -> float:
        """Of one call with some FLOPs; nothing to compute takes no time."""
        return self.overhead + amount / self.flops if amount else 0.0


def assumed_rate(name: str, peak: float, share: float, *, overhead: float = 0.0, memory: float | None = None) -> Rate:
    """A share of a data sheet's peak, declared as what it is.

    Args:
        name: Of the GPU. peak: dense FLOP per second of its data sheet. share: that is assumed to be reached, (0, 1].
        overhead, memory: As of `Rate`; ``memory`` is that of the data sheet.
    """
    _check("assumed_rate", "peak", peak)
    if not 0 < share <= 1:
        raise ValueError(f"assumed_rate: share must lie in (0, 1], got {share!r}")
    words = [f"assumed: {share:.0%} of {peak / 1e12:.0f} TFLOP/s, the data sheet of {name}"]
    words += [f"{overhead * 1e6:.0f} us for a call"] * (overhead > 0)
    words += [] if memory is None else [f"merging at {memory / 1e12:.2f} TB/s of memory"]
    return Rate(flops=share * peak, origin="; ".join(words), overhead=overhead, memory=memory)


@dc.dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs, and what is between them.

    Ranks fill one node after the other. Head groups are neighbours in rank, so they stay inside a node as long as they
    fit; sequence groups reach across nodes (DSV, section 4.3: head-wise inside, sequence-wise across).

    Args:
        name: For tables. per_node: GPUs of a node. memory: bytes that attention may hold on one of them: what is left
            beside weights and the rest of the model.
        rate: Of attention. inside: link between GPUs of a node. between: of one GPU to another node; None: one node.
        inside_ring, between_ring: The same for a message to one neighbour, as a ring sends it; None: as for the others.

    Raises:
        ValueError: a node without GPUs, memory that is not positive.
    """

    name: str
    per_node: int
    memory: float
    rate: Rate
    inside: Link
    between: Link | None = None
    inside_ring: Link | None = None
    between_ring: Link | None = None

    def __post_init__(self) -> None:
        if isinstance(self.per_node, bool) or not isinstance(self.per_node, int) or self.per_node < 1:
            raise ValueError(f"Cluster: per_node must be an integer >= 1, got {self.per_node!r}")
        _check("Cluster", "memory", self.memory)

    def link(self, here: int, there: int, *, ring: bool = False) -> Link:
        """Between two ranks.

        Args:
            ring: For a message of a ring; else for a part of an exchange between all of a group.

        Raises:
            ValueError: they are in two nodes, and there is no link between nodes.
        """
        if here // self.per_node == there // self.per_node:
            return (self.inside_ring if ring else None) or self.inside
        if self.between is None:
            raise ValueError(
                f"{self.name}: ranks {here} and {there} are in two nodes of {self.per_node}, but the link between "
                "nodes is None; give between="
            )
        return (self.between_ring if ring else None) or self.between

    def assumptions(self) -> list[str]:
        """Where the figures come from, a line each."""
        links = {
            "inside a node": self.inside,
            "inside a node, ring": self.inside_ring,
            "between nodes": self.between,
            "between nodes, ring": self.between_ring,
        }
        found = [f"{name}: {link.origin}" for name, link in links.items() if link is not None]
        return [f"attention: {self.rate.origin}", *found]


def fit_rate(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """Latency and bandwidth from measured exchanges, by least squares of the relative errors.

    Relative, so that small exchanges, which know the latency, count as much as large ones. A latency that comes out
    negative is set to 0 and the bandwidth fitted again.

    Args:
        sizes: Bytes that one process sent, at least two different ones. seconds: that each took.

    Raises:
        ValueError: fewer than two sizes, figures that are not positive, or times that do not grow with the sizes.
    """
    fixed, each, worst = _fitted("fit_rate", "sizes", sizes, seconds)
    return Link(latency=fixed, bandwidth=1.0 / each, origin=_origin(len(sizes), worst))


def fit_compute(flops: Sequence[float], seconds: Sequence[float]) -> Rate:
    """Overhead and FLOP per second from measured calls, as `fit_rate` does it.

    Args:
        flops: That were computed, of the kept pairs, at least two different ones. seconds: that each call took.

    Raises:
        ValueError: as of `fit_rate`.
    """
    fixed, each, worst = _fitted("fit_compute", "flops", flops, seconds)
    return Rate(flops=1.0 / each, overhead=fixed, origin=_origin(len(flops), worst))


def _origin(count: int, worst: float) -> str:
    return f"fitted to {count} measurements, off by at most {worst:.0%}"


def _fitted(where: str, name: str, x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """``y = fixed + each * x``; and the greatest relative error."""
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError(
            f"{where}: {name} must hold at least two different ones and seconds as many, got {len(x)} and {len(y)}"
        )
    for label, values in ((name, x), ("seconds", y)):
        for value in values:
            _check(where, label, value)
    # In units of the measured time: 1 = fixed / y + each * x / y.
    a, b = [1.0 / t for t in y], [s / t for s, t in zip(x, y, strict=True)]
    aa, ab, bb = (math.fsum(map(float.__mul__, p, q)) for p, q in ((a, a), (a, b), (b, b)))
    sa, sb = math.fsum(a), math.fsum(b)
    determinant = aa * bb - ab * ab
    fixed, each = (sa * bb - sb * ab) / determinant, (sb * aa - sa * ab) / determinant
    if fixed < 0:
        fixed, each = 0.0, sb / bb
    if each <= 0:
        raise ValueError(f"{where}: seconds must grow with {name}, got {list(y)!r} for {list(x)!r}")
    return fixed, each, max(abs(fixed * p + each * q - 1) for p, q in zip(a, b, strict=True))


def _check(where: str, name: str, value: float, least: float | None = None) -> None:
    words = "positive" if least is None else f">= {least:g}"
    right = value > 0 if least is None else value >= least
    if isinstance(value, bool) or not right or value == math.inf:
        raise ValueError(f"{where}: {name} must be a finite number, {words}, got {value!r}")


def _check_origin(where: str, origin: str) -> None:
    if not isinstance(origin, str) or not origin.strip():
        raise ValueError(f"{where}: origin must say where the figures come from, got {origin!r}")


# Data sheets give no latency. Ten and twenty microseconds are of the order of one collective of a few processes.
NVLINK_4 = Link(
    latency=10e-6,
    bandwidth=450e9,
    origin="assumed: NVLink 4, data sheet, 450 GB/s per direction and GPU; 10 us for an exchange",
)
PCIE_5 = Link(
    latency=20e-6,
    bandwidth=64e9,
    origin="assumed: PCIe 5 x16, data sheet, 64 GB/s per direction; 20 us for an exchange",
)
NDR_400 = Link(
    latency=20e-6,
    bandwidth=50e9,
    origin="assumed: InfiniBand NDR, data sheet, 400 Gb/s per direction, one port per GPU; 20 us for an exchange",
)
LINKS = {"nvlink4": NVLINK_4, "pcie5": PCIE_5, "ndr400": NDR_400}
"""Links by data sheet: upper bounds of what an exchange reaches. Measure yours and use `fit_rate`."""
