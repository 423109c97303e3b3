"""Attention from host order to host order, which keeps for its backward no more than dense attention does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.layouts.reorder import reorder
from vsparse.ops.attention import attend, attend_backward, block_sparse_attention, load_map, save_map
from vsparse.ops.boundary import as_tensors, check_attention, like, scale_of
from vsparse.ops.merge import merge_attention
from vsparse.reference import statistics_dtype

__all__ = ["host_order_attention"]

_MAP = 7  # tensors of a map at the boundary of an op


@torch.library.custom_op("vsparse::host_order_attention", mutates_args=())
def _host_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed_q: Tensor,
    packed_k: Tensor,
    packed_v: Tensor,
    token: Tensor | None,
    slot: Tensor | None,
    maps: Sequence[Tensor | None],
    blocks: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q, k, v are here for the gradient alone. ``token`` of each slot, ``slot`` of each token: None in slot order."""
    parts = [attend(packed_q, packed_k, packed_v, *one, scale, None) for one in _each(maps, blocks)]
    out, lse = parts[0] if len(parts) == 1 else merge_attention(*zip(*parts, strict=True))
    return out if slot is None or token is None else reorder(out, slot, token), lse


@_host_order.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, packed_q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like(q), packed_q.new_empty(packed_q.shape[:3], dtype=statistics_dtype(q.dtype))


def _each(maps: Sequence[Any], blocks: Sequence[int]) -> list[tuple[Any, ...]]:
    """The arguments of each map at the boundary of an op."""
    return [(*maps[_MAP * i : _MAP * (i + 1)], *blocks[2 * i : 2 * i + 2]) for i in range(len(blocks) // 2)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, _, _, token, slot, maps, ctx.blocks, ctx.scale = inputs
    kept: list[Tensor | None] = []
    ctx.capacities = []
    for index, count, q_length, k_length, *rest, _, _ in _each(maps, ctx.blocks):
        stored, capacity = save_map(index, count, q_length, k_length)
        ctx.capacities.append(capacity)
        kept += [stored, count, q_length, k_length, *rest]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, token, slot, *kept)


def _grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """Each part knows its map, and the result and LSE of the whole: its share of the gradients needs no more."""
    q, k, v, out, lse, token, slot, *kept = ctx.saved_tensors
    nothing, ordered = (None,) * 8, token is not None
    if grad is None:
        return None, None, None, *nothing
    q, k, v, out, grad = (reorder(x, token, slot) if ordered else x for x in (q, k, v, out, grad))
    total: list[Tensor] = []
    for (stored, count, q_length, k_length, *rest), capacity in zip(
        _each(kept, ctx.blocks), ctx.capacities, strict=True
    ):
        index = load_map(stored, capacity, q_length, k_length)
        grads = attend_backward(grad, None, q, k, v, out, lse, index, count, q_length, k_length, *rest, ctx.scale)
        total = [a + b for a, b in zip(total, grads, strict=True)] if total else list(grads)
    return *(reorder(x, slot, token) if ordered else x for x in total), *nothing


_host_order.register_autograd(_grad, setup_context=_setup)


def host_order_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *maps: BlockMap,
    packed: Sequence[Tensor],
    skip_threshold: float | None = None,
) -> Tensor:
    """Attention of tokens in host order over the union of disjoint maps; exact, differentiable in q, k, v.

    What `block_sparse_attention` and `merge_attention` compute between packing and unpacking. For the backward it
    keeps q, k, v, the result and the LSE, as dense attention does: neither packed copies, which are larger than the
    host's own where tiles are ragged, nor a result for each map. The backward packs them again.

    Args:
        q, k, v: ``[B, N, H, D]`` in host order.
        maps: At least one; their blockings are of one layout, and no query has a key in two of them.
        packed: q, k, v in slots, ``[B, S, H, D]``, as the blocking packs them; no gradient goes through them.
        skip_threshold: As of `block_sparse_attention`, for a single map; without gradient.

    Returns:
        ``[B, N, H, D]`` in the dtype of q.

    Raises:
        ValueError: no map, a map whose blocking carries no layout, or shapes, dtypes and devices that do not fit.
        NotImplementedError: no implementation can run this.
    """
    if not maps or (skip_threshold is not None and len(maps) > 1):
        raise ValueError(f"host_order_attention takes maps, and with a skip_threshold exactly one; got {len(maps)}")
    blocking = maps[0].k
    layout = blocking.layout
    if layout is None or {q.shape, k.shape, v.shape} != {(q.shape[0], layout.tokens, *packed[0].shape[2:])}:
        raise ValueError(
            "host_order_attention: the maps must carry the layout of q, k and v (Layout.bind), which have its "
            f"{None if layout is None else layout.tokens} tokens; got {[tuple(x.shape) for x in (q, k, v)]}"
        )
    slots = (packed[0], packed[1], packed[2])
    if skip_threshold is not None:
        return blocking.unpack(block_sparse_attention(*slots, maps[0], skip_threshold=skip_threshold)[0])
    tensors: list[Tensor | None] = []
    blocks: list[int] = []
    for part in maps:
        check_attention(*slots, part)
        flat = as_tensors(part)
        tensors += flat[:_MAP]
        blocks += flat[_MAP:]
    same = blocking.order is None and layout.identity
    token, slot = (None, None) if same else blocking.order or (layout.slot_token, layout.token_slot)
    detached = (x.detach() for x in slots)
    out: Tensor = _host_order(q, k, v, *detached, token, slot, tensors, blocks, scale_of(None, q))[0]
    return out
