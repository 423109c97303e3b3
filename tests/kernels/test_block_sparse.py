"""Triton kernels of block-sparse attention in the interpreter, by the law: lists, lengths, widths, every gradient."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter
import pytest
import torch
from kernel_cases import DTYPES, hold, make


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with interpreter.triton_kernels():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 4.0, 16.0])
def test_activation_scales(dtype: torch.dtype, size: float) -> None:
    hold(make(1, q=(3, 16), k=(4, 16), dtype=dtype, size=size))
