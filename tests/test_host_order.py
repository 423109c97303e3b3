"""Attention from host order to host order: the same numbers as pack, attend and unpack, with less kept behind."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import vsparse
from vsparse import BlockMap, Grid, PartitionLayout, RasterLayout, TileLayout, reference
from vsparse.layouts import Blocking

RAGGED = Grid(t=3, h=5, w=6)
TEXT = Grid(t=2, h=3, w=5, text_after=7)
BLOCKINGS: dict[str, Callable[[], Blocking]] = {
    "ragged tiles": lambda: TileLayout(RAGGED, tile=(2, 2, 4)).bind(),
    "tiles of several blocks": lambda: TileLayout(RAGGED, tile=(2, 4, 4), block=8).bind(),
    "host order": lambda: RasterLayout(Grid(t=3, h=4, w=4), block=8).bind(),
    "text": lambda: TileLayout(TEXT, tile=(2, 2, 4)).bind(torch.tensor([7, 2])),
    "text in host order": lambda: RasterLayout(Grid(t=2, h=4, w=4, text_after=8), block=8).bind(torch.tensor([8, 3])),
}


def tensors(blocking: Blocking, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    assert blocking.layout is not None
    generator = torch.Generator().manual_seed(blocking.layout.tokens)
    shape = (2, blocking.layout.tokens, 2, 8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def random_map(blocking: Blocking, seed: int = 0) -> BlockMap:
    keep = torch.rand(2, 2, blocking.blocks, blocking.blocks, generator=torch.Generator().manual_seed(seed)) < 0.4
    return BlockMap.from_mask(keep, blocking)


def halves(blocking: Blocking) -> list[BlockMap]:
    """A map as two disjoint ones: a row may be empty in either."""
    keep = random_map(blocking).to_mask()
    first = torch.rand(keep.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    return [BlockMap.from_mask(keep & first, blocking), BlockMap.from_mask(keep & ~first, blocking)]


def attend(blocking: Blocking, *maps: BlockMap) -> Callable[..., Tensor]:
    return lambda *x: vsparse.host_order_attention(*x, *maps, packed=[blocking.pack(y) for y in x])


@pytest.mark.parametrize("name", BLOCKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_map_is_pack_attend_unpack_to_the_bit(name: str, dtype: torch.dtype) -> None:
    blocking = BLOCKINGS[name]()
    blocks, inputs = random_map(blocking), tensors(blocking, dtype)

    def apart(*x: Tensor) -> Tensor:
        return blocking.unpack(vsparse.block_sparse_attention(*(blocking.pack(y) for y in x), blocks)[0])

    found, wanted = oracle.run(attend(blocking, blocks), inputs), oracle.run(apart, inputs)
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.parametrize("name", ["ragged tiles", "text"])
def test_disjoint_maps_are_one(name: str) -> None:
    """Against the merged parts, and by finite differences."""
    blocking = BLOCKINGS[name]()
    maps = halves(blocking)

    def merged(*x: Tensor) -> Tensor:
        q, k, v = (blocking.pack(y) for y in x)
        parts = [reference.block_sparse_attention(q, k, v, one, scale=8**-0.5) for one in maps]
        return blocking.unpack(reference.merge_attention(*zip(*parts, strict=True))[0])

    whole = oracle.fused(random_map(blocking), 8**-0.5)

    def fused(*x: Tensor) -> Tensor:
        return blocking.unpack(whole(*(blocking.pack(y) for y in x))[0])

    for dtype in (torch.float32, torch.bfloat16):
        oracle.assert_law(attend(blocking, *maps), merged, tensors(blocking, dtype), also=[fused])
    oracle.assert_identity(attend(blocking, *maps), merged, tensors(blocking))


def test_gradcheck() -> None:
    blocking = PartitionLayout(Grid(t=1, h=2, w=3), chunk=(1, 1, 2)).bind()
    leaves = [x.requires_grad_() for x in tensors(blocking, torch.float64)]
    assert torch.autograd.gradcheck(attend(blocking, *halves(blocking)), leaves)


@pytest.mark.parametrize("parts", [1, 2])
def test_it_keeps_what_dense_attention_keeps(parts: int) -> None:
    """q, k, v and the result as the host holds them, one LSE, and integers: no packed copy, no part's own result."""
    blocking = BLOCKINGS["ragged tiles"]()
    assert blocking.layout is not None
    assert blocking.layout.padded
    leaves = [x.requires_grad_() for x in tensors(blocking)]
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.is_floating_point():
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        out = attend(blocking, *(halves(blocking) if parts == 2 else [random_map(blocking)]))(*leaves)
    for x in (*leaves, out):
        assert kept.pop(x.untyped_storage().data_ptr()).shape == x.shape
    assert [x.shape for x in kept.values()] == [(2, blocking.layout.slots, 2)]


def test_pooling_keeps_nothing_of_what_it_averages() -> None:
    blocking = BLOCKINGS["ragged tiles"]()
    assert blocking.layout is not None
    x, kept = torch.randn(1, blocking.layout.slots, 2, 8, requires_grad=True), []
    with saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):  # type: ignore[func-returns-value]
        vsparse.block_pool(x, blocking).sum().backward()
    assert [y.shape for y in kept] == [blocking.length.shape]


@pytest.mark.parametrize("parts", [1, 2])
def test_opcheck(parts: int) -> None:
    from vsparse.ops import host_order

    blocking = BLOCKINGS["ragged tiles"]()
    maps = halves(blocking)[:parts]
    seen: list[tuple[object, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        op = host_order._host_order
        patch.setattr(host_order, "_host_order", lambda *args: seen.append(args) or op(*args))
        attend(blocking, *maps)(*(x.requires_grad_() for x in tensors(blocking)))
    torch.library.opcheck(torch.ops.vsparse.host_order_attention.default, seen[0])  # type: ignore[attr-defined]


def test_refuses_in_words() -> None:
    blocking = BLOCKINGS["ragged tiles"]()
    x, one = tensors(blocking), random_map(blocking)
    packed = [blocking.pack(y) for y in x]
    bare = Blocking(length=blocking.length, block=blocking.block)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: vsparse.host_order_attention(*x, packed=packed), "takes maps.*got 0"),
        (lambda: vsparse.host_order_attention(*x, one, one, packed=packed, skip_threshold=1.0), "exactly one; got 2"),
        (lambda: vsparse.host_order_attention(*packed, one, packed=packed), "90 tokens"),
        (lambda: vsparse.host_order_attention(*x, random_map(bare), packed=packed), "must carry the layout"),
        (lambda: vsparse.host_order_attention(*x, one, packed=x), "q has S="),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
