"""Maps and inputs on which every kernel is held to the law."""

from __future__ import annotations

import dataclasses as dc

import oracle
import strategies
import torch
from torch import Tensor

import vsparse
from vsparse import BlockMap, reference
from vsparse.layouts import Blocking

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dc.dataclass(frozen=True)
class Case:
    """A map and inputs whose unused slots are zero, as `Blocking.pack` leaves them."""

    blocks: BlockMap
    inputs: list[Tensor]

    @property
    def scale(self) -> float:
        return self.inputs[0].shape[-1] ** -0.5


def make(
    seed: int,
    *,
    q: tuple[int, int] = (4, 8),
    k: tuple[int, int] = (6, 4),
    lead: tuple[int, int] | None = None,
    batch: int = 2,
    heads: int = 2,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    ragged: tuple[bool, bool] = (False, False),
    bias: bool = False,
    density: float = 0.4,
) -> Case:
    """Random maps over ragged blocks. ``q`` and ``k``: number and size of blocks. ``lead`` of the lists: one for each
    sample and head, if not given. ``size``: scale of activations.
    """
    lead = (batch, heads) if lead is None else lead
    q_side = strategies.blocking(*q, seed=seed, lead=(batch, 1), ragged=ragged[0])
    k_side = strategies.blocking(*k, seed=seed + 1, ragged=ragged[1])
    blocks = strategies.block_map(q_side, k_side, seed=seed, lead=lead, density=density)
    generator = torch.Generator().manual_seed(seed)
    if bias:
        blocks = dc.replace(blocks, key_bias=torch.randn(1, 1, k[0], generator=generator))
    inputs = []
    for side in (q_side, k_side, k_side):
        slots = strategies.slots(side)
        x = torch.randn(batch, slots, heads, width, generator=generator) * size
        valid = (reference.slot_block(side, slots) >= 0).transpose(1, 2)[..., None]
        inputs.append(torch.where(valid, x, 0).to(dtype))
    return Case(blocks, inputs)


def hold(case: Case) -> None:
    """Outputs, LSE and the gradients through both."""
    oracle.assert_law(
        lambda q, k, v: vsparse.block_sparse_attention(q, k, v, case.blocks),
        lambda q, k, v: reference.block_sparse_attention(q, k, v, case.blocks, scale=case.scale),
        case.inputs,
        also=[oracle.fused(case.blocks, case.scale), oracle.formula(case.blocks, case.scale)],
    )


def filled(case: Case, filler: int) -> Case:
    """The case with another number in the list entries that no row counts."""
    blocks = case.blocks
    used = torch.arange(blocks.capacity) < torch.where(blocks.count == blocks.k.blocks, 0, blocks.count)[..., None]
    assert not bool(used.all())
    return Case(dc.replace(blocks, index=torch.where(used, blocks.index, filler)), case.inputs)


def padded_first(q: int, k: int, dtype: torch.dtype) -> Case:
    """Rows whose first listed key block holds no token; the third row lists nothing but such blocks, the last is full.

    A running softmax that starts on such a block computes ``exp(-inf - (-inf))``.
    """
    lengths = [torch.tensor([[x]], dtype=torch.int32) for x in ([q, max(1, q - 1), q, 1], [0, max(1, k - 3), 0, k, 1])]
    q_side, k_side = (Blocking(length=x, block=size) for x, size in zip(lengths, (q, k), strict=True))
    keep = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for side in (q_side, k_side, k_side):
        x = torch.randn(1, side.blocks * side.block, 1, 16, generator=generator)
        valid = (reference.slot_block(side, x.shape[1]) >= 0).transpose(1, 2)[..., None]
        inputs.append(torch.where(valid, x, 0).to(dtype))
    return Case(BlockMap.from_mask(keep[None, None], q_side, k_side, capacity=3), inputs)


def hold_padded_first(q: int, k: int, dtypes: tuple[torch.dtype, ...] = (torch.float16,)) -> None:
    """By the law, with no NaN anywhere: nothing of the empty row, and its gradients are 0."""
    for dtype in dtypes:
        case = padded_first(q, k, dtype)
        hold(case)
        with oracle.poison():
            found = oracle.run(lambda *x, blocks=case.blocks: vsparse.block_sparse_attention(*x, blocks), case.inputs)
        row = slice(2 * q, 3 * q)
        assert bool((found["output 1"][:, row] == -torch.inf).all())
        assert not bool(found["output 0"][:, row].any())
        assert not bool(found["gradient 0"][:, row].any())
        assert all(bool(x.isfinite().all()) for name, x in found.items() if name != "output 1")
