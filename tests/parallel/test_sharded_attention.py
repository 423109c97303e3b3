"""Attention over processes by the law: what each gets and sends back, and what travels for it."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, get_args
from unittest import mock

import oracle
import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import vsparse
from vsparse import BlockMap, Grid, TileLayout, patterns, reference
from vsparse.layouts import Blocking
from vsparse.parallel.collectives import ALONE, Group, counted_traffic, gather, total
from vsparse.parallel.needs import Shards, places, submap
from vsparse.parallel.parts import chosen_places
from vsparse.parallel.sharded import How, sharded_attention
from vsparse.parallel.spread import spread_attention

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

    def spread(self, group: Group, how: How) -> oracle.Function:
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


SEEDS = range(40)
SIZES = (2, 4)
TYPES = [(dtype, scale) for dtype in (torch.float32, torch.bfloat16) for scale in (1.0, 4.0, 16.0)]
TYPES.append((torch.float64, 1.0))


def drawn(seed: int, size: int) -> tuple[Case, int]:
    """A case in the dtype and at the scale that its seed says; each group of a pool takes cases of its own."""
    seed += 1000 * (torch.distributed.get_rank() // size)
    return make(seed, size, *TYPES[seed % len(TYPES)]), seed


def keeps_the_law(size: int, how: How) -> None:
    """In each process; the first of each group compares."""
    group = processes.group(size)
    for number in SEEDS:
        case, seed = drawn(number, size)
        with oracle.poison(), named(f"{how}, {size} processes, {seed=}"):
            compare(case.spread(group, how), case, seed, group)


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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", HOWS)
def test_it_is_the_attention_of_one_process(pool: Get, how: How, size: int) -> None:
    """Output, LSE and every gradient by the law, over random maps, lengths, text, bounds, dtypes and scales."""
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
            ("text", case.text),
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


def ignores_what_nobody_keeps(size: int, how: How) -> None:
    """NaN in every key block that no row of any process keeps changes no bit, of the result or of a gradient."""
    group = processes.group(size)
    for number in SEEDS:
        case, seed = drawn(number, size)
        q, *both = case.inputs
        clean, planted = (
            oracle.run(case.spread(group, how), [q, *x], seed)
            for x in (both, [oracle.plant_nan(x, case.blocks) for x in both])
        )
        for name, value in clean.items():
            assert torch.equal(value, planted[name]), f"{name}: {how}, {size} processes, {seed=}"


def sends_what_is_needed(size: int, how: How) -> None:
    """Bytes are those of the blocks that the dense mask shows, and one bit for each block."""
    group = processes.group(size)
    fetches = 2 if how == "ring" else 1  # its backward fetches again
    me, others = group.rank, [process for process in range(size) if process != group.rank]
    for number in SEEDS:
        case, seed = drawn(number, size)
        q, k, _ = case.inputs
        batch, _, heads, _ = q.shape
        keep = case.blocks.to_mask().expand(batch, heads, -1, -1)
        size_of_block = 2 * case.blocks.k.block * WIDTH * k.element_size()

        def amount(keep: Tensor, case: Case, by: int, of: int) -> int:
            mine = keep[:, :, case.rows[by] : case.rows[by + 1]]
            return int(mine[..., case.bounds[of] : case.bounds[of + 1]].any(2).sum())

        def message(blocks: int, size_of_block: int) -> int:
            return blocks * size_of_block if how == "ring" else padded(blocks * size_of_block)

        with counted_traffic() as traffic:
            oracle.run(case.spread(group, how), case.inputs, seed)
        del traffic["test"]
        bits = [batch * heads * -(-(case.bounds[p + 1] - case.bounds[p]) // 8) for p in others]
        wanted = Counter(
            ids=sum(padded(x) for x in bits),
            blocks=fetches * sum(message(amount(keep, case, p, me), size_of_block) for p in others),
            gradients=sum(message(amount(keep, case, me, p), size_of_block) for p in others),
        )
        assert +traffic == +wanted, f"{how}, {size} processes, {seed=}: {traffic}, {wanted}"


def padded(size: int) -> int:
    return -(-size // 16) * 16


@pytest.mark.parametrize("task", [ignores_what_nobody_keeps, sends_what_is_needed])
@pytest.mark.parametrize("how", HOWS)
def test_blocks_that_travel(pool: Get, task: Callable[[int, How], None], how: How) -> None:
    """Those that a row keeps, and no others."""
    for size in SIZES:
        pool().run(task, size, how)


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
        common=(256, 257), text="after",
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


def spreads(size: int) -> None:
    """The keys of one sequence over processes; each process takes other rows of the result to its loss."""
    group = processes.group(size)
    for number in SEEDS:
        case, seed = drawn(number, size)
        whole, block = case.blocks, case.blocks.k.block
        bounds = cuts(random.Random(seed), 0, whole.k.blocks, size)
        mine = slice(bounds[group.rank], bounds[group.rank + 1])
        near = BlockMap.from_mask(
            whole.to_mask()[..., mine], whole.q, dc.replace(whole.k, length=whole.k.length[..., mine])
        )
        if whole.key_bias is not None:
            near = dc.replace(near, key_bias=whole.key_bias[..., mine])

        def function(q: Tensor, k: Tensor, v: Tensor, near: BlockMap, mine: slice, block: int) -> tuple[Tensor, Tensor]:
            q, k, v = (_Shared.apply(x, group) for x in (q, k, v))
            k, v = (x[:, mine.start * block : mine.stop * block] for x in (k, v))
            out, lse = spread_attention(q, k, v, near, group=group)
            for x in (out, lse):
                every = gather(group, x[None], [1] * size, dim=0, what="test")
                assert all(torch.equal(x, y) for y in every)
            row = torch.arange(q.shape[1])[:, None, None] % size == group.rank
            return total(group, torch.where(row, out, 0), what="test", adjoint="once"), lse

        candidate = functools.partial(function, near=near, mine=mine, block=block)
        with oracle.poison(), named(f"{size} processes, {seed=}"):
            compare(candidate, case, seed, group)


@pytest.mark.parametrize("size", SIZES)
def test_rows_that_every_process_has(pool: Get, size: int) -> None:
    """Over the keys of all, the same to the bit everywhere, and every process's wishes add up in the gradients."""
    pool().run(spreads, size)


def test_a_process_alone_attends() -> None:
    """To the bit what the op gives, with no traffic, and no gradient through the LSE either."""
    case = make(2, 1)
    for how in HOWS:
        with counted_traffic() as traffic:
            found = oracle.run(case.spread(ALONE, how), case.inputs)
        plain = oracle.run(lambda *x: vsparse.block_sparse_attention(*x, case.blocks)[0], case.inputs)
        assert not traffic
        assert all(torch.equal(found[name], value) for name, value in plain.items())
    q, k, v = (x.requires_grad_() for x in case.inputs)
    assert not spread_attention(q, k, v, case.blocks, group=ALONE)[1].requires_grad


def test_maps_over_a_part_of_the_keys() -> None:
    """A submap is valid and keeps what the map keeps of its part; lengths and bias follow their blocks."""
    for seed in SEEDS:
        blocks = make(seed, 4).blocks
        chosen = blocks.kept() if seed % 2 else torch.arange(blocks.k.blocks)[None, None] % 3 == seed % 3
        if not bool(chosen.any()):
            continue
        # Out of order, as in the buffer of a gather: what stands first in the sequence stands last here.
        place, room = places(chosen.flip(-1)).flip(-1), int(chosen.sum(-1).max())
        near = submap(blocks, place, room).validate()
        whole, part = blocks.to_mask(), near.to_mask()
        stands = place[..., None] == torch.arange(room)
        assert torch.equal(part, (whole[..., None] & stands[:, :, None]).any(-2)), seed
        for mine, theirs in ((near.k.length, blocks.k.length), (near.key_bias, blocks.key_bias)):
            if mine is not None and theirs is not None:
                assert torch.equal(mine, (theirs[..., None] * stands).sum(-2)), seed


def test_maps_are_cut_without_reading_them() -> None:
    """No step between the exchange of needs and the attention asks a tensor for a number."""
    case = make(2, 4)
    shards = Shards(
        group=Group(size=4, rank=1, handle=None), blocks=case.blocks.k.blocks, bounds=case.bounds, common=case.common
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        chosen = case.blocks.kept() & ~shards.holds(torch.device("cpu"))
        near = submap(case.blocks, places(chosen), 5)
        found = chosen_places(chosen.expand(2, 3, -1), 7, places(chosen))
        taken = found.take(*(torch.empty(2, 5 * 4, 3, WIDTH) for _ in range(2)), 4)
    assert near.k.blocks == 5
    assert taken.shape == (2, 7, 4, WIDTH)


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
