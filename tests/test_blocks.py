"""BlockMap: lists, masks, bits and key-major lists say the same; density counts pairs."""

from __future__ import annotations

import dataclasses as dc

import oracle
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from vsparse import BlockMap


@st.composite
def maps(draw: st.DrawFn) -> BlockMap:
    lead = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]))
    seed = draw(strategies.seeds)
    q = strategies.blocking(draw(st.integers(1, 6)), draw(st.integers(1, 5)), seed=seed, lead=(lead[0], 1))
    k = strategies.blocking(
        draw(st.integers(1, 20)), draw(st.integers(1, 5)), seed=seed + 1, ragged=draw(st.booleans())
    )
    return strategies.block_map(q, k, seed=seed, lead=lead, density=draw(st.floats(0.0, 1.0)))


@given(blocks=maps())
def test_mask_bits_and_lists_agree(blocks: BlockMap) -> None:
    blocks.validate()
    keep = blocks.to_mask()
    again = BlockMap.from_mask(keep, blocks.q, blocks.k)
    assert torch.equal(again.validate().to_mask(), keep)
    assert torch.equal(again.count, blocks.count)
    bits = blocks.to_bits()
    assert bits.shape[-1] == -(-blocks.k.blocks // 8)
    assert torch.equal(BlockMap.from_bits(bits, blocks.q, blocks.k, capacity=blocks.capacity).to_mask(), keep)


@given(blocks=maps())
def test_transpose_lists_the_rows_of_each_key_block(blocks: BlockMap) -> None:
    keep, turned = blocks.to_mask(), blocks.transpose()
    queries, full = keep.shape[2], blocks.count == blocks.k.blocks
    for b in range(keep.shape[0]):
        for h in range(keep.shape[1]):
            offset, row = turned.offset[b, h].tolist(), turned.row[b, h].tolist()
            listed = keep[b, h] & ~full[b, h, :, None]
            for j in range(blocks.k.blocks):
                assert row[offset[j] : offset[j + 1]] == listed[:, j].nonzero().flatten().tolist()
            assert set(row[offset[-1] :]) <= {queries}
            whole = full[b, h].nonzero().flatten().tolist()
            assert turned.full[b, h].tolist() == whole + [queries] * (queries - len(whole))
            assert turned.full_count[b, h] == len(whole)


@given(blocks=maps())
def test_density_counts_token_pairs(blocks: BlockMap) -> None:
    rows, columns = strategies.slots(blocks.q), strategies.slots(blocks.k)
    pairs = oracle.pairs(blocks, rows, columns).sum((-1, -2)).double()
    computed, possible = blocks.pairs()
    assert torch.equal(computed.expand_as(pairs), pairs)
    everything = oracle.pairs(BlockMap.full(blocks.q, blocks.k), rows, columns).sum((-1, -2)).double()
    assert torch.equal(possible.expand(everything.shape), everything)
    assert torch.equal(blocks.density().nan_to_num(-1), (computed / possible).nan_to_num(-1))


@given(blocks=maps(), seed=strategies.seeds)
def test_union_keeps_what_either_keeps(blocks: BlockMap, seed: int) -> None:
    other = strategies.block_map(blocks.q, blocks.k, seed=seed)
    assert torch.equal(blocks.union(other).validate().to_mask(), blocks.to_mask() | other.to_mask())
    with pytest.raises(NotImplementedError, match="key_bias"):
        dc.replace(blocks, key_bias=torch.zeros(1, 1, blocks.k.blocks)).union(other)


@pytest.mark.parametrize("filler", [-1, 2**31 - 1])
@given(blocks=maps())
def test_entries_past_the_count_are_never_read(filler: int, blocks: BlockMap) -> None:
    """Nor the list of a full row. A filler of -1 is no block: published lists end in it."""
    count, keys = blocks.count, blocks.k.blocks
    used = torch.arange(blocks.capacity) < torch.where(count == keys, 0, count)[..., None]
    other = dc.replace(blocks, index=torch.where(used, blocks.index, filler)).validate()
    assert torch.equal(other.to_mask(), blocks.to_mask())
    assert all(map(torch.equal, other.pairs(), blocks.pairs()))
    for name in ("offset", "row", "full", "full_count"):
        assert torch.equal(getattr(other.transpose(), name), getattr(blocks.transpose(), name))


def test_full_needs_no_lists() -> None:
    q, k = strategies.blocking(3, 4, seed=1), strategies.blocking(5, 2, seed=2)
    blocks = BlockMap.full(q, k).validate()
    assert blocks.capacity == 0
    assert bool(blocks.to_mask().all())


def test_refuses_in_words() -> None:
    q, k = strategies.blocking(3, 4, seed=1), strategies.blocking(5, 2, seed=2)
    blocks = strategies.block_map(q, k, seed=4, density=0.5)
    index, count = blocks.index, blocks.count
    cases = [
        (lambda: BlockMap(index.long(), count, q, k), "index must be int32"),
        (lambda: BlockMap(index, count[..., :2], q, k), "count must be int32"),
        (lambda: BlockMap(index[:, :, :2], count[..., :2], q, k), "query blocking"),
        (lambda: BlockMap(index, count, q, k, key_bias=torch.zeros(1, 1, 2)), "key_bias"),
        (lambda: BlockMap.from_mask(torch.zeros(1, 1, 3, 4, dtype=torch.bool), q, k), "keep must be bool"),
        (lambda: blocks.union(BlockMap.full(k, k)), "union"),
        (lambda: BlockMap(index, torch.full_like(count, -1), q, k).validate(), "count must lie"),
        (lambda: BlockMap(index, torch.full_like(count, 4), q, k).validate(), "count must lie"),
        (
            lambda: BlockMap(torch.full_like(index, 9), torch.ones_like(count), q, k).validate(),
            "got 9 at sample 0, head 0, block 0, entry 0",
        ),
        (lambda: BlockMap(torch.zeros_like(index), torch.full_like(count, 2), q, k).validate(), "ascending"),
    ]
    for build, word in cases:
        with pytest.raises(ValueError, match=word):
            build()
