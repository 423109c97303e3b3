"""What each part computes and moves: a timeline whose clock counts operators instead of seconds."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vsparse.measure.latency.profiler import profiled
from vsparse.measure.latency.timeline import Timeline
from vsparse.measure.meter import full_attention
from vsparse.patch import Patch

__all__ = ["Work", "counting"]


@dc.dataclass(frozen=True, kw_only=True)
class Work:
    """Of one part.

    Args:
        products: FLOPs of matrix products and convolutions. attention: of fused full attention.
        moved: Bytes that operators without products read and write. touched: the same of all operators.
        calls: Operators, views aside.
    """

    products: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    touched: float = 0.0
    calls: float = 0.0

    @property
    def flops(self) -> float:
        """Products and attention."""
        return self.products + self.attention

    def times(self, factor: float) -> Work:
        """As often."""
        return Work(**{name: value * factor for name, value in dc.asdict(self).items()})


class _Counter(TorchDispatchMode):
    """Adds up what operators do in this thread; inside of our own ops it does not look."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = dict.fromkeys((field.name for field in dc.fields(Work)), 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        held = {x.untyped_storage()._cdata for x in given}
        changed = func._schema.is_mutable
        if not changed and all(x.untyped_storage()._cdata in held for x in made):
            return out  # a view
        size = float(sum(x.nbytes for x in (*given, *made)))
        self.work["calls"] += 1.0
        self.work["touched"] += size
        if "_scaled_dot_product_" in func._schema.name:
            self.work["attention"] += full_attention(args, backward=False)
        elif func._overloadpacket in flop_registry:
            self.work["products"] += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        else:
            self.work["moved"] += size
        return out


class _Reading:
    """A clock that reads a counter."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.mark = self.now = read

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """What was added between each mark and the next."""
        return [b - a for a, b in itertools.pairwise(marks)]


@contextlib.contextmanager
def counting(target: Any, patch: Patch | None = None) -> Iterator[dict[str, Work]]:
    """Count what a pipeline or transformer runs inside the block, by part; it is slow.

    Yields:
        Filled when the block ends.
    """
    counter, found = _Counter(), dict[str, Work]()

    def reading(name: str) -> Callable[[], float]:
        return lambda: counter.work[name]

    with contextlib.ExitStack() as stack:
        timelines = {name: Timeline(_Reading(reading(name))) for name in counter.work}
        for timeline in timelines.values():
            stack.enter_context(profiled(target, timeline, patch))
        with counter:
            yield found
    spans = {name: timeline.end() for name, timeline in timelines.items()}
    for part in dict.fromkeys(span.part for one in spans.values() for span in one):
        total = {name: sum(x for span, x in one.items() if span.part == part) for name, one in spans.items()}
        found[part] = Work(**total)
