"""What choosing a map costs on this machine, as a share of the sparse attention that the map leaves."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from vsparse import ops
from vsparse.geometry import Grid
from vsparse.layouts import Blocking
from vsparse.measure.recall import driven
from vsparse.measure.synthetic import structured_sample
from vsparse.methods import SparseAttention, get_method
from vsparse.methods.samples import Sample
from vsparse.optional import require

__all__ = ["GRID", "Cost", "Watch", "selection_cost", "selection_summary", "selection_table", "watched"]

GRID = Grid(t=8, h=32, w=32)

# Methods that choose by pooled scores. Where the budget is a mass, it is sought so that the density comes out.
_LINES: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "vsa": ("vsa", {}, ""),
    "nabla": ("nabla", {"window": (3, 1, 1)}, "mass"),
    "sparge, mass": ("sparge", {"similarity": 0.01}, "mass"),
    "sparge, density": ("sparge", {"select": "density"}, ""),
    "sla": ("sla", {}, ""),
    "draft": ("draft", {}, ""),
    "jenga": ("jenga", {"mass": 0.01}, ""),
}


@dc.dataclass(frozen=True, kw_only=True)
class Cost:
    """Medians of one line in ms: choosing the map (scores to lists, packing aside), packing q, k and v, attention.

    ``density`` is what the map keeps.
    """

    line: str
    density: float
    select: float
    pack: float
    attend: float

    @property
    def share(self) -> float:
        """Choosing over attending."""
        return self.select / self.attend


class Watch:
    """Seconds of the calls of attention sites: choosing their maps, packing before the attention, attending."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.select = self.pack = self.attend = 0.0
        self.mark: float | None = None

    def begin(self) -> None:
        """A call begins: until its attention does, all but packing is choosing."""
        self.mark = self.clock()


@contextlib.contextmanager
def watched(sites: Iterable[SparseAttention] = (), clock: Callable[[], float] = time.perf_counter) -> Iterator[Watch]:
    """Clocks in the ops that methods call.

    Args:
        sites: Whose calls begin by themselves. clock: seconds; on a GPU one that waits for the device.
    """
    attend, pack = ops.host_order_attention, Blocking.pack
    watch = Watch(clock)

    def _timed_attention(*args: Any, **options: Any) -> Any:
        start = clock()
        if watch.mark is not None:
            watch.select += start - watch.mark
        watch.mark = None
        found = attend(*args, **options)
        watch.attend += clock() - start
        return found

    def _timed_pack(self: Blocking, x: torch.Tensor) -> torch.Tensor:
        start = clock()
        found = pack(self, x)
        if watch.mark is not None:
            spent = clock() - start
            watch.pack, watch.mark = watch.pack + spent, watch.mark + spent
        return found

    ops.host_order_attention, Blocking.pack = _timed_attention, _timed_pack  # type: ignore[method-assign]
    handles = [site.register_forward_pre_hook(lambda *_: watch.begin()) for site in sites]
    try:
        yield watch
    finally:
        ops.host_order_attention, Blocking.pack = attend, pack  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()


class _Line:
    """One method on one sample, its budget set for a density."""

    def __init__(self, name: str, sample: Sample, density: float) -> None:
        key, options, sought = _LINES[name]
        self.name, self.sample = name, sample
        self.options = {**options, **({} if sought else {"density": density})}
        self.key = key
        low, high = 1e-4, 1.0
        for _ in range(10 if sought else 0):
            middle = (low * high) ** 0.5
            self.options[sought] = middle
            self._build()
            self.once()
            low, high = (middle, high) if self.density < density else (low, middle)
        self._build()
        self.once()

    def _build(self) -> None:
        self.module, self.call = driven(get_method(self.key)(**self.options), self.sample)
        self.module.phase = "search"

    @property
    def density(self) -> float:
        computed, possible = self.module.state.staged["pairs"].tolist()
        return float(computed / possible)

    def once(self) -> tuple[float, float, float]:
        """Seconds of choosing, packing, attending."""
        sample = self.sample
        with torch.no_grad(), watched() as watch:
            watch.begin()
            self.module.core(sample.q, sample.k, sample.v, None, self.call)
        return watch.select, watch.pack, watch.attend


def selection_cost(
    lines: Sequence[str] = tuple(_LINES),
    *,
    grid: Grid = GRID,
    heads: int = 4,
    width: int = 64,
    density: float = 0.1,
    rounds: int = 9,
) -> list[Cost]:
    """Time all lines in turn, ``rounds`` times, on one structured sample in float32; medians count.

    Args:
        lines: Names. grid, heads, width: of the sample. density: wanted; windows and touching blocks may keep more.
    """
    sample = structured_sample(grid, heads=heads, width=width)
    made = [_Line(name, sample, density) for name in lines]
    taken = [[line.once() for line in made] for _ in range(rounds)]
    found = []
    for i, line in enumerate(made):
        select, pack, attend = (median(column) * 1e3 for column in zip(*(turn[i] for turn in taken), strict=True))
        found.append(Cost(line=line.name, density=line.density, select=select, pack=pack, attend=attend))
    return found


def selection_table(costs: Sequence[Cost]) -> Any:
    """The figures as a rich table."""
    table = require("rich.table", "cli").Table(title="choosing a map, as a share of the attention that is left")
    for column in ("line", "density", "choose ms", "pack ms", "attend ms", "choose / attend"):
        table.add_column(column, justify="left" if column == "line" else "right")
    for cost in costs:
        figures = [f"{cost.density:.3f}", *(f"{x:.1f}" for x in (cost.select, cost.pack, cost.attend))]
        table.add_row(cost.line, *figures, f"{cost.share:.1%}")
    return table


def selection_summary(costs: Sequence[Cost]) -> dict[str, dict[str, float]]:
    """What the documents show."""
    return {
        cost.line: {
            "density": round(cost.density, 3),
            "choose_ms": round(cost.select, 2),
            "attend_ms": round(cost.attend, 1),
            "share": round(cost.share, 3),
        }
        for cost in costs
    }
