"""Attention of rows that are spread over processes to keys that are spread over the same processes."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking
from vsparse.ops.attention import block_sparse_attention
from vsparse.ops.boundary import check_attention, scale_of
from vsparse.parallel.collectives import Group
from vsparse.parallel.gather import GatherAttention
from vsparse.parallel.needs import Shards, exchange_needs
from vsparse.parallel.ring import RingAttention

__all__ = ["How", "sharded_attention"]

How = Literal["ring", "gather"]


def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockMap,
    *,
    group: Group,
    bounds: Sequence[int],
    common: tuple[int, int] = (0, 0),
    how: How = "ring",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of this process's rows to the key blocks of all; exact, differentiable in q, k, v.

    Each process has rows of its own and chooses key blocks for them alone. It fetches those that others hold, by sample
    and head, each once however many of its rows keep it. Every process must call, and take part in the backward; each
    must be given the same ``bounds``, ``common``, ``how`` and key blockings.

    Args:
        q: ``[B, Sq, H, D]`` in block order, the rows of this process; there may be none.
        k, v: ``[B, Sk, H, D]``, the key blocks that this process holds, ascending: its own of the video and the
            ``common`` ones. Dtypes, devices and finite padding as in `block_sparse_attention`. Blocks that no row of
            any process keeps may hold anything.
        blocks: Rows of q, columns of all K key blocks, in a padded grid (no starts).
        group: Who takes part, R processes.
        bounds: R + 1 ints; process r holds the key blocks ``bounds[r]:bounds[r + 1]``, which may be none.
        common: First and last (exclusive) of the key blocks that every process holds, at either end; never sent.
        how: "ring": from one process after the other, the next blocks on their way while those that came are attended
            to; never those of more than two others are in memory, and the backward fetches them again. "gather": all
            at once, for one attention over all of them; they are kept for the backward, which sends only gradients.
        scale: Of the logits; None: ``D ** -0.5``.

    Returns:
        out ``[B, Sq, H, D]`` in the dtype of q; lse ``[B, Sq, H]``, natural log, float32 (float64 for float64 input).
        Rows without a key give 0 and -inf. No gradient goes through lse. Gradients of k and v hold what the rows of
        all processes add, for common blocks what those of this process add: there the gradient is the sum over all.

    Sent to others are: one bit for each of their blocks, sample and head; K and V of the blocks that they ask for, in
    the dtype of k; in the backward dK and dV of the blocks fetched, in the same dtype. With CUDA tensors there is one
    device sync, for the sizes of what is sent, before the first block travels; none in the backward.

    Raises:
        ValueError: shapes, dtypes, devices, bounds or common blocks do not fit. NotImplementedError: no
            implementation can run this.

    Source: fetching what a sparse map needs is the sparse context parallelism of DSV (arXiv 2502.07590), with blocks in
    place of tokens; ring and merge are ring attention (arXiv 2310.01889).
    """
    if how not in get_args(How):
        raise ValueError(f"how must be one of {get_args(How)}, got {how!r}")
    if blocks.k.start is not None:
        raise ValueError("the key blocks must be a padded grid, got a blocking with starts")
    shards = Shards(group=group, blocks=blocks.k.blocks, bounds=tuple(bounds), common=common)
    held = Blocking(length=blocks.k.length[..., : shards.held], block=blocks.k.block)
    check_attention(q, k, v, dc.replace(blocks, k=held, key_bias=None))
    if group.size == 1:
        out, lse = block_sparse_attention(q, k, v, blocks, scale=scale)
        return out, lse.detach()
    needs = exchange_needs(blocks, shards, q.shape[0], q.shape[2])
    function = RingAttention if how == "ring" else GatherAttention
    out, lse = function.apply(q, k, v, blocks, shards, needs, scale_of(scale, q))  # type: ignore[no-untyped-call]
    return out, lse
