"""Block-sparse attention and its gradient: gathered tokens through PyTorch's CPU flash attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from vsparse.blocks import BlockMap
from vsparse.reference import statistics_dtype

from .rows import Chunk, Plan, Tokens, flat

__all__ = ["block_sparse_attention", "block_sparse_attention_backward"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Columns appended to the head dimension to carry the gradient of the LSE; one is used, eight keep rows aligned.
_SPARE = 8


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, *, scale: float, skip_threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Implements `vsparse.reference.block_sparse_attention`; the work is proportional to the kept pairs."""
    assert skip_threshold is None
    wide = statistics_dtype(q.dtype)
    plan = Plan(blocks, q, k, wide)
    out = q.new_empty(q.shape) if plan.complete else q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    rows, flat_out, flat_lse = (flat(q), flat(k), flat(v)), flat(out), flat(lse)
    key_major = plan.key_major
    for lanes in plan.groups():
        if key_major:
            total = _Sum(out, lanes, wide)
            for chunk in plan.listed_columns(lanes):
                total.merge(flat_lse, chunk.q, *_attend(chunk, rows, scale, wide))
            total.close()
        else:
            for chunk in plan.listed_rows(lanes):
                part, part_lse = _attend(chunk, rows, scale, wide)
                chunk.q.put(flat_out, part)
                chunk.q.put(flat_lse, part_lse)
        for chunk in plan.full_rows(lanes):
            part, part_lse = _attend(chunk, rows, scale, wide)
            chunk.q.put(flat_out, part)
            chunk.q.put(flat_lse, part_lse)
    return out, lse


def block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: BlockMap,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements `vsparse.reference.block_sparse_attention_backward`."""
    wide = statistics_dtype(q.dtype)
    # Beside three gradients, pieces of float32 as large as those of bfloat16 do not show in the peak.
    plan = Plan(blocks, q, k, wide, itemsize=2)
    grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    rows = (flat(q), flat(k), flat(v))
    saved = (flat(grad_out), None if grad_lse is None else flat(grad_lse), flat(out), flat(lse))
    key_major = plan.key_major
    listed = plan.listed_columns if key_major else plan.listed_rows
    # Long runs of queries are faster in bfloat16, and the rounding is then that of dense attention.
    long = q.dtype if q.dtype == torch.bfloat16 and grad_lse is None else wide
    for lanes in plan.groups():
        keys, values = _Sum(grads[1], lanes, wide), _Sum(grads[2], lanes, wide)
        queries = _Sum(grads[0], lanes, wide) if key_major else _Whole(grads[0])
        totals = (queries, keys, values)
        for chunks, dtype in ((listed(lanes), wide), (plan.full_rows(lanes), long)):
            for chunk in chunks:
                for places, parts in _attend_backward(chunk, rows, saved, scale, dtype):
                    for total, to, part in zip(totals, places, parts, strict=True):
                        total.add(to, part)
                    del parts, part  # before the next piece makes its own
        for total in totals:
            total.close()
    return grads


def _attend(
    chunk: Chunk, rows: tuple[Tensor, Tensor, Tensor], scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``out [n, A, D]`` and ``lse [n, A]`` of a chunk."""
    out, lses = chunk.q.take(rows[0], dtype).unsqueeze(1), []
    rooms = [x.new_empty(chunk.room * chunk.k.row.shape[1], x.shape[1], dtype=dtype) for x in rows[1:]]
    for part, to, bias in chunk.pieces():
        k, v = (to.take(x, dtype, room).unsqueeze(1) for x, room in zip(rows[1:], rooms, strict=True))
        piece, lse = _flash(out[part], k, v, attn_mask=_mask(bias), scale=scale)
        out[part] = piece  # in the place of its queries, which nothing needs any more
        lses.append(lse)
        del piece  # before the next one is made
    lse = torch.cat(lses)
    if chunk.bias is not None:
        # Flash reports 0 for a row whose every key is masked.
        lse = lse.masked_fill((chunk.bias == -torch.inf).all(1)[:, None, None], -torch.inf)
    return out.squeeze(1), lse.squeeze(1)


def _attend_backward(
    chunk: Chunk,
    rows: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor | None, Tensor, Tensor],
    scale: float,
    dtype: torch.dtype,
) -> Iterator[tuple[tuple[Tokens, Tokens, Tokens], tuple[Tensor, Tensor, Tensor]]]:
    """Piece by piece, the rows of q, k and v and their ``dq [n, A, D]``, ``dk`` and ``dv [n, L, D]``."""
    all_grad_out, all_grad_lse, all_out, all_lse = saved
    q, grad_out, out = (chunk.q.take(x, dtype) for x in (rows[0], all_grad_out, all_out))
    lse = chunk.q.take(all_lse, all_lse.dtype)
    idle = lse == -torch.inf
    if chunk.q.valid is not None:
        idle = idle | ~chunk.q.valid
    grad_out = grad_out.masked_fill(idle[..., None], 0)
    # Huge, not 0: the probabilities of an idle row must vanish however large its logits are.
    lse = lse.masked_fill(idle, torch.finfo(lse.dtype).max)
    spare = 0
    if all_grad_lse is not None:
        # dS = P (dP - sum(out dOut) + dLSE): one more column, 1 in out and -dLSE in dOut, and none in q, k, v.
        grad_lse, spare = chunk.q.take(all_grad_lse, dtype).masked_fill(idle, 0), _SPARE
        q, out, grad_out = (pad(x, (0, spare)) for x in (q, out, grad_out))
        out[..., -1] = 1
        grad_out[..., -1] = -grad_lse
    for part, to, bias in chunk.pieces():
        k, v = (pad(to.take(x, dtype), (0, spare)) if spare else to.take(x, dtype) for x in rows[1:])
        heads = (x.unsqueeze(1) for x in (grad_out[part], q[part], k, v, out[part], lse[part]))
        grads = _flash_backward(*heads, 0.0, False, attn_mask=_mask(bias), scale=scale)
        dq, dk, dv = (x.squeeze(1)[..., : rows[0].shape[-1]] for x in grads)
        del k, v, heads, grads
        yield (chunk.q.part(part), to, to), (dq, dk, dv)
        del dq, dk, dv  # before the next piece makes its own


def _mask(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[:, None, None]


class _Whole:
    """Rows that a single chunk determines."""

    def __init__(self, target: Tensor) -> None:
        self.rows = flat(target)

    def add(self, to: Tokens, part: Tensor) -> None:
        """Set the rows to ``part [n, L, D]``, padding left out."""
        to.put(self.rows, part)

    def close(self) -> None:
        """Nothing is left to do."""


class _Sum:
    """Rows of one lane group summed in ``dtype``: the target itself when it has that dtype, else a buffer beside it."""

    def __init__(self, target: Tensor, lanes: Tensor, dtype: torch.dtype) -> None:
        self.target, self.lanes, self.beside = target, lanes, target.dtype != dtype
        _, self.slots, self.heads, width = target.shape
        self.rows = target.new_zeros(len(lanes) * self.slots, width, dtype=dtype) if self.beside else flat(target)

    def _place(self, row: Tensor) -> Tensor:
        if not self.beside:
            return row
        lane = row // (self.slots * self.heads) * self.heads + row % self.heads
        return (lane - self.lanes[0]) * self.slots + row // self.heads % self.slots

    def add(self, to: Tokens, part: Tensor) -> None:
        """Add ``part [n, L, D]``; padding must hold zeros."""
        self.rows.index_add_(0, self._place(to.row.flatten()), part.flatten(0, 1).to(self.rows.dtype))

    def merge(self, flat_lse: Tensor, to: Tokens, part: Tensor, part_lse: Tensor) -> None:
        """Merge ``part [n, A, D]`` over further keys into the rows; each query stands in it once."""
        row, part, part_lse = to.row.flatten(), part.flatten(0, 1), part_lse.flatten()
        if to.valid is not None:
            kept = to.valid.flatten().nonzero().squeeze(1)
            row, part, part_lse = row[kept], part[kept], part_lse[kept]
        place, old = self._place(row), flat_lse[row]
        new = torch.logaddexp(old, part_lse)
        shift = torch.where(new == -torch.inf, 0, new)
        self.rows[place] = self.rows[place] * (old - shift).exp()[:, None] + part * (part_lse - shift).exp()[:, None]
        flat_lse[row] = new

    def close(self) -> None:
        """Round the sums into the target and let the buffer go."""
        if self.beside:
            batch, head = self.lanes // self.heads, self.lanes % self.heads
            self.target.transpose(1, 2)[batch, head] = self.rows.unflatten(0, (-1, self.slots)).to(self.target.dtype)
        self.rows = self.target
