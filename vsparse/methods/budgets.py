"""Densities that methods take: one number, or one for each head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Density", "as_tensor", "check_densities", "check_density", "each", "highest", "mean_of"]

Density = float | tuple[float, ...]
"""Share of what may be computed, in (0, 1]: of all heads of a layer, or one number per head."""


def check_density(name: str, value: float) -> None:
    """Refuse a density outside (0, 1], NaN included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")


def check_densities(name: str, value: Density) -> Density:
    """A density, or one for each head, lists as tuples.

    Raises:
        ValueError: one of them outside (0, 1], or none at all.
    """
    if not isinstance(value, tuple | list):
        check_density(name, value)
        return value
    if not value:
        raise ValueError(f"{name} must be a number in (0, 1] or a tuple with one per head, got {value!r}")
    for number in value:
        check_density(name, number)
    return tuple(value)


def each(density: Density) -> tuple[float, ...]:
    """The numbers: one, or as many as heads."""
    return density if isinstance(density, tuple) else (density,)


def highest(density: Density) -> float:
    """The greatest: what the lists of a map must hold."""
    return max(each(density))


def mean_of(density: Density, share: Callable[[float], float] = float) -> float:
    """Mean over the heads of what a density comes to.

    Args:
        share: From the density of a head to its share.
    """
    numbers = each(density)
    return sum(map(share, numbers)) / len(numbers)


def as_tensor(density: Density, device: torch.device | None = None) -> Tensor:
    """0-d float64, or ``[H]``. float32 would round 0.1 up and keep one block too many."""
    return torch.tensor(density, dtype=torch.float64, device=device)
