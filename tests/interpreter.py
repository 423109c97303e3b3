"""Triton's interpreter on the CPU, mended, and the Triton kernels behind the ops.

It shows indexing, masks, empty rows and ragged tails. It cannot show races, resources or speed, and its products are
rounded once, where a device accumulates in float32.

What triton 3.6.0 gets wrong: products of bfloat16 multiply the raw bits; rounding to bfloat16 truncates; with
numpy 2.4, ``range`` refuses a tensor. Arithmetic on bfloat16 without a cast stays wrong: kernels widen first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from vsparse import backend


def _wide(x: Any) -> Any:
    """A handle's numbers in float64."""
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.data.astype(np.float64)


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    total = np.matmul(_wide(a), _wide(b)) + d.data
    return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)


_convert = interpreter._convert_float


def _convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    if source == tl.bfloat16 and target == tl.float32:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return _convert(x, source, target, rounding)


_patch_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, *rest: Any) -> Any:
    result = _patch_tensor(tensor, *rest)
    tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])
    return result


interpreter.InterpreterBuilder.create_dot = _dot
interpreter._convert_float = _convert_float
interpreter._patch_lang_tensor = _patch_lang_tensor


@contextlib.contextmanager
def triton_kernels(*ops: str) -> Iterator[None]:
    """Let the Triton implementations of these ops (none named: all there are) serve CPU tensors, before all others."""
    served = backend.ops("cuda")
    assert not set(ops) - set(served)
    added = []
    try:
        for op in ops or served:
            for row in reversed(backend.implementations(op, "cuda")):  # the best one ends up first
                added.append((op, (1, row._replace(device="cpu"))))
                backend._TABLE[op].insert(0, added[-1][1])
        yield
    finally:
        for op, entry in added:
            backend._TABLE[op].remove(entry)
