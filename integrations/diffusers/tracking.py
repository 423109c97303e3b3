"""Hearing where a diffusers pipeline stands: cache contexts, the scheduler, the end of a run, and saves."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from vsparse.runtime import Runtime
from vsparse.steps import Where

__all__ = ["DiffusersSteps", "Listener", "detach"]

logger = logging.getLogger("vsparse")


class DiffusersSteps:
    """Steps from `cache_context` where the pipeline passes them, else from the scheduler of the patched pipeline.

    Timesteps are not read (their scale differs per model) and calls are not counted (caches skip them).
    """

    def __init__(self, pipeline: object | None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self.contexts: dict[str, tuple[str, Any]] = {}
        self._timesteps: weakref.ref[Tensor] | None = None
        self._runs = 0

    def where(self, root: str) -> Where:
        """Where the next forward of a root stands."""
        branch, context = self.contexts.get(root, (None, None))
        step, steps = getattr(context, "step_index", None), getattr(context, "num_inference_steps", None)
        generation, advancing = None, True
        pipeline = None if self._pipeline is None else self._pipeline()
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if isinstance(timesteps, Tensor):
            if self._timesteps is None or self._timesteps() is not timesteps:
                self._timesteps, self._runs = weakref.ref(timesteps), self._runs + 1
            generation = ("scheduler", self._runs)
            if step is None:
                index = getattr(scheduler, "step_index", None)
                if not hasattr(scheduler, "step_index"):  # schedulers in the manner of DDIM keep no index
                    index = _place(getattr(pipeline, "current_timestep", None), timesteps)
                advancing = index is not None
                step = int(index if index is not None else getattr(scheduler, "begin_index", None) or 0)
            steps = len(timesteps) if steps is None else steps
        return Where(step=step, steps=steps, branch=branch, generation=generation, advancing=advancing)


def _place(timestep: object, timesteps: Tensor) -> int | None:
    """Index of the timestep that a pipeline took out of ``timesteps``: by where it lies in memory, no value is read."""
    if not isinstance(timestep, Tensor) or timestep.ndim or timesteps.ndim != 1:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)


class Listener:
    """Stands in for one method of one root: tells the runtime, then calls the root's own method.

    An instance attribute shadows the class's method and leaves no trace when it is deleted; unlike diffusers' hook
    registry it survives offloading and does not wrap ``forward``. In a deepcopy it listens for the copy.
    """

    names = ("cache_context", "_reset_stateful_cache", "save_pretrained")

    def __init__(self, module: nn.Module, runtime: Runtime, name: str) -> None:
        self.module, self.runtime, self.name = module, runtime, name
        functools.update_wrapper(self, getattr(type(module), name), updated=())

    @classmethod
    def attach(cls, module: nn.Module, runtime: Runtime) -> None:
        """Shadow the methods that the module has."""
        for name in cls.names:
            if hasattr(type(module), name):
                module.__dict__[name] = cls(module, runtime, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock = functools.partial(getattr(type(self.module), self.name), self.module)
        return {
            "cache_context": self._cache_context,
            "_reset_stateful_cache": self._reset,
            "save_pretrained": self._save,
        }[self.name](stock, *args, **kwargs)

    @contextlib.contextmanager
    def _cache_context(self, stock: Callable[..., Any], name: str, **kwargs: Any) -> Iterator[None]:
        source = self.runtime.tracker.source
        if not isinstance(source, DiffusersSteps):
            source = self.runtime.tracker.source = DiffusersSteps(None)
        root = self.runtime.name
        with stock(name, **kwargs):
            before = source.contexts.get(root)
            source.contexts[root] = (name, _Fields(kwargs))
            try:
                yield
            finally:
                if before is None:
                    source.contexts.pop(root, None)
                else:
                    source.contexts[root] = before

    def _reset(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.runtime.reset()
        return stock(*args, **kwargs)

    def _save(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        parts = [(self.module.get_submodule(site.site.name), site) for site in self.runtime.sites]
        left_out = sum(1 for _, site in parts for _ in site.parameters())
        for attention, _ in parts:
            attention._modules.pop("vsparse", None)
        try:
            out = stock(*args, **kwargs)
        finally:
            for attention, site in parts:
                attention._modules["vsparse"] = site
        if left_out:
            logger.warning(
                "save_pretrained left out %d tensors of the vsparse patch; patch.save(directory) writes them", left_out
            )
        return out


class _Fields:
    """Keyword arguments of a cache context as attributes; older releases pass none."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def detach(module: nn.Module) -> None:
    """Delete the shadows of a root, a copied one included."""
    for name in Listener.names:
        if isinstance(module.__dict__.get(name), Listener):
            del module.__dict__[name]
