"""What a piece of training holds and computes: bytes of live tensors and FLOPs, with values or without."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vsparse.methods import SparseAttention

__all__ = ["PARTS", "Meter", "full_attention"]

PARTS = ("layers", "attention", "method")
BACKWARD = 2.5  # five products for the two of the forward: the logits are computed once more


class Meter(TorchDispatchMode):
    """Counts whatever runs inside it, in this thread; under FakeTensor as with values, to the byte.

    Attributes:
        alive: Bytes of the tensors that were made inside and still exist. peak: the most of them at once. What an
            operator needs for itself, and what an allocator adds, is not seen.
        flops: By part, two for each multiplication and addition of a product. "attention": logits and values of full
            and sparse attention; the sparse one by the density that its method predicts. "method": what a method adds,
            such as scores, gates and predictors. "layers": everything else. Recomputation counts.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self.flops = dict.fromkeys(PARTS, 0.0)
        self._bytes: dict[int, int] = {}
        self._collects = True
        self._part = "layers"

    def __enter__(self) -> Meter:
        """Garbage waits until the end: what a collection in between would free is chance."""
        gc.collect()
        self._collects = gc.isenabled()
        gc.disable()
        return super().__enter__()  # type: ignore[no-untyped-call, no-any-return]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._collects:
            gc.enable()

    @contextlib.contextmanager
    def tidy(self) -> Iterator[None]:
        """Around a forward: what a collection finds after it, such as twins of constants, counts for nothing."""
        before = self.peak
        yield
        held = self.alive
        gc.collect()
        if self.peak > before:
            self.peak = max(before, self.peak - (held - self.alive))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:  # views are of what is there already
                self._note(x.untyped_storage())
        name = func._schema.name
        if "_scaled_dot_product_" in name:
            self.flops["attention"] += full_attention(args, backward=name.endswith("_backward"))
        elif func._overloadpacket in flop_registry:
            self.flops[self._part] += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self.alive += self._bytes[key]
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self._bytes.pop(key)

    # ---- sparse attention -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def at(self, sites: Iterable[SparseAttention]) -> Iterator[None]:
        """Tell the attention of some sites, and what their method adds, from the layers around them."""
        handles = []
        for site in sites:
            handles += [site.register_forward_pre_hook(self._enter), site.register_forward_hook(self._leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, site: SparseAttention, inputs: tuple[Tensor, ...]) -> None:
        assert site.call is not None
        layout, (batch, _, heads, width) = site.call.layout, inputs[0].shape
        with _disable_current_modes():  # a pattern counts its blocks, which are values
            density = site.method.predicted_density(layout, site.site)
        flops = 4.0 * batch * heads * layout.slots**2 * width * density
        self.flops["attention"] += flops
        self._part = "method"
        learning = [x for x in inputs if x.requires_grad]
        if learning:

            def _passed(_: Tensor) -> None:
                self.flops["attention"] += BACKWARD * flops
                self._part = "layers"

            learning[0].register_hook(_passed)

    def _leave(self, site: SparseAttention, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        self._part = "layers"
        if out.requires_grad:
            out.register_hook(self._enter_backward)

    def _enter_backward(self, _: Tensor) -> None:
        self._part = "method"


def full_attention(args: Any, *, backward: bool) -> float:
    """FLOPs of a fused full attention over ``[B, H, N, D]``; the backward is given the gradient first."""
    q, k = args[1:3] if backward else args[:2]
    flops: float = 4.0 * q.shape[:-1].numel() * k.shape[-2] * q.shape[-1]
    return flops * BACKWARD if backward else flops
