"""The map that a method chooses for a sample, without the attention over it: maps of full size in seconds on a CPU."""

from __future__ import annotations

import contextlib

import torch

from vsparse.blocks import BlockMap
from vsparse.measure.recall import driven
from vsparse.methods import Method
from vsparse.methods.samples import Sample

__all__ = ["chosen_map"]


class _Found(Exception):  # noqa: N818
    """Ends a call where its map is known."""


def chosen_map(method: Method, sample: Sample, *, layer: int = 0) -> BlockMap:
    """What a method chooses, in a call that searches; the first map of several.

    Args:
        method: What selects. sample: q, k and v of one call. layer: for methods that differ by layer.

    Raises:
        ValueError: a method whose search is exact attention. NotImplementedError: one that only runs dense.
    """
    if "search" in method.exact_phases:
        raise ValueError(f"chosen_map: method must choose before it attends, but {method.key!r} searches by attending")
    module, call = driven(method, sample, layer=layer)
    found: list[BlockMap] = []

    def tally(blocks: BlockMap, *_: object) -> None:
        found.append(blocks)
        raise _Found

    module.tally = tally  # type: ignore[assignment, method-assign]
    module.phase = "search"
    with torch.no_grad(), contextlib.suppress(_Found):
        module.core(sample.q, sample.k, sample.v, None, call)
    assert found, f"{method.key!r} made no sparse call"
    return found[0]
