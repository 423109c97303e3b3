"""Randomness of a training run: every draw follows from a key, so that nothing has to be remembered to resume."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Draws"]


@dc.dataclass(frozen=True)
class Draws:
    """Random numbers named by a key such as (seed, step, micro-batch, rank); equal keys draw equal numbers.

    Numbers are drawn on the CPU and moved, so that every device gets the same.
    """

    key: tuple[int | str, ...]

    def of(self, *more: int | str) -> Draws:
        """The draws of a longer key."""
        return Draws((*self.key, *more))

    def seed(self) -> int:
        """A 63-bit seed that follows from the key."""
        return int.from_bytes(hashlib.sha256(repr(self.key).encode()).digest()[:8]) >> 1

    def generator(self) -> torch.Generator:
        """A fresh CPU generator at the beginning of its numbers."""
        return torch.Generator().manual_seed(self.seed())

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape, dtype and device of a tensor."""
        noise = torch.randn(like.shape, generator=self.generator(), dtype=torch.float32)
        return noise.to(like.device, like.dtype)

    def uniform(self, count: int) -> Tensor:
        """``[count]`` float64 in [0, 1), on the CPU."""
        return torch.rand(count, generator=self.generator(), dtype=torch.float64)

    @contextlib.contextmanager
    def everything(self, device: torch.device) -> Iterator[None]:
        """Seed torch's global generators, for code that can draw from nothing else (dropout); put back afterwards."""
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(self.seed())
            yield
