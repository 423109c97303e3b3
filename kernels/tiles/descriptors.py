"""Tensor descriptors, by which Hopper and later copy whole tiles (TMA): what they take, and how they are made."""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from torch import Tensor

from .host import architecture

__all__ = ["described", "undescribed"]

OLDEST = 90  # compute capability
TRITON = (3, 6)  # the first whose code was looked at
ALIGNED = 16  # bytes
LONGEST = 2**40  # bytes of a stride
ORDER = (("samples", 0), ("heads", 2), ("slots", 1))


def undescribed(tensors: dict[str, Tensor]) -> list[str]:
    """Why there can be no descriptors of these tensors ``[B, S, H, D]``; empty when there can. The words name them."""
    version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
    found = [] if version >= TRITON else [f"triton {triton.__version__} is older than {TRITON[0]}.{TRITON[1]}"]
    found += [
        f"compute capability {arch // 10}.{arch % 10} has no tensor descriptors, 9.0 is the first"
        for arch in sorted({architecture(x.device) for x in tensors.values()})
        if 0 < arch < OLDEST
    ]
    if torch.version.hip is not None:
        found.append("AMD devices have no tensor descriptors")
    for name, x in tensors.items():
        found += [f"{name}: {words}" for words in _against(x)]
    return found


def _against(x: Tensor) -> list[str]:
    if x.numel() == 0:
        return ["it is empty"]
    found, size = [], x.element_size()
    if x.shape[3] > 1 and x.stride(3) != 1:
        found.append(f"columns are {x.stride(3)} elements apart, a descriptor needs adjacent ones")
    for name, axis in ORDER:
        step = x.stride(axis) * size
        if x.shape[axis] > 1 and (step % ALIGNED or not 0 < step < LONGEST):
            found.append(f"{name} are {step} bytes apart, a descriptor needs a positive multiple of {ALIGNED}")
    if x.data_ptr() % ALIGNED:
        found.append(f"its memory does not start at a multiple of {ALIGNED} bytes")
    return found


def described(x: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of ``[B, S, H, D]`` where it lies: dimensions batch, head, slot, column, tiles of rows and columns.

    `undescribed` has found nothing. The strides of dimensions of one element may be anything and are replaced.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor  # not in old versions, which `undescribed` tells

    step = ALIGNED // x.element_size()
    steps = [x.stride(axis) if x.shape[axis] > 1 else 0 for _, axis in ORDER]
    spare = max(*steps, -(-x.shape[3] // step) * step)
    return TensorDescriptor(
        x, [x.shape[axis] for _, axis in ORDER] + [x.shape[3]], [each or spare for each in steps] + [1],
        [1, 1, rows, columns],
    )  # fmt: skip
