"""Private randomness: numbers that follow from a salt, the denoising step and a count, and from nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["integers", "salt", "spread"]

# Odd numbers with evenly spread bits, one for each thing that is counted.
_ROW, _STEP, _LAYER, _SEED = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7, 0xA24BAED4963EE407
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # the finaliser of SplitMix64


def _signed(x: int) -> int:
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def salt(seed: int, layer: int) -> Tensor:
    """0-d int64: what sets one layer and seed apart from the others; keep it as a buffer, not as a number."""
    return torch.tensor(_signed(seed * _SEED + (layer + 1) * _LAYER))


def integers(count: int, *, salt: Tensor, step: Tensor) -> Tensor:
    """``[count]`` int64, evenly spread over 0 to 2^31 - 1, the same for equal arguments on every device.

    Args:
        salt: 0-d int64 from `salt`. step: 0-d int64.
    """
    x = torch.arange(1, count + 1, device=salt.device) * _signed(_ROW) + step * _signed(_STEP) + salt
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return (x >> 33) & (2**31 - 1)


def spread(count: int, total: int, *, salt: Tensor, step: Tensor) -> Tensor:
    """``[min(count, total)]`` int64, ascending: one of ``range(total)`` from each of as many equal parts.

    Args:
        salt, step: As in `integers`.
    """
    count = min(count, total)
    edge = torch.arange(count + 1, device=salt.device) * total // count
    return edge[:-1] + integers(count, salt=salt, step=step) % (edge[1:] - edge[:-1])
