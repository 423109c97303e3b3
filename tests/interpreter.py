"""Triton's interpreter on the CPU, mended, and the Triton kernels behind the ops.

It shows indexing, masks, empty rows and ragged tails. It cannot show races, resources or speed, and its products are
rounded once, where a device accumulates in float32.

What triton 3.6.0 gets wrong: products of bfloat16 multiply the raw bits; rounding to bfloat16 truncates; with
numpy 2.4, ``range`` refuses a tensor. Arithmetic on bfloat16 without a cast stays wrong: kernels widen first.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import os
import types
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


# ---- what takes most of the interpreter's time, and need not ---------------------------------------------------------

_patch_lang = interpreter._patch_lang
_original_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, Any] = {}
_BOTH = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # ours see the one, Triton's own functions both


class _Language:
    """The language as the interpreter wants it, for one launch.

    Triton looks through the whole language at each launch and each call of a device function, to find what it found
    before. Here that is done once; a call inside a launch finds everything in place.
    """

    found: list[tuple[Any, str, Any, Any]] | None = None
    launched = False

    def __init__(self, _: Any) -> None:
        self.outermost = not _Language.launched
        if not self.outermost:
            return
        if _Language.found is None:
            scope = _patch_lang(_BOTH)
            first: dict[tuple[int, str], tuple[Any, Any]] = {}
            for owner, name, stock in scope._changes:
                first.setdefault((id(owner), name), (owner, stock))
            _Language.found = [(owner, x, stock, getattr(owner, x)) for (_, x), (owner, stock) in first.items()]
            scope.restore()
        _Language.launched = True
        for owner, name, _, value in _Language.found:
            setattr(owner, name, value)

    def restore(self) -> None:
        if not self.outermost:
            return
        assert _Language.found is not None
        for owner, name, stock, _ in _Language.found:
            if stock is interpreter._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, stock)
        _Language.launched = False


def _get_np_dtype(kind: Any) -> Any:
    """Triton builds its table anew for each answer."""
    name = kind.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _original_np_dtype(kind.scalar)
    return _np_dtypes[name]


_block_type, _tensor = tl.block_type.__init__, tl.tensor.__init__
_blocks: dict[Any, dict[str, Any]] = {}
_shapes: dict[str, dict[str, Any]] = {}


def _block_type_once(self: Any, element_ty: Any, shape: Any) -> None:
    """The fields of a type follow from its arguments, and there are few."""
    sizes = shape.value if isinstance(shape, tl.constexpr) else shape
    key = element_ty.name, tuple(x.value if isinstance(x, tl.constexpr) else x for x in sizes)
    if key not in _blocks:
        _block_type(self, element_ty, shape)
        _blocks[key] = dict(vars(self))
    vars(self).update(_blocks[key])


def _tensor_once(self: Any, handle: Any, type: Any) -> None:  # noqa: A002 (Triton's name)
    """What a tensor knows of its shape follows from its type."""
    if type.name not in _shapes:
        _tensor(self, handle, type)
        _shapes[type.name] = {name: value for name, value in vars(self).items() if name != "handle"}
    vars(self).update(_shapes[type.name], handle=handle)


tl.block_type.__init__, tl.tensor.__init__ = _block_type_once, _tensor_once
interpreter._patch_lang = _Language
interpreter._get_np_dtype = _get_np_dtype
# Whether integers overflow is worked out for each sum and product, but told to nobody: asserts are off.
assert not interpreter.interpreter_builder.options.debug
interpreter.interpreter_builder.options = dc.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


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
