"""Blocks that are clusters of tokens: how many is static, which tokens they hold is found from data."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vsparse.geometry import Grid, Segment
from vsparse.layouts.base import Blocking, Layout
from vsparse.layouts.kinds import positive

__all__ = ["ClusterLayout", "arrange"]


class ClusterLayout(Layout):
    """A fixed number of blocks for the video, of any sizes, and one for the text of each side; nothing is padded.

    As it stands the video is cut into equal runs in host order; `arrange` puts in clusters that were found from data.

    Args:
        grid: The lattice. clusters: blocks of the video, at most as many as it has tokens.
        query_clusters: Blocks of the queries, if they have other clusters; None: the same.

    Raises:
        ValueError: a number of clusters that is not a positive integer.

    Source: SVG2 (arXiv 2505.18875, section 4), which sorts the tokens of every head by cluster.
    """

    def __init__(self, grid: Grid, *, clusters: int, query_clusters: int | None = None) -> None:
        tables = _tables(grid, min(positive("clusters", clusters), grid.video))
        if query_clusters is not None:
            queries = ClusterLayout(grid, clusters=positive("query_clusters", query_clusters))
            tables = {**tables, "queries": queries, "key": (*tables["key"], *queries.key)}  # type: ignore[misc]
        super().__init__(**tables)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=64)
def _tables(grid: Grid, clusters: int) -> dict[str, object]:
    with torch.inference_mode(False), _disable_current_modes():
        size = [len(part) for part in torch.arange(grid.video).tensor_split(clusters)]
        size = [
            *([grid.text_before] if grid.text_before else []),
            *size,
            *([grid.text_after] if grid.text_after else []),
        ]
        segment = torch.full((len(size),), int(Segment.VIDEO), dtype=torch.int32)
        offset = torch.zeros(len(size), dtype=torch.int32)
        if grid.text_before:
            segment[0] = int(Segment.TEXT)
        if grid.text_after:
            segment[-1], offset[-1] = int(Segment.TEXT), grid.text_before
        length, token = torch.tensor(size, dtype=torch.int32), torch.arange(grid.tokens)
        return {
            "grid": grid,
            "key": ("cluster", grid, clusters),
            "block": max(grid.video, *size),
            "slot_token": token[None, None],
            "token_slot": token[None, None],
            "length": length[None, None],
            "segment": segment,
            "text_offset": offset,
            "start": (length.cumsum(0, dtype=torch.int32) - length)[None, None],
        }


def arrange(layout: Layout, labels: Tensor, text_length: Tensor | None = None) -> Blocking:
    """The blocking of a `ClusterLayout` whose clusters are known: tokens in order of their cluster, host order inside.

    Args:
        layout: The layout, on the device of the labels. labels: ``[B, H, video]`` int64, the cluster of each video
            token, below its number of clusters. text_length: as in `Layout.bind`.

    Returns:
        A blocking with an order and with lengths by sample and head; clusters without a token are empty blocks.
    """
    grid, bound = layout.grid, layout.bind(text_length)
    first, last = grid.text_before, grid.text_before + grid.video
    lead = labels.shape[:2]
    order = labels.argsort(dim=-1, stable=True) + first
    place = torch.arange(grid.tokens, device=labels.device).expand(*lead, -1)
    slot_token = torch.cat((place[..., :first], order, place[..., last:]), -1)
    token_slot = torch.zeros_like(slot_token).scatter(-1, slot_token, place)
    if bound.order is not None:  # text that is not valid; no text token has moved
        shown = bound.order[0] >= 0
        slot_token, token_slot = (torch.where(shown, x, -1) for x in (slot_token, token_slot))
    before, after = int(grid.text_before > 0), int(grid.text_after > 0)
    clusters = layout.blocks - before - after
    size = torch.zeros(*lead, clusters, dtype=torch.int32, device=labels.device)
    size = size.scatter_add(-1, labels, torch.ones_like(labels, dtype=torch.int32))
    texts = bound.length[..., :before], bound.length[..., layout.blocks - after :]
    length = torch.cat((texts[0].expand(*lead, -1), size, texts[1].expand(*lead, -1)), -1)
    ends = size.cumsum(-1, dtype=torch.int32) + first
    start = torch.cat((ends.new_zeros(*lead, before), ends - size, ends.new_full((*lead, after), last)), -1)
    return Blocking(
        length=length, block=layout.block, start=start, layout=layout, order=(slot_token, token_slot), arranged=True
    )
