"""The mended interpreter: what it sets for a launch goes with it, and what it keeps is what Triton would make anew."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

FOUND = [
    (tl, "range"),
    (tl, "load"),
    (tl.core, "reduce"),
    (tl.tensor, "__add__"),
    (tl.tensor, "T"),
    (tl.dtype, "to_ir"),
]


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _sums(x, out, fails: tl.constexpr, n: tl.constexpr):
    total = tl.zeros([n], tl.float32)
    for i in range(2):
        total += _twice(tl.load(x + i * n + tl.arange(0, n)))
    tl.static_assert(not fails)
    tl.store(out, tl.sum(total, 0))


def language() -> list[Any]:
    return [vars(owner).get(name) for owner, name in FOUND]


@pytest.mark.parametrize("fails", [False, True])
def test_a_launch_leaves_the_language_as_it_was(fails: bool) -> None:
    x, out = torch.arange(8.0), torch.zeros(1)
    _sums[(1,)](x, out, False, 4)
    assert out.item() == 2 * x.sum()
    before = language()
    if fails:
        with pytest.raises(InterpreterError):
            _sums[(1,)](x, out, True, 4)
    else:
        _sums[(1,)](x, out, False, 4)
    assert all(a is b for a, b in zip(language(), before, strict=True))
    assert not interpreter._Language.launched


@pytest.mark.parametrize("element", [tl.float32, tl.int64, tl.pointer_type(tl.bfloat16)], ids=str)
@pytest.mark.parametrize("shape", [[4], [4, 8]], ids=str)
def test_types_and_tensors_are_those_of_triton(element: Any, shape: list[int]) -> None:
    stock = object.__new__(tl.block_type)
    interpreter._block_type(stock, element, shape)
    for _ in range(2):
        found = tl.block_type(element, [tl.constexpr(n) for n in shape])
        assert (found, found.numel, found.name, found.shape) == (stock, stock.numel, stock.name, stock.shape)
        assert interpreter._get_np_dtype(found) == interpreter._original_np_dtype(stock)
        tensor, other = object.__new__(tl.tensor), tl.tensor("handle", found)
        interpreter._tensor(tensor, "handle", stock)
        assert vars(other).keys() == vars(tensor).keys()
        assert (other.handle, other.type, other.dtype) == ("handle", stock, stock.scalar)
        assert [n.value for n in other.shape] == shape
        assert other.numel.value == tensor.numel.value
