"""What a method makes of one layer, without the attention over it: maps of full size in seconds on a CPU."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Iterator, Sequence

import torch

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import RasterLayout
from vsparse.measure.recall import driven
from vsparse.measure.synthetic import structured_sample
from vsparse.methods import Method, Site, SparseAttention
from vsparse.methods.budgets import mean_of
from vsparse.methods.pattern import StaticMethod
from vsparse.methods.samples import Sample
from vsparse.parallel.planner import Attention

__all__ = ["GAINS", "chosen_map", "fixed_map", "layer_attention", "made_samples", "pooled_map"]

GAINS = (2.8, 1.0, 8.0)
"""By which the queries of the portions of `made_samples` are multiplied."""

_PORTION = 4  # heads that are made and searched at a time: local, periodic in time, global, mixed
_WIDTH = 32  # of the heads that are made; the choice of blocks does not need all 128
_EVERY_KEY = frozenset({"xattention"})  # methods whose every choice reads all keys of the other shards, not their means


class _Found(Exception):  # noqa: N818
    """Ends a call where its map is known."""


def made_samples(grid: Grid, *, gains: Sequence[float] = GAINS, seed: int = 0) -> Iterator[Sample]:
    """Heads of `structured_sample` on a grid, four to a sample: local, periodic in time, global, mixed.

    Args:
        gains: Of the queries, one for each sample: greater ones make sharper attention. seed: of the first sample.
    """
    for i, gain in enumerate(gains):
        sample = structured_sample(grid, heads=_PORTION, width=_WIDTH, seed=seed + i)
        yield dc.replace(sample, q=sample.q * gain)


def fixed_map(method: Method, grid: Grid, site: Site) -> BlockMap | None:
    """The map of a method that follows from the grid alone: its own, or all blocks; None where the data decides."""
    if isinstance(method, StaticMethod):
        return method.static_map(method.layout(grid, site), site)
    if type(method.build(site)).core is SparseAttention.core:  # it only runs dense
        return BlockMap.full(RasterLayout(grid, block=64).bind())
    return None


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


def pooled_map(method: Method, sample: Sample) -> BlockMap:
    """The blocks of the largest products of mean query and mean key, as many in each row as the method's density says.

    It stands for a map that cannot be found without attending or without what is trained. Text is kept.
    """
    layout = method.layout(sample.grid, Site.alone(heads=sample.q.shape[2], head_dim=sample.q.shape[3]))
    blocking = layout.bind(sample.text_length)
    q, k = (ops.block_pool(blocking.pack(x), blocking) for x in (sample.q, sample.k))
    count = kept_blocks(mean_of(method.call_density()), layout.video_tiles * layout.blocks_per_tile)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    return select.top_k(scores, blocking, count=count, forced=select.forced_text(blocking))


def layer_attention(
    method: Method, grid: Grid, site: Site, blocks: BlockMap, *, layers: int, samples: int = 1
) -> Attention:
    """What the planner is told of a layer that a method runs.

    Choosing is that of a call which searches; of a method that keeps its map, of a call which uses it again.

    Args:
        blocks: A map of the layer. layers: that run like it. samples: of a call, CFG branches included.
    """
    layout = method.layout(grid, site)
    choosing = method.search_flops(layout, site, 1, "reuse" if method.state_phases else "search")
    pooled = layout.slots if method.key in _EVERY_KEY else blocks.k.blocks
    return Attention(
        tokens=grid.video,
        heads=site.heads,
        head_dim=site.head_dim,
        samples=samples,
        layers=layers,
        choosing=choosing,
        pooled=pooled if choosing else 0,
    )
