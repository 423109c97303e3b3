"""The bytes of a whole forward, against what the division says must move."""

from __future__ import annotations

from typing import Any

import pytest
import rows
from processes import Get

import vsparse
from vsparse.parallel.collectives import counted_traffic
from vsparse.parallel.context import parse
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
