"""A moving average of the weights that learn, beside the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["Average"]


class Average:
    """Exponential moving average of a model's learning parameters.

    After step n the decay is ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow's ExponentialMovingAverage: a young
    average is not held back by the first weights.

    Args:
        model: Its parameters that require gradients are averaged, in their dtype and sharding. decay: 0: no average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        named = [(name, x) for name, x in model.named_parameters() if x.requires_grad and decay > 0.0]
        self._parameters = dict(named)
        self.tensors: dict[str, Tensor] = {name: x.detach().clone() for name, x in named}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a 0-based step."""
        if self.tensors:
            weight = 1.0 - min(self.decay, (2 + step) / (11 + step))
            torch._foreach_lerp_(list(self.tensors.values()), list(self._parameters.values()), weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside it the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Give the model the averaged weights for good."""
        for name, x in self._parameters.items():
            x.copy_(self.tensors[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, x in self._parameters.items():
            kept = x.detach().clone()
            x.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
