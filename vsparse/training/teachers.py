"""The dense model that a sparse one is distilled from, without a second model where that is possible."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from vsparse.patch import Patch

__all__ = ["StartWeights", "plain", "still", "teaching", "with_weights"]


def plain(model: nn.Module) -> nn.Module:
    """The model that the loop has wrapped for several processes."""
    inner: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return inner


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Inside it nothing within the model is random (dropout is off), and nothing has a gradient.

    The flag of the model itself stays: a density ramp goes by it.
    """
    before = [module for module in model.modules() if module is not model and module.training]
    try:
        for module in before:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in before:
            module.training = True


@contextlib.contextmanager
def teaching(model: nn.Module, patch: Patch | None, start: StartWeights | None) -> Iterator[nn.Module]:
    """The dense teacher, to be called inside the block without gradients.

    Args:
        model: The student, as the loop has wrapped it. patch: what made it sparse, None: nothing.
        start: The weights of the teacher; None: those that the student has now.
    """
    inner = plain(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(still(inner))
        if patch is not None:
            stack.enter_context(patch.suspended())
        yield inner if start is None else stack.enter_context(start.put_back(inner))


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A model to call that computes with other tensors for some parameters of ``model``, which keeps its own.

    Raises:
        ValueError: the model is sharded, which puts its own parameters in their place again.
    """
    if not weights:
        return model
    if any(isinstance(x, DTensor) for x in model.parameters()):
        raise ValueError("a sharded model cannot compute with other weights than its own: let LoRA learn instead")
    return _With(model, weights)


class _With(nn.Module):
    """Has the model as ``module``, as DDP does: hosts look there for its dtype."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module, self._weights = model, dict(weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, with the other weights."""
        return functional_call(self.module, self._weights, args, kwargs)


class StartWeights:
    """The weights that training begins with, for a teacher that stays what it is while the student moves.

    Adapters of PEFT are switched off, and what a method has added does not run in a dense model, so LoRA and gates need
    no copy. Other parameters that learn do.

    Args:
        model: The transformer, before its first training step and not wrapped. patch: what made it sparse, or None.
        copy: Where to keep a copy of the model's own parameters that learn: "device" (where the model is, also when it
            moves) or "cpu" (and moved for each call). None: none may be made.

    Raises:
        ValueError: parameters of the model learn and ``copy`` is None; an adapter does not begin as nothing, or cannot
            tell.
    """

    def __init__(
        self, model: nn.Module, *, patch: Patch | None = None, copy: Literal["cpu", "device"] | None = None
    ) -> None:
        if copy not in (None, "cpu", "device"):
            raise ValueError(f"copy must be 'cpu', 'device' or None, got {copy!r}")
        adapters = _adapters(model)
        for name, layer in adapters.items():
            _check_nothing(name, layer)
        switched = {id(x) for layer in adapters.values() for part in _parts(layer) for x in part.parameters()}
        if patch is not None:
            switched |= {id(x) for site in patch.sites for x in site.parameters()}
        learning = {name: x for name, x in model.named_parameters() if x.requires_grad and id(x) not in switched}
        if learning and copy is None:
            size = sum(x.numel() * x.element_size() for x in learning.values()) / 2**30
            raise ValueError(
                f"{len(learning)} parameters of the model learn; to keep what they were takes {size:.2f} GiB: give "
                "copy='device' or copy='cpu', or let LoRA or the method's own parameters learn instead"
            )
        self._moves = copy == "device"
        self._kept = {
            name: x.detach().to("cpu" if copy == "cpu" else x.device, copy=True) for name, x in learning.items()
        }

    @contextlib.contextmanager
    def put_back(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with these weights, to be called inside the block; its own are not touched.

        Raises:
            ValueError: as of `with_weights`.
        """
        device = next(model.parameters()).device
        kept = {name: x.to(device) for name, x in self._kept.items()}
        if self._moves:
            self._kept = kept
        with _switched_off(model):
            yield with_weights(model, kept)


def _adapters(model: nn.Module) -> dict[str, Any]:
    """Layers of PEFT by name; known by what they have, so that PEFT need not be there."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")}


def _parts(layer: Any) -> list[nn.Module]:
    return [part for name in layer.adapter_layer_names if isinstance(part := getattr(layer, name), nn.Module)]


def _check_nothing(name: str, layer: Any) -> None:
    if not hasattr(layer, "get_delta_weight"):
        raise ValueError(f"{name}: {type(layer).__name__} cannot tell what it adds; known are LoRA's layers")
    with torch.no_grad():
        if any(bool(layer.get_delta_weight(adapter).any()) for adapter in layer.active_adapters):
            raise ValueError(
                f"{name}: its adapter is not nothing, so without it the model is not what training begins with"
            )


@contextlib.contextmanager
def _switched_off(model: nn.Module) -> Iterator[None]:
    """Without adapters; PEFT freezes what it switches off, and thaws more than was learning."""
    layers = _adapters(model).values()
    learning = [(x, x.requires_grad) for layer in layers for x in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for x, learns in learning:
            x.requires_grad_(learns)
