"""Cutting the tokens of a video where a root takes them in, and putting its output together again."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from vsparse.parallel.division import Division

from .hosts import Host

__all__ = ["attach"]


def attach(root: nn.Module, host: Host, division: Division) -> Callable[[], None]:
    """Hooks that follow ``division.cut``; returns their undo.

    Raises:
        NotImplementedError: the model cannot be cut.
    """
    against = "it is not known where this model takes its tokens in" if not host.cuts else host.undivided(root)
    if against is not None:
        raise NotImplementedError(f"context parallel: {type(root).__name__} cannot be divided: {against}")
    handles = []
    named = {name.replace("._orig_mod", ""): module for name, module in root.named_modules()}
    for place in host.cuts:
        for module in (x for name, x in named.items() if re.fullmatch(place.path, name)):
            if place.inputs:
                hook = _Inputs(division, place.inputs)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if place.output is not None:
                handles.append(module.register_forward_hook(_Output(division, place.output)))
    handles.append(named[host.joined].register_forward_hook(_Joined(division)))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


class _Inputs:
    def __init__(self, division: Division, inputs: Mapping[str, int]) -> None:
        self.division, self.inputs = division, inputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.division.cut is None:
            return None
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = list(args)
        kwargs = dict(kwargs)
        for name, dim in self.inputs.items():
            place = names.index(name) if name in names else len(given)
            if place < len(given):
                given[place] = _cut(self.division, given[place], dim)
            elif name in kwargs:
                kwargs[name] = _cut(self.division, kwargs[name], dim)
        return tuple(given), kwargs


class _Output:
    def __init__(self, division: Division, dim: int) -> None:
        self.division, self.dim = division, dim

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _cut(self.division, output, self.dim)


class _Joined:
    def __init__(self, division: Division) -> None:
        self.division = division

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        cut = self.division.cut
        return output if cut is None else cut.whole(output, 1)


def _cut(division: Division, value: Any, dim: int) -> Any:
    """A tensor, or each of a tuple, in the part of this process; what has fewer dimensions is no list of tokens."""
    if isinstance(value, tuple | list):
        return type(value)(_cut(division, x, dim) for x in value)
    if division.cut is None or not isinstance(value, Tensor) or value.ndim <= dim:
        return value
    return division.cut.take(value, dim)
