"""The forward with tensor descriptors, which no launch takes by itself until it is measured: forced, or why not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch import Tensor

from vsparse import BlockMap

VARIANT = "descriptors"  # of a case to check


@contextlib.contextmanager
def forced() -> Iterator[None]:
    """Let the launcher take descriptors where the tensors have them."""
    from vsparse.kernels.block_sparse import launch

    shipped = launch.config
    with mock.patch.object(launch, "config", lambda *sizes: shipped(*sizes[:6], True)):
        yield


def against(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap) -> str:
    """Why the forward would not take them though `forced`; "" when it would."""
    if q.device.type != "cuda":
        return "needs a CUDA device"
    from vsparse.kernels.block_sparse import launch

    with forced():
        return "" if launch.chosen_for(q, k, v, blocks).tma else "; ".join(launch.notes(q, k, v, blocks, scale=1.0))
