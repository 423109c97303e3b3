"""How fast processes send and compute, measured by what vsparse itself runs, fitted, and kept in a file."""

from __future__ import annotations

import dataclasses as dc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from vsparse import backend, ops
from vsparse.measure.demo import environment
from vsparse.measure.latency.rates import RandomAttention
from vsparse.measure.machines import room
from vsparse.parallel.collectives import ALONE, Group, all_to_all, gather, total
from vsparse.parallel.rates import Cluster, Link, Rate, fit_compute, fit_rate
from vsparse.parallel.ring import Flight

__all__ = [
    "FORMAT",
    "KINDS",
    "LINKS",
    "Point",
    "Sizes",
    "cluster_of",
    "fitted",
    "measure",
    "read_rates",
    "sizes_for",
    "timed",
]

FORMAT = 1
"""Of the file; a reader refuses a newer one."""

LINKS = ("inside", "between", "inside_ring", "between_ring")
"""Exchanges in a node and between nodes, of all with all and of a ring, in bytes."""

KINDS = (*LINKS, "attention", "merging")
"""What is measured: exchanges, attention in FLOPs, merging in bytes."""

_DENSITY = 0.2


@dc.dataclass(frozen=True, kw_only=True)
class Point:
    """One size of one kind of work.

    Args:
        name: What ran. amount: bytes or FLOPs. times: seconds of each repetition, those of its slowest process.
    """

    name: str
    amount: float
    times: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Their median."""
        return median(self.times)

    @property
    def spread(self) -> float:
        """Slowest less fastest repetition, over the median."""
        return (max(self.times) - min(self.times)) / self.seconds


@dc.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Args:
        exchanges: Bytes that each process sends. slots: S of an attention. heads, width: H and D of it.
        dtype: Of q, k and v. warmup, repeats: runs of each size that do not count, and that do.
    """

    exchanges: tuple[int, ...]
    slots: tuple[int, ...]
    heads: int
    width: int
    dtype: torch.dtype
    warmup: int = 3
    repeats: int = 9


def sizes_for(device: torch.device) -> Sizes:
    """From where an overhead shows to where it does not, for a GPU or for a CPU."""
    if device.type == "cuda":
        exchanges = tuple(2**n for n in range(16, 29, 2))
        return Sizes(exchanges=exchanges, slots=(4096, 8192, 16384, 32768), heads=8, width=128, dtype=torch.bfloat16)
    exchanges = tuple(2**n for n in range(12, 25, 2))
    return Sizes(exchanges=exchanges, slots=(512, 1024, 2048, 4096), heads=2, width=64, dtype=torch.float32)


# ---- measuring ---------------------------------------------------------------------------------------------------


def measure(
    device: torch.device,
    *,
    per_node: int,
    command: str,
    sizes: Sizes | None = None,
    told: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure and fit everything; every process of the default group must call, and gets the same.

    Args:
        device: Of this process. per_node: processes of a node, neighbours in rank. command: for the file.
        sizes: What to measure; None: `sizes_for` the device. told: hears what is measured next. clock: in seconds.

    Returns:
        What the file holds.

    Raises:
        ValueError: a process alone, nodes of unequal size, or times that no rate explains.
    """
    world = dist.get_world_size()
    if world < 2 or per_node < 1 or world % per_node:
        raise ValueError(
            f"measure: takes two processes at least, as many on each node, got {world} with {per_node} on a node"
        )
    sizes = sizes_for(device) if sizes is None else sizes
    inside, between, everyone = _groups(device, per_node)
    points: dict[str, list[Point]] = {kind: [] for kind in KINDS}

    def note(kind: str, name: str, amount: float, work: Callable[[], object]) -> None:
        told(f"{kind}: {name}, {amount:.3g} {'FLOPs' if kind == 'attention' else 'bytes'}")
        times = timed(work, everyone, device, warmup=sizes.warmup, repeats=sizes.repeats, clock=clock)
        points[kind].append(Point(name=name, amount=amount, times=tuple(times)))

    for kind, group in (("inside", inside), ("between", between)):
        for amount in sizes.exchanges if group.size > 1 else ():
            note(kind, "all-to-all", amount, _all_to_all(group, amount, device))
            note(f"{kind}_ring", "one message", amount, _ring(group, amount, device))
    kernel = ""
    for slots in sizes.slots:
        some = RandomAttention.of(
            slots, heads=sizes.heads, width=sizes.width, density=_DENSITY, device=device, dtype=sizes.dtype
        )
        options = {"scale": sizes.width**-0.5, "skip_threshold": None}
        given = some.q, some.k, some.v, some.blocks
        kernel = backend.lookup("block_sparse_attention", device.type, *given, **options).name
        note("attention", kernel, some.flops, some.run)
        out, lse = some.run()
        note("merging", "merge_attention", *_merging(out, lse))
    where = environment()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {where['cpu']}"
    report = {
        "format": FORMAT,
        "command": command,
        "date": where["date"],
        "environment": where,
        "device": name,
        "memory": _memory(device, per_node),
        "processes": world,
        "per_node": per_node,
        "backend": str(dist.get_backend()),
        "kernel": kernel,
        "heads": sizes.heads,
        "head_dim": sizes.width,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "density": _DENSITY,
    }
    told_of = f"{name}, {world} processes with {per_node} on a node, {report['backend']}, {report['date'][:10]}"
    report |= {"fitted": fitted(points, told_of)}
    return report | {"points": {kind: [_as_row(point) for point in found] for kind, found in points.items()}}


def timed(
    work: Callable[[], object],
    everyone: Group,
    device: torch.device,
    *,
    warmup: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of each repetition, of the slowest process; all begin together, and the device is waited for.

    Args:
        work: What is timed. everyone: who begins together. clock: in seconds.
    """
    mine = []
    for _ in range(warmup + repeats):
        total(everyone, torch.zeros(1, device=device), what="rates")
        _wait(device)
        began = clock()
        work()
        _wait(device)
        mine.append(clock() - began)
    kept = torch.tensor(mine[warmup:], dtype=torch.float64, device=device)
    found: list[float] = gather(everyone, kept[None], (1,) * everyone.size, dim=0, what="rates").amax(0).tolist()
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _groups(device: torch.device, per_node: int) -> tuple[Group, Group, Group]:
    """Who is on this node, who has this place on the other nodes, and all."""
    world = dist.get_world_size()
    mesh = init_device_mesh(device.type, (world // per_node, per_node), mesh_dim_names=("nodes", "node"))
    found = []
    for axis in ("node", "nodes"):
        handle = mesh[axis].get_group()
        size = dist.get_world_size(handle)
        found.append(Group(size=size, rank=dist.get_rank(handle), handle=handle, name=axis) if size > 1 else ALONE)
    return found[0], found[1], Group(size=world, rank=dist.get_rank(), handle=None, name="all")


def _all_to_all(group: Group, amount: int, device: torch.device) -> Callable[[], object]:
    """As heads change places, and as a gather fetches: one part for every process, the own one not sent."""
    each = torch.zeros(amount // (group.size - 1), dtype=torch.uint8, device=device)
    shapes = [each.shape] * group.size
    return lambda: all_to_all(group, [each] * group.size, shapes, what="rates")


def _ring(group: Group, amount: int, device: torch.device) -> Callable[[], object]:
    """As a ring fetches: all from one neighbour."""
    leaving, coming = (torch.zeros(amount, dtype=torch.uint8, device=device) for _ in range(2))
    to, source = (group.rank - 1) % group.size, (group.rank + 1) % group.size
    return lambda: Flight(group, leaving, to, coming, source, "rates").land()


def _merging(out: Tensor, lse: Tensor) -> tuple[float, Callable[[], object]]:
    """Bytes as the planner counts them: the result so far, read and written, and a part, read; and the work."""
    wide = out.to(lse.dtype)
    amount = 2 * (wide.nbytes + lse.nbytes) + out.nbytes
    return amount, lambda: ops.merge_attention([wide, out.to(wide.dtype)], [lse, lse])


def _memory(device: torch.device, per_node: int) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_node


def _as_row(point: Point) -> dict[str, Any]:
    return {
        "name": point.name,
        "amount": point.amount,
        "seconds": point.seconds,
        "spread": round(point.spread, 3),
        "times": list(point.times),
    }


# ---- fitting, and the file ---------------------------------------------------------------------------------------


def fitted(points: Mapping[str, Sequence[Point]], where: str) -> dict[str, dict[str, Any] | None]:
    """Figures from medians: the fields of a `Link` for each of `LINKS`, those of a `Rate` for ``attention``.

    Args:
        points: By kind (`KINDS`). where: they were measured on, and when; for the words of origin.

    Returns:
        By kind; None for exchanges that nobody measured.

    Raises:
        ValueError: times that do not grow with the amounts.
    """
    series = {kind: ([x.amount for x in points[kind]], [x.seconds for x in points[kind]]) for kind in KINDS}
    found: dict[str, dict[str, Any] | None] = {}
    for kind in LINKS:
        if not series[kind][0]:
            found[kind] = None
            continue
        link = fit_rate(*series[kind])
        figures = f"{link.bandwidth / 1e9:.3g} GB/s, {link.latency * 1e6:.3g} us for an exchange"
        found[kind] = dc.asdict(dc.replace(link, origin=f"measured: {figures}; {link.origin}; {where}"))
    rate, merging = fit_compute(*series["attention"]), fit_rate(*series["merging"])
    figures = (
        f"{rate.flops / 1e12:.3g} TFLOP/s by {points['attention'][0].name}, {rate.overhead * 1e6:.3g} us for a call"
    )
    words = f"measured: {figures}; {rate.origin}; merging at {merging.bandwidth / 1e9:.3g} GB/s; {where}"
    found["attention"] = dc.asdict(dc.replace(rate, memory=merging.bandwidth, origin=words))
    return found


def cluster_of(report: Mapping[str, Any]) -> Cluster:
    """The cluster that `measure` has found.

    Raises:
        ValueError: no link was measured. KeyError, TypeError: it lacks something, or holds something else.
    """
    found = report["fitted"]
    links = {kind: None if found[kind] is None else Link(**found[kind]) for kind in LINKS}
    inside = links["inside"] or (links["between"] if report["per_node"] == 1 else None)  # nobody is beside one alone
    if inside is None:
        raise ValueError("it holds no link between the processes of a node")
    return Cluster(
        name=report["device"],
        per_node=report["per_node"],
        memory=room(report["memory"]),
        rate=Rate(**found["attention"]),
        inside=inside,
        between=links["between"],
        inside_ring=links["inside_ring"],
        between_ring=links["between_ring"],
    )


def read_rates(path: Path) -> Cluster:
    """The cluster in a file that ``scripts/measure_rates.py`` has written.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, newer than this vsparse, or lacks a link.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; torchrun --nproc-per-node N scripts/measure_rates.py --out {path} writes one"
        )
    try:
        report = json.loads(path.read_text())
        version = report["format"]
        if isinstance(version, int) and version > FORMAT:
            raise ValueError(f"its format is {version}, and this vsparse reads {FORMAT}: a newer one has written it")
        return cluster_of(report)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: this file of rates is damaged, or none: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: this file of rates cannot be used: {error}") from error
