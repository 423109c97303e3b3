"""by_layer: a method for each range of layers."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Layout
from vsparse.methods import get_method
from vsparse.methods.base import Method, Paper, Site, SparseAttention
from vsparse.methods.dense import Dense
from vsparse.patterns import Pattern
from vsparse.schedule import Phase, Schedule

__all__ = ["ByLayer", "PartSchedules"]


class PartSchedules(Schedule):
    """No schedule was given: every part follows its own. Unequal to any that was, ``Schedule()`` included."""

    def __init__(self) -> None:
        super().__init__()

    def __repr__(self) -> str:
        return "those of the parts"


@dc.dataclass(frozen=True, kw_only=True)
class ByLayer(Method):
    """Methods put together by layers.

    Args:
        parts: Range of layers and `Method` (or registry key, or key and options), as a mapping or as pairs:
            ``{"0-9": VSA(density=0.1), "10-": "sta"}``. A range is a layer ("3"), the first and the last one ("0-9") or
            the first one ("10-"); layers are counted over all stacks of a model. Layers in no range run dense.

    Schedule: every part follows its own published one; a schedule that is given to ``apply`` holds for all parts, but
    never makes a dense part sparse.
    """

    key: ClassVar[str] = "by_layer"
    paper: ClassVar[Paper] = Paper(title="a method for each range of layers", arxiv="", trained=False)
    advice: ClassVar[str] = (
        "Layers differ: early ones that want more, or a trained method on some and a pattern on others."
    )
    chooses: ClassVar[bool] = False
    default_schedule: ClassVar[Schedule] = PartSchedules()

    parts: tuple[tuple[str, Method], ...] = ()

    def __post_init__(self) -> None:
        given: Any = self.parts
        pairs = list(given.items()) if isinstance(given, Mapping) else given
        if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not all(len(pair) in (2, 3) for pair in pairs):
            raise ValueError(f"by_layer: parts must be a mapping of ranges to methods, got {given!r}")
        parts = tuple((str(pair[0]), _method(*pair[1:])) for pair in pairs)
        taken: dict[int, str] = {}
        for text, _ in parts:
            first, last = _range(text)
            for layer in range(first, (first if last is None else last) + 1):
                if layer in taken or any(_inside(layer, other) for other, _ in parts if other != text):
                    raise ValueError(f"by_layer: layer {layer} is in two ranges of {[text for text, _ in parts]}")
                taken[layer] = text
        object.__setattr__(self, "parts", parts)

    @classmethod
    def joined(cls, methods: Sequence[Method]) -> ByLayer:
        """Of a method for each layer, from the first: layers one after the other with equal ones are one range."""
        starts = [i for i, method in enumerate(methods) if i == 0 or method != methods[i - 1]]
        ends = [*starts[1:], len(methods)]
        names = [f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in zip(starts, ends, strict=True)]
        return cls(parts=tuple((name, methods[a]) for name, a in zip(names, starts, strict=True)))

    def _part(self, layer: int) -> Method:
        return next((method for text, method in self.parts if _inside(layer, text)), Dense())

    def of(self, site: Site) -> Method:
        """The part of the site's layer."""
        return self._part(site.layer)

    def _schedule(self, part: Method, schedule: Schedule) -> Schedule:
        own = isinstance(schedule, PartSchedules) or part.default_schedule.dense_steps >= 1.0
        return part.default_schedule if own else schedule

    def needs_steps(self, schedule: Schedule) -> bool:
        """Whether any part does."""
        return any(part.needs_steps(self._schedule(part, schedule)) for _, part in self.parts)

    def phase(
        self,
        schedule: Schedule,
        *,
        step: int | None,
        steps: int | None,
        layer: int,
        filled: bool,
        stamp: int | None = None,
    ) -> Phase:
        """That of the layer's part."""
        part = self._part(layer)
        own = self._schedule(part, schedule)
        return part.phase(own, step=step, steps=steps, layer=layer, filled=filled, stamp=stamp)

    def layout(self, grid: Grid, site: Site) -> Layout:
        """That of the site's part."""
        return self.of(site).layout(grid, site)

    def build(self, site: Site) -> SparseAttention:
        """The module of the site's part."""
        return self.of(site).build(site)

    def static_pattern(self, site: Site) -> Pattern | tuple[Pattern, ...] | None:
        """That of the site's part."""
        return self.of(site).static_pattern(site)

    def static_map(self, layout: Layout, site: Site) -> BlockMap | None:
        """That of the site's part."""
        return self.of(site).static_map(layout, site)

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """That of the site's part."""
        return self.of(site).predicted_density(layout, site)

    def state(
        self, layout: Layout, site: Site, batch: int, dtype: torch.dtype
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """That of the site's part."""
        return self.of(site).state(layout, site, batch, dtype)

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """That of the site's part."""
        return self.of(site).search_flops(layout, site, batch, phase)

    def options(self) -> dict[str, Any]:
        """Ranges, keys and options."""
        return {"parts": tuple((text, part.key, part.options()) for text, part in self.parts)}


def _method(given: Any, options: Mapping[str, Any] | None = None) -> Method:
    if isinstance(given, list | tuple) and len(given) == 2 and options is None:
        given, options = given
    method = get_method(given)() if isinstance(given, str) else given
    if not isinstance(method, Method) or isinstance(method, ByLayer):
        raise ValueError(f"by_layer: a part must be a Method, a registry key or a key and options, got {given!r}")
    return method.replace(**{name: _tuple(value) for name, value in (options or {}).items()})


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _range(text: str) -> tuple[int, int | None]:
    """First and last layer; None: to the end."""
    first, dash, last = text.replace(" ", "").partition("-")
    good = first.isdigit() and (not dash or not last or (last.isdigit() and int(last) >= int(first)))
    if not good:
        raise ValueError(f'by_layer: a range of layers is "3", "0-9" or "10-", got {text!r}')
    return int(first), int(last) if last else (None if dash else int(first))


def _inside(layer: int, text: str) -> bool:
    first, last = _range(text)
    return first <= layer and (last is None or layer <= last)
