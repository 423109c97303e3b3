"""The configurations to check, and inputs with every awkward corner."""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from torch import Tensor

from vsparse import Blocking, BlockMap, reference

from . import descriptors
from .inputs import generator
from .plan import BLOCKS, GATHERED

WIDTHS = (128, 64, 80, 96, 32, 256)
DTYPES = ("bfloat16", "float16", "float32")
VARIANTS = ("bias", "starts", "full")
OPS = ("mass", "pool", "merge", "select", "reorder")


@dc.dataclass(frozen=True)
class Case:
    """One configuration to check.

    Args:
        kind: "attention" or one of `OPS`. width: D. q_block, k_block: BQ, BK. dtype: name in torch.
        variant: "", "bias" (a key_bias), "starts" (ragged starts), "full" (every row full, no lists) or "descriptors"
            (the forward reads K and V through them).
    """

    kind: str
    width: int
    q_block: int
    k_block: int
    dtype: str
    variant: str = ""

    @property
    def key(self) -> str:
        return (
            f"{self.kind} D={self.width} {self.q_block}x{self.k_block} {self.dtype}{self.variant and ' '}{self.variant}"
        )


def cases() -> list[Case]:
    """Every configuration, those that are timed first."""
    found = [Case("attention", width, *block, dtype) for dtype in DTYPES for width in WIDTHS for block in BLOCKS]
    variants = [Case("attention", 128, 64, 64, d, v) for d in ("bfloat16", "float32") for v in VARIANTS]
    search = [Case(kind, width, 64, 64, "bfloat16") for kind in OPS for width in (128, 64)]
    gathered = [Case("attention", 128, *block, "bfloat16") for block in GATHERED]
    gathered += [Case("attention", 128, 64, 1, "bfloat16", v) for v in VARIANTS]
    gathered += [Case("attention", 64, *block, d) for block in GATHERED for d in DTYPES]
    described = [
        Case("attention", x, *block, "bfloat16", descriptors.VARIANT) for x in (128, 64, 80) for block in BLOCKS
    ]
    return [
        *found[: 2 * len(BLOCKS)],
        *described[: 2 * len(BLOCKS)],
        *search,
        *gathered,
        *variants,
        *found[2 * len(BLOCKS) :],
        *described[2 * len(BLOCKS) :],
    ]


def tiny_cases() -> list[Case]:
    return [
        Case("attention", 64, 64, 64, "bfloat16"),
        Case("attention", 80, 128, 64, "bfloat16"),
        Case("attention", 64, 64, 64, "float32", "bias"),
        Case("attention", 64, 64, 64, "bfloat16", "full"),
        Case("attention", 64, 64, 64, "bfloat16", descriptors.VARIANT),
        Case("attention", 64, 64, 1, "bfloat16"),
        *(Case(kind, 64, 64, 64, "bfloat16") for kind in OPS),
    ]


def _side(tokens: int, block: int, variant: str, seed: int) -> tuple[Blocking, int]:
    """Random lengths that differ by sample, one block empty, the last one with a ragged tail; and the slots."""
    blocks = max(3, math.ceil(tokens / block))
    length = torch.randint(1, block + 1, (2, 1, blocks), generator=torch.Generator().manual_seed(seed))
    length[:, :, : blocks // 2] = block
    length[0, 0, blocks // 2] = 0
    length[..., -1] = 1 + (block * 5) // 8
    length = length.to(torch.int32)
    if variant != "starts":
        return Blocking(length=length, block=block), blocks * block
    most = length.amax((0, 1), keepdim=True) + 1
    start = (most.cumsum(-1) - most).to(torch.int32)
    return Blocking(length=length, block=block, start=start), int((start + block).max())


@dc.dataclass
class Sample:
    """Inputs of a check. ``planted``: k and v with NaN in the key blocks that no row of a head keeps."""

    blocks: BlockMap
    clean: list[Tensor]
    planted: list[Tensor]
    weights: tuple[Tensor, Tensor]

    @property
    def scale(self) -> float:
        return float(self.clean[0].shape[-1] ** -0.5)


def sample(case: Case, device: torch.device, tokens: tuple[int, int]) -> Sample:
    """Two samples, two heads; lists that differ by sample, head and row; empty rows; full rows in one head, key blocks
    that nobody keeps in the other; the second head with logits four times as large."""
    (q, rows), (k, columns) = (
        _side(size, block, case.variant, seed)
        for size, block, seed in zip(tokens, (case.q_block, case.k_block), (1, 2), strict=True)
    )
    source = torch.Generator().manual_seed(case.width + case.q_block)
    keep = torch.rand(2, 2, q.blocks, k.blocks, generator=source) < 0.4
    keep[:, 0, 1] = True
    keep[:, :, 0] = False
    keep[0, 1, :, 0] = keep[1, 1, :, 1] = False
    keep[0, 0, -1] = keep[1, 1, -2] = False
    count = keep.sum(-1)
    blocks = BlockMap.from_mask(keep, q, k, capacity=max(1, int(torch.where(count == k.blocks, 0, count).max())))
    if case.variant == "full":
        blocks = BlockMap.full(q, k)
    bias = torch.randn(2, 1, k.blocks, generator=source) if case.variant == "bias" else None
    dtype = getattr(torch, case.dtype)
    blocks = _to(dc.replace(blocks, key_bias=bias), device)
    numbers = generator(device, case.width)
    clean = []
    for side, slots, times in ((blocks.q, rows, 4.0), (blocks.k, columns, 1.0), (blocks.k, columns, 1.0)):
        x = torch.randn(2, slots, 2, case.width, generator=numbers, device=device)
        x[:, :, 1] *= times
        valid = (reference.slot_block(side, slots) >= 0).transpose(1, 2)[..., None]
        clean.append(torch.where(valid, x, 0).to(dtype))
    return Sample(
        blocks,
        clean,
        [clean[0], *(torch.where(_unused(blocks, columns), math.nan, x) for x in clean[1:])],
        (
            torch.randn(clean[0].shape, generator=numbers, device=device).bfloat16(),
            torch.randn(clean[0].shape[:3], generator=numbers, device=device),
        ),
    )


def _to(blocks: BlockMap, device: torch.device) -> BlockMap:
    def moved(side: Blocking) -> Blocking:
        start = None if side.start is None else side.start.to(device)
        return dc.replace(side, length=side.length.to(device), start=start)

    bias = None if blocks.key_bias is None else blocks.key_bias.to(device)
    return BlockMap(blocks.index.to(device), blocks.count.to(device), moved(blocks.q), moved(blocks.k), bias)


def _unused(blocks: BlockMap, slots: int) -> Tensor:
    """``[B, slots, H, 1]`` bool: slots of key blocks that no row of the head keeps."""
    kept = blocks.to_mask().any(-2)
    side = blocks.k
    if side.start is None:
        block = (torch.arange(slots, device=kept.device) // side.block)[None, None]
    else:
        block = reference.slot_block(side, slots)
    block = block.expand(*kept.shape[:2], -1)
    return ((block >= 0) & ~kept.gather(-1, block.clamp_min(0))).transpose(1, 2)[..., None]
