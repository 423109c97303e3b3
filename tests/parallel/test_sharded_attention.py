"""Attention over processes by the law: what each gets and sends back, and what travels for it."""

from __future__ import annotations

import dataclasses as dc
import random
from collections.abc import Callable
from typing import Any, get_args

import oracle
import processes
import pytest
import torch
from torch import Tensor

from vsparse import BlockMap, reference
from vsparse.layouts import Blocking
from vsparse.parallel.collectives import Group, gather, total
from vsparse.parallel.sharded import How, sharded_attention

Get = Callable[[], processes.Pool]
HOWS = get_args(How)
WIDTH = 8


@dc.dataclass(frozen=True, kw_only=True)
class Case:
    """Attention of a whole sequence, and how it is spread.

    Args:
        rows, bounds: R + 1 ints each, the query blocks and the key blocks of the video that each process has.
        text: "before", "after" or "absent": the common key blocks.
    """

    blocks: BlockMap
    inputs: list[Tensor]
    rows: tuple[int, ...]
    bounds: tuple[int, ...]
    common: tuple[int, int]
    text: str

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
        out, lse = reference.block_sparse_attention(q, k, v, self.blocks, scale=WIDTH**-0.5)
        return out, lse.detach()

    def also(self) -> list[oracle.Function]:
        """Further ways to run the reference, without a gradient through the LSE."""
        ways = oracle.fused(self.blocks, WIDTH**-0.5), oracle.formula(self.blocks, WIDTH**-0.5)
        return [lambda q, k, v, way=way: (lambda out, lse: (out, lse.detach()))(*way(q, k, v)) for way in ways]

    def spread(self, group: Group, how: How, traffic: Any = None) -> oracle.Function:
        """The same, over processes: each has the whole result, and the whole of every gradient."""
        mine = list(range(self.rows[group.rank], self.rows[group.rank + 1]))
        sizes = [(b - a) * self.blocks.q.block for a, b in zip(self.rows[:-1], self.rows[1:], strict=True)]

        def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (_Shared.apply(x, group) for x in (q, k, v))
            k, v = (self.slots(x, self.columns(group.rank), self.blocks.k.block) for x in (k, v))
            near = sharded_attention(
                self.slots(q, mine, self.blocks.q.block), k, v, self.near(group.rank), group=group,
                bounds=self.bounds, common=self.common, how=how,
            )  # fmt: skip
            return tuple(gather(group, x, sizes, dim=1, what="test", adjoint="once") for x in near)

        return function


class _Shared(torch.autograd.Function):
    """A tensor that every process has; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(ctx.group, grad, what="test"), None


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
        common=(first, last), text=text,
    )  # fmt: skip


def holds(seeds: range, size: int, how: How, dtype: torch.dtype, scale: float) -> None:
    """In each process: the law, checked by the first of each group."""
    group = processes.group(size)
    for seed in seeds:
        seed += 1000 * (torch.distributed.get_rank() // size)
        case = make(seed, size, dtype, scale)
        candidate = case.spread(group, how)
        try:
            if group.rank:
                oracle.run(candidate, case.inputs, seed)
            elif dtype == torch.float64:
                oracle.assert_identity(candidate, case.plain, case.inputs, seed)
            else:
                oracle.assert_law(candidate, case.plain, case.inputs, seed, also=case.also())
        except AssertionError as error:
            raise AssertionError(f"{seed=} {how} {size=} {dtype}") from error


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", HOWS)
def test_first_law(pool: Get, how: How, size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        pool().run(holds, range(25), size, how, dtype, 1.0)
