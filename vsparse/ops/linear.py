"""Linear attention over the blocks that a map keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking
from vsparse.ops.boundary import check_attention
from vsparse.reference import statistics_dtype

__all__ = ["block_linear_attention"]


def block_linear_attention(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap) -> Tensor:
    """``q_r . H_i / q_r . z_i`` with ``H_i = sum k_c^T v_c`` and ``z_i = sum k_c``, over the key blocks of row i.

    Plain PyTorch, differentiable in q, k and v; sums in float32 (float64 for float64 input). Beside its inputs it holds
    a state of ``D (D + 1)`` numbers for every block of queries and of keys.

    Args:
        q, k: ``[B, S, H, D]`` in block order, after the feature map: no negative entries. v: ``[B, S, H, D]``.
        blocks: Query blocks and the key blocks that each sums over. A key bias is refused.

    Returns:
        ``[B, Sq, H, D]`` in the dtype of v; 0 for slots that are not valid, and where the denominator is 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a map with a key bias.

    Source: SLA (arXiv 2509.24006, section 4.2), whose marginal blocks are such a map. A key block that no row keeps may
    hold anything.
    """
    check_attention(q, k, v, blocks)
    if blocks.key_bias is not None:
        raise ValueError("block_linear_attention: the map has a key_bias, which linear attention has no logits for")
    wide = statistics_dtype(q.dtype)
    keep = blocks.to_mask()
    with torch.autocast(q.device.type, enabled=False):
        rows, columns = _Slots(blocks.q, q), _Slots(blocks.k, k)
        used = keep.any(-2)
        keys = columns.take(k.to(wide), used)
        values = F.pad(columns.take(v.to(wide), used), (0, 1), value=1.0)
        states = torch.einsum("bhkcd,bhkce->bhkde", keys, values)
        sums = (keep.to(wide) @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
        parts = torch.einsum("bhqcd,bhqde->bhqce", rows.take(q.to(wide)), sums)
        total = parts[..., -1:]
        out = torch.where(total > 0, parts[..., :-1] / torch.where(total > 0, total, 1), 0)
        return rows.put(out, q.shape[1]).to(v.dtype)


class _Slots:
    """Where the tokens of each block lie: ``place`` and ``valid``, both ``[B|1, H|1, K, block]``."""

    def __init__(self, blocking: Blocking, x: Tensor) -> None:
        offset = torch.arange(blocking.block, device=x.device)
        start = blocking.start
        if start is None:
            start = (torch.arange(blocking.blocks, device=x.device) * blocking.block)[None, None]
        self.valid = offset < blocking.length[..., None]
        place = start[..., None].long() + offset
        self.place = torch.where(self.valid, place, 0)
        self.lead = (x.shape[0], x.shape[2])

    def take(self, x: Tensor, used: Tensor | None = None) -> Tensor:
        """``[B, S, H, D]`` -> ``[B, H, K, block, D]``, zero where no valid token of a used block lies."""
        place = self.place.expand(*self.lead, -1, -1)
        found = x.transpose(1, 2).gather(2, place.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1]))
        inside = self.valid if used is None else self.valid & used[..., None]
        return torch.where(inside[..., None], found.unflatten(2, place.shape[2:]), 0)

    def put(self, x: Tensor, slots: int) -> Tensor:
        """The inverse: ``[B, S, H, D]``, zero in slots that hold no valid token."""
        place = torch.where(self.valid, self.place, slots).expand(*self.lead, -1, -1).flatten(2)
        out = x.new_zeros(*self.lead, slots + 1, x.shape[-1])
        out = out.scatter(2, place[..., None].expand(-1, -1, -1, x.shape[-1]), x.flatten(2, 3))
        return out[:, :, :-1].transpose(1, 2)
