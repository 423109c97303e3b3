"""Maps over a part of the key blocks, and the places of those blocks."""

from __future__ import annotations

import torch
from parallel_cases import SEEDS, WIDTH, make
from torch._subclasses import FakeTensorMode

from vsparse.parallel.collectives import Group
from vsparse.parallel.needs import Shards, places, submap
from vsparse.parallel.parts import chosen_places


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
