"""Launch arguments: strides, leads of maps, sizes of tiles, and what no Triton kernel takes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from vsparse.layouts import Blocking

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_WIDTH = 256
OLDEST = 80  # compute capability: bfloat16 products and asynchronous copies
SMALLEST_TILE = 16  # the fewest rows and columns that a matrix product of Triton takes


class Width(NamedTuple):
    """Head dimension as one or two powers of two: 80 is 64 + 16, 96 is 64 + 32; others are padded with zeros.

    Args:
        D: Head dimension. D1, D2: columns of the two parts; D2 is 0 when one part will do.
    """

    D: int
    D1: int
    D2: int

    @classmethod
    def of(cls, d: int) -> Width:
        whole = max(SMALLEST_TILE, int(triton.next_power_of_2(d)))
        first = whole // 2
        second = max(SMALLEST_TILE, int(triton.next_power_of_2(d - first)))
        if d <= first or first < 64 or second >= first:
            return cls(d, whole, 0)
        return cls(d, first, second)


def tile_rows(block: int, most: int) -> int:
    """Rows of a tile for blocks of this many slots: a power of two, as few tiles as ``most`` allows."""
    return min(most, max(SMALLEST_TILE, int(triton.next_power_of_2(block))))


def strides(x: Tensor) -> tuple[int, int, int, int]:
    """``[B, S, H, D]`` -> strides in the order batch, head, slot, column."""
    return x.stride(0), x.stride(2), x.stride(1), x.stride(3)


def lanes(x: Tensor, batch: int, heads: int) -> tuple[Tensor, int, int]:
    """A map tensor ``[B|1, H|1, ...]`` with adjacent rows, and its strides over batch and heads (0: shared)."""
    x = x.contiguous()
    stride = x.expand(batch, heads, *x.shape[2:]).stride()
    return x, stride[0], stride[1]


def map_lanes(blocking: Blocking, batch: int, heads: int) -> tuple[Tensor, int, int, Tensor, int, int]:
    """Length and start of a blocking as `lanes`; the length stands in for a start that there is none of."""
    length = lanes(blocking.length, batch, heads)
    start = length if blocking.start is None else lanes(blocking.start, batch, heads)
    return (*length, *start)


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as in ``sm_90`` -> 90; 0 on other devices and under the interpreter."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_its_device(run: Callable[P, R]) -> Callable[P, R]:
    """Launch on the device of the first tensor among the arguments: Triton takes the current one instead."""

    @functools.wraps(run)
    def _guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(x for arg in args for x in (arg if isinstance(arg, list | tuple) else (arg,)) if x is not None)
        with torch.cuda.device(first.device) if first.device.type == "cuda" else contextlib.nullcontext():
            return run(*args, **kwargs)

    return _guarded


def reasons(*tensors: Tensor, width: int) -> list[str]:
    """Why these tensors cannot enter a Triton kernel; empty when they can."""
    found = [
        f"{dtype} is not among {', '.join(map(str, DTYPES))}"
        for dtype in sorted({x.dtype for x in tensors} - set(DTYPES), key=str)
    ]
    found += [
        f"compute capability {arch // 10}.{arch % 10} is older than {OLDEST // 10}.{OLDEST % 10}"
        for arch in sorted({architecture(x.device) for x in tensors})
        if 0 < arch < OLDEST
    ]
    if width > MOST_WIDTH:
        found.append(f"head_dim {width} is larger than {MOST_WIDTH}")
    return found
