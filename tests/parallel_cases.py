"""Attention of whole sequences to hold attention over processes to: every awkward corner, drawn from a seed."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import random
from collections.abc import Iterator
from typing import Any

import oracle
import torch
from torch import Tensor

from vsparse import BlockMap, reference
from vsparse.layouts import Blocking
from vsparse.parallel.collectives import Group, all_to_all, gather
from vsparse.parallel.sharded import How, sharded_attention

SEEDS = range(40)
SIZES = (2, 4)
TYPES = [(dtype, scale) for dtype in (torch.float32, torch.bfloat16) for scale in (1.0, 4.0, 16.0)]
TYPES.append((torch.float64, 1.0))


WIDTH = 8  # head dimension


@dc.dataclass(frozen=True, kw_only=True)
class Case:
    """Attention of a whole sequence, and how it is spread.

    Args:
        inputs: q, k and v of the whole, packed. scale: of the logits.
        rows, bounds: R + 1 ints each, the query blocks and the key blocks of the video that each process has.
        common: First and last of the key blocks that all have.
    """

    blocks: BlockMap
    inputs: list[Tensor]
    rows: tuple[int, ...]
    bounds: tuple[int, ...]
    common: tuple[int, int]
    scale: float = WIDTH**-0.5

    def columns(self, rank: int) -> list[int]:
        """The key blocks that a process holds."""
        return sorted({*range(*self.common), *range(self.bounds[rank], self.bounds[rank + 1])})

    def near(self, rank: int) -> BlockMap:
        """The rows of a process."""
        mine, blocks = slice(self.rows[rank], self.rows[rank + 1]), self.blocks
        q = dc.replace(blocks.q, length=blocks.q.length[..., mine])
        return dc.replace(blocks, index=blocks.index[:, :, mine], count=blocks.count[:, :, mine], q=q)

    def slots(self, x: Tensor, blocks: list[int], size: int) -> Tensor:
        """The slots of some blocks."""
        return x.unflatten(1, (x.shape[1] // size, size))[:, blocks].flatten(1, 2)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.block_sparse_attention(q, k, v, self.blocks, scale=self.scale)
        return out, lse.detach()

    def also(self) -> list[oracle.Function]:
        """Further ways to run the reference, without a gradient through the LSE."""
        ways = oracle.fused(self.blocks, self.scale), oracle.formula(self.blocks, self.scale)
        return [lambda q, k, v, way=way: (lambda out, lse: (out, lse.detach()))(*way(q, k, v)) for way in ways]

    def spread(self, group: Group, how: How) -> oracle.Function:
        """The same, over processes: each has the whole result, and the whole of every gradient.

        Key blocks that no row keeps hold NaN.
        """
        mine = list(range(self.rows[group.rank], self.rows[group.rank + 1]))
        sizes = [(b - a) * self.blocks.q.block for a, b in zip(self.rows[:-1], self.rows[1:], strict=True)]

        def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            q, k, v = Shared.apply(group, q, *(oracle.plant_nan(x, self.blocks) for x in (k, v)))
            k, v = (self.slots(x, self.columns(group.rank), self.blocks.k.block) for x in (k, v))
            near = sharded_attention(
                self.slots(q, mine, self.blocks.q.block), k, v, self.near(group.rank), group=group,
                bounds=self.bounds, common=self.common, how=how, scale=self.scale,
            )  # fmt: skip
            return tuple(gather(group, x, sizes, dim=1, what="test", adjoint="once") for x in near)

        return function


class Shared(torch.autograd.Function):
    """Tensors that every process has; their gradients are the sums of those of all processes."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        each, size = len(grads), ctx.group.size
        came = all_to_all(ctx.group, grads * size, [x.shape for x in grads] * size, what="test")
        return None, *(torch.stack(came[i::each]).sum(0) for i in range(each))


def cuts(draw: random.Random, first: int, last: int, parts: int) -> tuple[int, ...]:
    """Uneven bounds, of which some enclose nothing."""
    inner = sorted(draw.randint(first, last) for _ in range(parts - 1))
    return (first, *inner, last)


def make(seed: int, processes: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Case:
    """Everything about it drawn from the seed."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, text = draw.choice([1, 2]), draw.choice([1, 3]), draw.choice(["before", "after", "absent"])
    queries, keys, common = draw.randint(1, 9), draw.randint(1, 14), draw.randint(1, 3)
    q_block, k_block = draw.choice([(4, 4), (4, 1), (1, 1), (2, 5), (8, 3)])
    first, last = {"before": (0, common), "after": (keys, keys + common), "absent": (0, 0)}[text]
    video = (common, common + keys) if text == "before" else (0, keys)
    columns = keys + (last - first)

    def lengths(blocks: int, block: int) -> Tensor:
        lead = draw.choice([(1, 1), (batch, 1), (batch, heads)])
        return torch.randint(0, block + 1, (*lead, blocks), generator=generator, dtype=torch.int32)

    q = Blocking(length=lengths(queries, q_block), block=q_block)
    k = Blocking(length=lengths(columns, k_block), block=k_block)
    lead = draw.choice([(1, 1), (1, heads), (batch, 1), (batch, heads)])
    keep = torch.rand(*lead, queries, columns, generator=generator) < draw.choice([0.1, 0.4, 0.9])
    row = torch.rand(*lead, queries, 1, generator=generator)
    keep = (keep | (row > 0.9)) & (row > 0.1)
    count = keep.sum(-1)
    capacity = max(1, int(torch.where(count == columns, 0, count).max()))
    blocks = BlockMap.from_mask(keep, q, k, capacity=capacity)
    if draw.random() < 0.3:
        bias = torch.randn(draw.choice([1, batch]), draw.choice([1, heads]), columns, generator=generator)
        blocks = dc.replace(blocks, key_bias=bias)
    inputs = []
    for side in (q, k, k):
        slots = side.blocks * side.block
        x = torch.randn(batch, slots, heads, WIDTH, generator=generator) * size
        valid = (reference.slot_block(side, slots) >= 0).transpose(1, 2)[..., None]
        inputs.append(torch.where(valid, x, 0).to(dtype))
    return Case(
        blocks=blocks, inputs=inputs, rows=cuts(draw, 0, queries, processes), bounds=cuts(draw, *video, processes),
        common=(first, last), scale=draw.choice([WIDTH**-0.5, 0.2]),
    )  # fmt: skip


def drawn(seed: int, size: int) -> tuple[Case, int]:
    """A case in the dtype and at the scale that its seed says; each group of a pool takes cases of its own."""
    seed += 1000 * (torch.distributed.get_rank() // size)
    return make(seed, size, *TYPES[seed % len(TYPES)]), seed


def compare(candidate: oracle.Function, case: Case, seed: int, group: Group) -> None:
    """By the law; float64, whose truth it is, must be nearer to it than float32 comes."""
    if group.rank:
        oracle.run(candidate, case.inputs, seed)
    elif case.inputs[0].dtype == torch.float64:
        oracle.assert_identity(candidate, case.plain, case.inputs, seed)
    else:
        oracle.assert_law(candidate, case.plain, case.inputs, seed, also=case.also())


@contextlib.contextmanager
def named(words: str) -> Iterator[None]:
    """Say in which case an assertion failed."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(words) from error
