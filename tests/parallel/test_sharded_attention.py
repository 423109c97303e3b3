"""Attention over processes by the law: what each gets and sends back, and what travels for it."""

from __future__ import annotations

import dataclasses as dc
from collections import Counter
from typing import Any, get_args
from unittest import mock

import oracle
import processes
import pytest
import torch
import torch.distributed as dist
from parallel_cases import SEEDS, SIZES, WIDTH, Case, compare, drawn, make, named
from processes import Get
from torch.utils.checkpoint import checkpoint

import vsparse
from vsparse import BlockMap, Grid, TileLayout, patterns
from vsparse.layouts import Blocking
from vsparse.parallel.collectives import ALONE, Group, counted_traffic
from vsparse.parallel.sharded import How, sharded_attention

HOWS = get_args(How)


def keeps_the_law(size: int, how: How) -> None:
    """In each process; the first of each group compares."""
    group = processes.group(size)
    for number in SEEDS:
        case, seed = drawn(number, size)
        with oracle.poison(), named(f"{how}, {size} processes, {seed=}"), counted_traffic() as traffic:
            compare(case.spread(group, how), case, seed, group)
            del traffic["test"]
            assert +traffic == +needed(case, group, how)


def needed(case: Case, group: Group, how: How) -> Counter[str]:
    """Bytes that this process must send in a forward and a backward: of the blocks that the dense mask shows."""
    batch, _, heads, _ = case.inputs[0].shape
    keep = case.blocks.to_mask().expand(batch, heads, -1, -1)
    size = 2 * case.blocks.k.block * WIDTH * case.inputs[1].element_size()
    me, others = group.rank, [process for process in range(group.size) if process != group.rank]

    def message(by: int, of: int) -> int:
        mine = keep[:, :, case.rows[by] : case.rows[by + 1], case.bounds[of] : case.bounds[of + 1]]
        amount = size * int(mine.any(2).sum())
        return amount if how == "ring" else padded(amount)

    bits = [batch * heads * -(-(case.bounds[p + 1] - case.bounds[p]) // 8) for p in others]
    fetches = 2 if how == "ring" else 1  # the backward of a ring fetches again
    return Counter(
        ids=sum(padded(x) for x in bits),
        blocks=fetches * sum(message(p, me) for p in others),
        gradients=sum(message(me, p) for p in others),
    )


def padded(size: int) -> int:
    """Of an all-to-all."""
    return -(-size // 16) * 16


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", HOWS)
def test_it_is_the_attention_of_one_process(pool: Get, how: How, size: int) -> None:
    """Output, LSE and every gradient by the law, over random maps, lengths, text, bounds, dtypes and scales.

    Blocks that no row keeps hold NaN. What travels are the blocks that some row keeps, and no others.
    """
    pool().run(keeps_the_law, size, how)


def test_the_cases_meet_every_corner() -> None:
    """What `make` draws is not what somebody remembered to write down; that it is there is looked up."""
    met = set()
    for seed in SEEDS:
        case = make(seed, 4)
        blocks, (batch, _, heads, _) = case.blocks, case.inputs[0].shape
        lead, count, keys = tuple(blocks.index.shape[:2]), blocks.count, blocks.k.blocks
        length = blocks.k.length[..., slice(*case.common)]
        met |= {
            ("text", "absent" if case.common == (0, 0) else "after" if case.common[0] else "before"),
            ("key_bias", blocks.key_bias is not None),
            ("map", "shared" if lead == (1, 1) and batch * heads > 1 else "own" if lead == (batch, heads) else "half"),
            ("text differs by sample", len(length) == 2 and not torch.equal(length[0], length[1])),
            ("lengths differ by head", blocks.k.length.shape[1] > 1),
            ("one-token blocks", blocks.k.block == 1),
            ("one-token rows", blocks.q.block == 1),
            ("sizes differ", blocks.k.block != blocks.q.block),
            ("full rows", bool((count == keys).any()), "without a list" if blocks.capacity < keys else "listed"),
            ("empty rows", bool((count == 0).any())),
            ("no rows", 0 in torch.tensor(case.rows).diff()),
            ("no blocks", 0 in torch.tensor(case.bounds).diff()),
        }
    for name in {name for name, *_ in met} - {"text", "map", "full rows"}:
        assert (name, True) in met, name
    assert {("text", x) for x in ("before", "after", "absent")} <= met
    assert {("map", x) for x in ("shared", "own", "half")} <= met
    assert ("full rows", True, "without a list") in met


def window() -> Case:
    """Video rows of 16 frames in tiles of one frame, each to its neighbourhood and to a text of two lengths."""
    layout = TileLayout(Grid(t=16, h=16, w=16, text_after=5), tile=(1, 4, 4))
    blocking = layout.bind(torch.tensor([5, 2]))
    local = patterns.window(size=(1, 4, 4), halo=(1, 8, 4)).block_map(layout)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, layout.slots, 1, WIDTH, generator=generator) for _ in range(3)]
    quarters = (0, 64, 128, 192, 256)
    return Case(
        blocks=dc.replace(local, q=blocking, k=blocking), inputs=inputs, rows=quarters, bounds=quarters,
        common=(256, 257),
    )  # fmt: skip


def sends_to_neighbours(how: How) -> tuple[int, int]:
    """Bytes of blocks and what says which, that this process sends, and its messages."""
    with counted_traffic() as traffic, mock.patch.object(dist, "P2POp", wraps=dist.P2POp) as messages:
        oracle.run(window().spread(processes.group(4), how), window().inputs, grads=False)
    return traffic["ids"] + traffic["blocks"], messages.call_count


@pytest.mark.parametrize("how", HOWS)
def test_a_local_pattern_sends_little(pool: Get, how: How) -> None:
    """At a density of 0.1, at most a quarter of what a ring of everything sends; to the neighbours alone."""
    case = window()
    video = dc.replace(case, rows=(0, case.rows[-1])).near(0)
    assert 0.09 < float(video.density().max()) < 0.11
    sent, messages = zip(*pool().run(sends_to_neighbours, how), strict=True)
    batch, _, heads, _ = case.inputs[1].shape
    everything = 2 * batch * heads * case.bounds[-1] * case.blocks.k.block * WIDTH * 4 * 3
    assert sum(sent) * 4 <= everything, (sum(sent), everything)
    assert messages == ((2, 4, 4, 2) if how == "ring" else (0, 0, 0, 0))


def sends_nothing(how: How) -> None:
    """Every process keeps to its own blocks, and does not even open a message."""
    group = processes.group(4)
    case = make(3, 4)
    diagonal = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    for rank in range(4):
        diagonal[..., 2 * rank : 2 * rank + 2, 2 * rank : 2 * rank + 2] = True
    side = Blocking(length=torch.full((1, 1, 8), 4, dtype=torch.int32), block=4)
    inputs = [torch.randn(2, 32, 2, WIDTH) for _ in range(3)]
    case = dc.replace(
        case, blocks=BlockMap.from_mask(diagonal, side), inputs=inputs, rows=(0, 2, 4, 6, 8), bounds=(0, 2, 4, 6, 8),
        common=(0, 0),
    )  # fmt: skip
    with counted_traffic() as traffic, mock.patch.object(dist, "P2POp", side_effect=AssertionError):
        oracle.run(case.spread(group, how), inputs)
    assert traffic["blocks"] == traffic["gradients"] == 0
    assert traffic["ids"] > 0


@pytest.mark.parametrize("how", HOWS)
def test_nothing_needed_is_nothing_sent(pool: Get, how: How) -> None:
    pool().run(sends_nothing, how)


def survives_checkpointing(how: How) -> None:
    group = processes.group(4)
    for seed in range(3):
        case = make(seed, 4)
        function = case.spread(group, how)
        found = oracle.run(function, case.inputs)
        again = oracle.run(lambda *x, f=function: checkpoint(f, *x, use_reentrant=False), case.inputs)
        assert all(torch.equal(value, again[name]) for name, value in found.items())


@pytest.mark.parametrize("how", HOWS)
def test_checkpointing_changes_nothing(pool: Get, how: How) -> None:
    pool().run(survives_checkpointing, how)


def test_a_process_alone_attends() -> None:
    """To the bit what the op gives, with no traffic, and no gradient through the LSE either."""
    case = make(2, 1)
    plain = oracle.run(lambda *x: vsparse.block_sparse_attention(*x, case.blocks, scale=case.scale)[0], case.inputs)
    for how in HOWS:
        with counted_traffic() as traffic:
            found = oracle.run(case.spread(ALONE, how), case.inputs)
        assert not traffic
        assert all(torch.equal(found[name], value) for name, value in plain.items())
        q, k, v = (x.requires_grad_() for x in case.inputs)
        assert not sharded_attention(
            q, k, v, case.blocks, group=ALONE, bounds=case.bounds, common=case.common, how=how
        )[1].requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"how": "star"}, "how must be one of"),
        ({"bounds": (0, 4)}, "bounds must be 3 ascending"),
        ({"bounds": (0, 4, 3)}, "bounds must be 3 ascending"),
        ({"bounds": (0, 2, 5)}, "must be the K=6 key blocks, each once"),
        ({"common": (0, 1)}, "must be the K=6 key blocks, each once"),
        ({"common": (2, 4)}, "must be the K=6 key blocks, each once"),
        ({"bounds": (0, 4, 6)}, "k has S=12 slots, its blocking 4 blocks of 4"),
        ({"start": True}, "padded grid"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sent(change: dict[str, Any], words: str) -> None:
    side = Blocking(length=torch.full((1, 1, 6), 4, dtype=torch.int32), block=4)
    if change.get("start"):
        side = dc.replace(side, start=(torch.arange(6, dtype=torch.int32) * 4)[None, None])
    near = BlockMap.full(dc.replace(side, length=side.length[..., :2], start=None), side)
    given = {"bounds": (0, 3, 6), "common": (0, 0), "how": "ring"} | change
    q, k = torch.zeros(1, 8, 1, WIDTH), torch.zeros(1, 12, 1, WIDTH)
    with pytest.raises(ValueError, match=words):
        sharded_attention(
            q, k, k, near, group=Group(size=2, rank=0, handle=None), bounds=given["bounds"], common=given["common"],
            how=given["how"],
        )  # fmt: skip
