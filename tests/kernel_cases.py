"""Maps and inputs on which every kernel is held to the law."""

from __future__ import annotations

import dataclasses as dc

import oracle
import strategies
import torch
from torch import Tensor

import vsparse
from vsparse import BlockMap, reference

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
