"""Attention of the same rows on every process: one result everywhere, over the keys of all."""

from __future__ import annotations

import dataclasses as dc
import random

import oracle
import processes
import pytest
import torch
from parallel_cases import SEEDS, SIZES, Case, Shared, compare, cuts, drawn, make, named
from processes import Get
from torch import Tensor

import vsparse
from vsparse import BlockMap
from vsparse.parallel.collectives import ALONE, Group, gather, total
from vsparse.parallel.spread import spread_attention


def over_processes(case: Case, group: Group, seed: int) -> oracle.Function:
    """The keys of the sequence over processes; each takes other rows of the result to the loss."""
    whole, block = case.blocks, case.blocks.k.block
    bounds = cuts(random.Random(seed), 0, whole.k.blocks, group.size)
    mine = slice(bounds[group.rank], bounds[group.rank + 1])
    k_side = dc.replace(whole.k, length=whole.k.length[..., mine])
    bias = None if whole.key_bias is None else whole.key_bias[..., mine]
    near = dc.replace(BlockMap.from_mask(whole.to_mask()[..., mine], whole.q, k_side), key_bias=bias)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = Shared.apply(group, q, *(oracle.plant_nan(x, case.blocks) for x in (k, v)))
        k, v = (x[:, mine.start * block : mine.stop * block] for x in (k, v))
        out, lse = spread_attention(q, k, v, near, group=group, scale=case.scale)
        for x in (out, lse):
            assert all(torch.equal(x, y) for y in gather(group, x[None], [1] * group.size, dim=0, what="test"))
        row = torch.arange(q.shape[1])[:, None, None] % group.size == group.rank
        return total(group, torch.where(row, out, 0), what="test", adjoint="once"), lse

    return function


def spreads(size: int) -> None:
    group = processes.group(size)
    for number in SEEDS:
        case, seed = drawn(number, size)
        with oracle.poison(), named(f"{size} processes, {seed=}"):
            compare(over_processes(case, group, seed), case, seed, group)


@pytest.mark.parametrize("size", SIZES)
def test_rows_that_every_process_has(pool: Get, size: int) -> None:
    """Over the keys of all, the same to the bit everywhere, and every process's wishes add up in the gradients."""
    pool().run(spreads, size)


def test_a_process_alone_attends() -> None:
    """To the bit what the op gives, without a gradient through the LSE."""
    case = make(2, 1)
    q, k, v = (x.requires_grad_() for x in case.inputs)
    found = spread_attention(q, k, v, case.blocks, group=ALONE)
    assert all(map(torch.equal, found, vsparse.block_sparse_attention(q, k, v, case.blocks)))
    assert (found[0].requires_grad, found[1].requires_grad) == (True, False)


def test_what_does_not_fit_is_refused() -> None:
    case = make(2, 1)
    q, k, v = case.inputs
    with pytest.raises(ValueError, match="v must have the shape of k"):
        spread_attention(q, k, v[..., 1:], case.blocks, group=ALONE)
