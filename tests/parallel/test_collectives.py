"""Collectives: what arrives, what goes back, how many bytes; exactly, on small whole numbers."""

from __future__ import annotations

from typing import get_args

import processes
import torch
from processes import Get
from torch import Tensor

from vsparse.parallel.collectives import (
    ALONE,
    Adjoint,
    all_to_all,
    counted_traffic,
    gather,
    note_traffic,
    total,
)

DTYPES = (torch.float64, torch.bfloat16, torch.float32)


def whole(*key: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Whole numbers that every process can draw for every other one; their sums are exact in any dtype here."""
    generator = torch.Generator().manual_seed(hash(key))
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def shape_of(sender: int, receiver: int, number: int) -> tuple[int, int]:
    """Every pair of processes has other sizes, and some send nothing."""
    return (sender + 2 * receiver + number) % 4, 3 if number else 1


def padded(size: int) -> int:
    return -(-size // 16) * 16


def swaps(size: int) -> None:
    """Three tensors of three dtypes to each process, there and back."""
    group = processes.group(size)
    rank, each = group.rank, range(size)
    leaves = [
        whole(0, rank, to, i, shape=shape_of(rank, to, i), dtype=dtype).requires_grad_()
        for to in each
        for i, dtype in enumerate(DTYPES)
    ]
    shapes = [shape_of(source, rank, i) for source in each for i in range(3)]
    with counted_traffic() as traffic:
        came = all_to_all(group, leaves, shapes, what="here")
    sizes = {(to, i): leaves[3 * to + i].nbytes for to in each for i in range(3)}
    assert traffic == {"here": sum(padded(n) for (to, _), n in sizes.items() if to != rank)}
    places = [(other, i, dtype) for other in each for i, dtype in enumerate(DTYPES)]
    for x, (source, i, dtype) in zip(came, places, strict=True):
        assert_same(x, whole(0, source, rank, i, shape=shape_of(source, rank, i), dtype=dtype))
    gradients = [whole(1, rank, source, i, shape=shape_of(source, rank, i), dtype=d) for source, i, d in places]
    torch.autograd.backward(came, gradients)
    for x, (to, i, dtype) in zip(leaves, places, strict=True):
        assert_same(x.grad, whole(1, to, rank, i, shape=shape_of(rank, to, i), dtype=dtype))


def gathers(size: int, adjoint: Adjoint) -> None:
    """Parts of uneven sizes, one of them empty, along a middle dimension; and sums."""
    group = processes.group(size)
    sizes = [(3 * process) % 4 for process in range(size)]
    for dtype in DTYPES:
        parts = [whole(2, process, shape=(2, n, 3), dtype=dtype) for process, n in enumerate(sizes)]
        x = parts[group.rank].clone().requires_grad_()
        with counted_traffic() as traffic:
            y = gather(group, x, sizes, dim=-2, what="parts", adjoint=adjoint)
        assert traffic == {"parts": padded(x.nbytes) * (size - 1)}
        assert_same(y, torch.cat(parts, 1))
        gradients = [whole(3, process, shape=tuple(y.shape), dtype=dtype) for process in range(size)]
        y.backward(gradients[group.rank])
        wanted = torch.stack(gradients).sum(0) if adjoint == "each" else gradients[group.rank]
        assert_same(x.grad, wanted.split(sizes, 1)[group.rank])

        terms = [whole(4, process, shape=(5,), dtype=dtype) for process in range(size)]
        x = terms[group.rank].clone().requires_grad_()
        y = total(group, x, what="sum", adjoint=adjoint)
        assert_same(y, torch.stack(terms).sum(0))
        gradients = [whole(5, process, shape=(5,), dtype=dtype) for process in range(size)]
        y.backward(gradients[group.rank])
        assert_same(x.grad, torch.stack(gradients).sum(0) if adjoint == "each" else gradients[group.rank])


def assert_same(x: Tensor | None, y: Tensor) -> None:
    assert x is not None
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert torch.equal(x, y), (x, y)


def everything() -> None:
    for size in (2, 4):
        swaps(size)
        for adjoint in get_args(Adjoint):
            gathers(size, adjoint)


def test_among_processes(pool: Get) -> None:
    """All of it in one task, for pairs and for four."""
    pool().run(everything)


def test_a_process_alone_has_nothing_to_send() -> None:
    x = torch.ones(2, requires_grad=True)
    with counted_traffic() as traffic:
        assert all_to_all(ALONE, [x], [x.shape], what="x")[0] is x
        assert gather(ALONE, x, [2], dim=0, what="x") is x
        assert total(ALONE, x, what="x") is x
    assert not traffic


def test_counters_nest() -> None:
    with counted_traffic() as outer:
        note_traffic("ids", 2)
        with counted_traffic() as inner:
            note_traffic("ids", 3)
    note_traffic("ids", 5)
    assert (outer, inner) == ({"ids": 5}, {"ids": 3})
