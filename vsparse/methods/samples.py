"""Calibration samples: q, k and v of one attention call, and how far a map is from full attention on them."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence

import torch
from torch import Tensor

from vsparse import ops
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Blocking

__all__ = ["Sample", "alike", "attended", "distance"]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """What one attention call was given, in host order.

    Args:
        grid: The lattice. q, k, v: ``[B, N, H, D]``, N the tokens of the grid, of one dtype on one device.
        text_length: Valid text tokens ``[B]``; None: all are valid.

    Raises:
        ValueError: shapes that differ from each other or from the grid, dtypes or devices that differ.
    """

    grid: Grid
    q: Tensor
    k: Tensor
    v: Tensor
    text_length: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("q", "k", "v"):
            x = getattr(self, name)
            if x.ndim != 4 or x.shape[1] != self.grid.tokens or x.shape != self.q.shape:
                raise ValueError(
                    f"sample: {name} must be [B, N={self.grid.tokens}, H, D] for {self.grid} and q, k, v alike, "
                    f"got {tuple(x.shape)} beside q {tuple(self.q.shape)}"
                )
            if (x.dtype, x.device) != (self.q.dtype, self.q.device):
                raise ValueError(
                    f"sample: {name} must be {self.q.dtype} on {self.q.device} like q, got {x.dtype} on {x.device}"
                )


def alike(name: str, samples: Sequence[Sample]) -> Sample:
    """The first of some samples of one site.

    Raises:
        ValueError: there is none, or they differ in grid, heads, head dimension, dtype or device; ``name`` says for
            whom they are.
    """
    if not samples:
        raise ValueError(f"{name}: no calibration samples were given")
    first = samples[0]
    for sample in samples:
        if (sample.grid, sample.q.shape[2:]) != (first.grid, first.q.shape[2:]):
            raise ValueError(
                f"{name}: calibration samples must be of one shape, got {sample.grid} with [H, D] "
                f"{tuple(sample.q.shape[2:])} beside {first.grid} with {tuple(first.q.shape[2:])}"
            )
        if (sample.q.dtype, sample.q.device) != (first.q.dtype, first.q.device):
            raise ValueError(
                f"{name}: calibration samples must be of one dtype on one device, got {sample.q.dtype} on "
                f"{sample.q.device} beside {first.q.dtype} on {first.q.device}"
            )
    return first


def attended(sample: Sample, blocking: Blocking, blocks: BlockMap | None = None) -> Tensor:
    """``[B, S, H, D]``, block order: attention of a sample under a map, or full."""
    q, k, v = (blocking.pack(x) for x in (sample.q, sample.k, sample.v))
    return ops.block_sparse_attention(q, k, v, BlockMap.full(blocking) if blocks is None else blocks)[0]


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """``[H]`` float64: relative L1 distance ``sum |found - wanted| / sum |wanted|`` of ``[B, S, H, D]`` by head.

    A head that should be 0 everywhere, and is, has distance 0.
    """
    wide = wanted.double()
    size = wide.abs().sum((0, 1, 3)).clamp_min(torch.finfo(torch.float64).tiny)
    return (found.double() - wide).abs().sum((0, 1, 3)) / size
