"""Cutting the tokens of a video where a root takes them in, and putting its output together again."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vsparse.parallel.context import ContextParallel
from vsparse.parallel.division import Division

from .hosts import Host

__all__ = ["attach", "by_diffusers", "offer_plan", "withdraw_plan"]

_PLAN = "_cp_plan"


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
                hook = _Inputs(division, module, place.inputs)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if place.output is not None:
                handles.append(module.register_forward_hook(_Output(division, place.output)))
    handles.append(named[host.joined].register_forward_hook(_Joined(division)))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def by_diffusers(root: nn.Module) -> ContextParallel | None:
    """The division that `enable_parallelism` has made.

    Raises:
        NotImplementedError: tensor parallelism.
    """
    config: Any = root.__dict__.get("_parallel_config")
    if config is None:
        return None
    if getattr(config, "tensor_parallel_config", None) is not None:
        raise NotImplementedError(
            f"{type(root).__name__} is divided by diffusers' tensor parallelism, whose attention has other heads than "
            "the model says; share the video instead: vsparse.apply(..., parallel=ContextParallel(...))"
        )
    given = config.context_parallel_config
    return ContextParallel(ulysses=given.ulysses_degree, ring=given.ring_degree, mesh=given._mesh)


def offer_plan(root: nn.Module, host: Host) -> None:
    """Give a root that has no plan for `enable_parallelism` one, while it is patched.

    Without the patch it would be wrong: the stock attention of these models would count their text once for each
    process.
    """
    if host.plan is None or getattr(type(root), _PLAN, None) is not None or host.undivided(root) is not None:
        return
    try:
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
    except ImportError:  # older than context parallelism
        return
    root.__dict__[_PLAN] = host.plan(ContextParallelInput, ContextParallelOutput)


def withdraw_plan(root: nn.Module) -> None:
    """Take the plan away; a division that was made by it would be wrong from now on."""
    if root.__dict__.pop(_PLAN, None) is not None and root.__dict__.get("_parallel_config") is not None:
        warnings.warn(
            f"vsparse: {type(root).__name__} is still divided between processes by enable_parallelism, which its stock "
            "attention does not support: its output is wrong until it is patched again",
            stacklevel=2,
        )


# The last of them exchanges tensors, and under `torch.compile` a hook in a graph would be one more graph.
_uncompiled = torch.compiler.disable(reason="context parallel: tokens of several processes are cut and joined here")


class _Inputs:
    def __init__(self, division: Division, module: nn.Module, inputs: Mapping[str, int]) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.division = division
        self.inputs = [(name, names.index(name) if name in names else None, dim) for name, dim in inputs.items()]

    @_uncompiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.division.cut is None:
            return None
        given = list(args)
        kwargs = dict(kwargs)
        for name, place, dim in self.inputs:
            if place is not None and place < len(given):
                given[place] = _cut(self.division, given[place], dim)
            elif name in kwargs:
                kwargs[name] = _cut(self.division, kwargs[name], dim)
        return tuple(given), kwargs


class _Output:
    def __init__(self, division: Division, dim: int) -> None:
        self.division, self.dim = division, dim

    @_uncompiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _cut(self.division, output, self.dim)


class _Joined:
    def __init__(self, division: Division) -> None:
        self.division = division

    @_uncompiled
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
