"""The bytes of a whole forward, against what the division says must move."""

from __future__ import annotations

import dataclasses as dc
from collections import Counter
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import rows
from processes import Get
from torch import Tensor

import vsparse
from vsparse import BlockMap
from vsparse.parallel import shard
from vsparse.parallel.collectives import counted_traffic
from vsparse.parallel.context import parse
from vsparse.parallel.sharded import sharded_attention
from vsparse.parallel.share import even

BATCH, WIDTH, LAYERS, HEADS = 2, 16, 2, 5
LATENT = 4 * 2 * 2  # channels of a token of the output


def _padded(elements: int) -> int:
    """Bytes in float32, as messages have them."""
    return -(-elements * 4 // 16) * 16


def _moved(method: str, setting: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that this process sends in a forward, and those that it must, as far as they follow from sizes."""
    parallel = parse(setting)
    model, inputs = rows.build("wan", heads=HEADS)
    options: dict[str, Any] = {**rows.METHODS[method].sparse, "schedule": vsparse.Schedule()}
    with rows.randomise(vsparse.apply(model, method, parallel=parallel, **options)) as patch:
        values = rows.prompt("wan", inputs, rows.SMALL, batch=BATCH)
        with counted_traffic() as traffic:
            rows.forward(model, values)
        call = patch.sites[0].call
        share = call.share
        cut, heads = share.cut, even(HEADS, parallel.ulysses)
        group, rows_group = cut.groups.heads, cut.groups.rows
        mine = cut.shards[rows_group.rank]
        wanted = {"output": _padded(BATCH * cut.video * LATENT) * (parallel.size - 1)}
        if group.size > 1:
            others = [i for i in range(group.size) if i != group.rank]
            there = sum(3 * _padded(BATCH * mine[group.rank] * heads[i] * WIDTH) for i in others)
            back = sum(_padded(BATCH * mine[i] * heads[group.rank] * WIDTH) for i in others)
            wanted["heads"] = LAYERS * (there + back)
        return dict(traffic), wanted


@pytest.mark.parametrize("setting", ["ulysses=2", "ulysses=4", "ulysses=2,ring=2", "gather=4"])
def test_sizes_alone(pool: Get, setting: str) -> None:
    """Heads there and back, and the output; no key where only heads are shared."""
    for traffic, wanted in pool().run(_moved, "adaspa", setting):
        assert {name: traffic.get(name) for name in wanted} == wanted
        # In its search AdaSpa attends to all keys.
        assert ("keys" in traffic) == (parse(setting).rows > 1)


def _blocks(setting: str) -> tuple[int, int, int]:
    """Bytes of blocks sent by this process with a sparse map, with one that keeps all, and those of all keys."""
    parallel = parse(setting)
    found = []
    for density in (0.3, 1.0):
        model, inputs = rows.build("wan", heads=HEADS)
        options = {**rows.METHODS["vsa"].sparse, "density": density}
        with rows.randomise(vsparse.apply(model, "vsa", parallel=parallel, **options)) as patch:
            with counted_traffic() as traffic:
                rows.forward(model, rows.prompt("wan", inputs, rows.SMALL, batch=BATCH))
            shard = patch.sites[0].call.share.shard
            slots = shard.own.blocks * shard.own.block
            heads = len(patch.sites[0].call.share.mine) if parallel.ulysses > 1 else HEADS
        found.append(traffic["blocks"])
    return found[0], found[1], LAYERS * 2 * 4 * BATCH * slots * heads * WIDTH * (parallel.rows - 1)


@pytest.mark.parametrize("setting", ["ring=2", "gather=2", "ulysses=2,ring=2"])
def test_only_blocks_that_are_kept_move(pool: Get, setting: str) -> None:
    for sparse, full, everything in pool().run(_blocks, setting):
        assert sparse < full == everything


# ---- all that VSA sends ------------------------------------------------------------------------------------------

RAGGED = (3, 3, 9)  # tiles of 2 x 4 x 4: two in time, three in width, none of them whole
BLOCK = 16
FORWARD = {
    "ulysses": {"heads", "heads of all"},
    "ring": {"pooled", "ids", "blocks"},
    "gather": {"pooled", "ids", "blocks"},
}
BACKWARD = {
    "ulysses": {"heads", "heads of all"},
    "ring": {"pooled", "blocks", "gradients"},
    "gather": {"pooled", "gradients"},
}


@dc.dataclass(frozen=True, kw_only=True)
class Seen:
    """What a process has sent, and what follows for it from sizes and from the maps of all.

    Args:
        inference, forward, backward: Bytes by what they were sent for; the first without a gradient.
        sizes: Of forward and backward, what follows from sizes alone.
        wanted: Of each call of attention, the blocks that each process of the row group holds and rows here keep.
    """

    inference: Counter[str]
    forward: Counter[str]
    backward: Counter[str]
    sizes: tuple[Counter[str], Counter[str]]
    wanted: list[list[int]]


def _everything(host: str, setting: str, checkpointing: bool) -> Seen:
    model, inputs = rows.build(host, heads=HEADS)
    values = rows.prompt(host, inputs, RAGGED, batch=BATCH)
    wanted: list[list[int]] = []

    def kept(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, **options: Any) -> Any:
        keep, bounds = blocks.to_mask().expand(*q.shape[:3:2], -1, -1), options["bounds"]
        runs = [slice(*bounds[i : i + 2]) for i in range(len(bounds) - 1)]
        wanted.append([int(keep[..., run].any(2).sum()) for run in runs])
        return sharded_attention(q, k, v, blocks, **options)

    options = rows.METHODS["vsa"].sparse
    with rows.randomise(vsparse.apply(model, "vsa", parallel=parse(setting), **options)) as patch:
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with counted_traffic() as inference:
            rows.forward(model, values)
        with counted_traffic() as forward, mock.patch.object(shard, "sharded_attention", kept):
            out = model(**values)[0]
        with counted_traffic() as backward:
            out.square().sum().backward()
        sizes = _by_heads(patch.sites[0].call), _by_rows(patch.sites[0].call)
        once = _padded(BATCH * patch.sites[0].call.share.cut.video * LATENT) * (parse(setting).size - 1)
    there, back = (sum((one[i] for one in sizes), Counter()) for i in range(2))
    for name in there:
        there[name] *= LAYERS
    for name in back:
        back[name] *= LAYERS
    there["output"] = once
    return Seen(inference=inference, forward=forward, backward=backward, sizes=(there, back), wanted=wanted)


def _by_heads(call: Any) -> tuple[Counter[str], Counter[str]]:
    """Of one layer, forward and backward: q, k, v there, the output with its text back, the coarse one everywhere."""
    cut, text = call.share.cut, call.grid.text
    me, tokens, heads = cut.groups.heads.rank, cut.shards[cut.groups.rows.rank], even(HEADS, cut.groups.heads.size)
    tiles = call.rows.tiles().blocks
    forward, backward = Counter[str](), Counter[str]()
    for i in set(range(len(heads))) - {me}:
        forward["heads"] += 3 * _padded(BATCH * tokens[me] * heads[i] * WIDTH)
        forward["heads"] += _padded(BATCH * (tokens[i] + text) * heads[me] * WIDTH)
        backward["heads"] += 3 * _padded(BATCH * tokens[i] * heads[me] * WIDTH)
        backward["heads"] += _padded(BATCH * (tokens[me] + text) * heads[i] * WIDTH)
        forward["heads of all"] += _padded(BATCH * tiles * heads[me] * WIDTH)
        backward["heads of all"] += _padded(BATCH * tiles * heads[i] * WIDTH)
    return forward, backward


def _by_rows(call: Any) -> tuple[Counter[str], Counter[str]]:
    """Of one layer, forward and backward: means of k and v, a bit for each block, text rows and their gradients."""
    part, groups = call.share.shard, call.share.cut.groups
    forward, backward = Counter[str](), Counter[str]()
    if part is None:
        return forward, backward
    heads = even(HEADS, groups.heads.size)[groups.heads.rank]
    tiles = [last - first for first, last in pairwise(part.tiles)]
    slots = sum(part.text) * part.layout.tiled.block
    for i in set(range(len(tiles))) - {part.group.rank}:
        forward["pooled"] += _padded(BATCH * tiles[part.group.rank] * heads * 2 * WIDTH)
        backward["pooled"] += _padded(BATCH * tiles[i] * heads * 2 * WIDTH)
        blocks = tiles[i] * part.layout.tiled.block // BLOCK
        forward["ids"] += -(-BATCH * heads * -(-blocks // 8) // 16) * 16
        if slots:
            forward["outputs"] += _padded(BATCH * slots * heads * WIDTH) + _padded(BATCH * slots * heads)
            backward["gradients"] += _padded(BATCH * slots * heads * WIDTH)
    return forward, backward


@pytest.mark.parametrize(
    ("host", "setting", "checkpointing"),
    [
        ("hunyuan_video", "ulysses=2", False),
        ("hunyuan_video", "ring=4", False),
        ("hunyuan_video", "gather=4", False),
        ("hunyuan_video", "ulysses=2,ring=2", False),
        ("wan", "ulysses=2,gather=2", True),
        pytest.param("hunyuan_video", "ulysses=2,gather=2", True, marks=pytest.mark.full),
        pytest.param("hunyuan_video", "ulysses=2,ring=2", True, marks=pytest.mark.full),
        pytest.param("wan", "ulysses=4", False, marks=pytest.mark.full),
        pytest.param("wan", "ring=4", False, marks=pytest.mark.full),
        pytest.param("wan", "gather=2", False, marks=pytest.mark.full),
    ],
)
def test_every_byte_is_explained(pool: Get, host: str, setting: str, checkpointing: bool) -> None:
    """Forward and training, over tiles that are not whole, with text that every process holds, and without."""
    parallel = parse(setting)
    seen: list[Seen] = pool().run(_everything, host, setting, checkpointing)
    used = [name for name in FORWARD if getattr(parallel, name) > 1]
    text = {"outputs"} if host != "wan" and parallel.rows > 1 else set()
    size = 2 * BLOCK * WIDTH * 4  # K and V of a block; whole messages of them need no padding
    for rank, one in enumerate(seen):
        forward, backward = one.sizes
        # Those that share tokens with this process: `ulysses` places apart.
        first = rank - rank % parallel.size + rank % parallel.ulysses
        others = [seen[first + i * parallel.ulysses] for i in range(parallel.rows)]
        me = rank % parallel.size // parallel.ulysses
        if parallel.rows > 1:
            lent = sum(call[me] for i, other in enumerate(others) if i != me for call in other.wanted)
            fetched = sum(amount for call in one.wanted for i, amount in enumerate(call) if i != me)
            forward["blocks"] = size * lent
            backward["gradients"] += size * fetched
            backward["blocks"] = size * lent if parallel.how == "ring" else 0
        if checkpointing:
            backward.update({name: amount for name, amount in forward.items() if name != "output"})
        assert one.inference == one.forward == forward
        assert one.backward == backward
        assert set(one.forward) == set.union({"output"}, text, *(FORWARD[name] for name in used))
        if not checkpointing:
            assert set(one.backward) == set.union(*(BACKWARD[name] for name in used))
