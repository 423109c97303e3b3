"""The ops by their schemas: gradients by finite differences, opcheck, fakes, metamorphic identities, refusals."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import strategies
import torch
from torch import Tensor
from torch.nn import functional as F

import vsparse
from vsparse import BlockMap, Grid, RasterLayout, TileLayout
from vsparse.layouts import Blocking
from vsparse.ops.boundary import as_tensors

OPS = torch.ops.vsparse


def sides(seed: int = 1, ragged: bool = False) -> tuple[Blocking, Blocking]:
    q = strategies.blocking(4, 3, seed=seed, lead=(2, 1))
    return q, strategies.blocking(5, 2, seed=seed + 1, ragged=ragged)


def tensors(q: Blocking, k: Blocking, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, strategies.slots(q), 2, 4), *[(2, strategies.slots(k), 2, 4)] * 2]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def finite(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without a key have an LSE of -inf, which finite differences cannot use."""
    return out, torch.where(lse.isinf(), 0, lse)


def attention_case(ragged: bool = False, bias: bool = False) -> tuple[list[Tensor], BlockMap]:
    q, k = sides(ragged=ragged)
    blocks = strategies.block_map(q, k, seed=3, lead=(2, 2), density=0.5)
    key_bias = torch.randn(1, 2, k.blocks, generator=torch.Generator().manual_seed(5)) if bias else None
    return tensors(q, k), BlockMap(blocks.index, blocks.count, q, k, key_bias)


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_attention(ragged: bool, bias: bool) -> None:
    inputs, blocks = attention_case(ragged, bias)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda q, k, v: finite(*vsparse.block_sparse_attention(q, k, v, blocks)), leaves)


def test_gradcheck_search() -> None:
    q, _ = sides()
    leaves = [x.requires_grad_() for x in tensors(q, q)]
    assert torch.autograd.gradcheck(lambda q_, k, v: finite(*vsparse.search_attention(q_, k, v, q)[:2]), leaves)
    assert not vsparse.search_attention(*leaves, q)[2].requires_grad


@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck_pool(ragged: bool) -> None:
    _, k = sides(ragged=ragged)
    x = tensors(k, k)[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda y: vsparse.block_pool(y, k), [x])
    mean, similarity = vsparse.block_pool(x, k, self_similarity=True)
    assert mean.requires_grad
    assert not similarity.requires_grad


@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck_linear(ragged: bool) -> None:
    inputs, blocks = attention_case(ragged)
    leaves = [inputs[0].abs().requires_grad_(), inputs[1].abs().requires_grad_(), inputs[2].requires_grad_()]
    assert torch.autograd.gradcheck(lambda q, k, v: vsparse.block_linear_attention(q, k, v, blocks), leaves)


@pytest.mark.parametrize("ragged", [False, True])
def test_linear_attention_by_hand(ragged: bool) -> None:
    """Token by token over the kept pairs; with empty rows, and NaN in the key blocks that nobody keeps."""
    (q, k, v), blocks = attention_case(ragged)
    pairs = oracle.pairs(blocks, q.shape[1], k.shape[1])
    assert bool((blocks.count == 0).any())

    def hand(dtype: torch.dtype) -> Tensor:
        weight = torch.einsum("bqhd,bkhd->bhqk", q.abs().to(dtype), k.abs().to(dtype)) * pairs
        total = weight.sum(-1, keepdim=True)
        return torch.einsum("bhqk,bkhd->bqhd", torch.where(total > 0, weight / total, 0), v.to(dtype))

    given = [x.float() for x in (q.abs(), *(oracle.plant_nan(x, blocks) for x in (k.abs(), v)))]
    found = vsparse.block_linear_attention(*given, blocks)
    oracle.check("linear attention", found, hand(torch.float32), hand(torch.float64))


def test_linear_attention_refuses_a_key_bias() -> None:
    inputs, blocks = attention_case(bias=True)
    with pytest.raises(ValueError, match="the map has a key_bias"):
        vsparse.block_linear_attention(*inputs, blocks)


def test_gradcheck_merge() -> None:
    generator = torch.Generator().manual_seed(0)
    outs = [torch.randn(1, 3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: vsparse.merge_attention(x[:3], x[3:]), [*outs, *lses])


def test_gradcheck_reorder() -> None:
    x = tensors(*sides())[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda y: OPS.reorder(y, *orders()), [x])


def test_merge_of_empty_parts() -> None:
    """Two LSE of -inf: their difference is NaN unless it is guarded."""
    out, lse = torch.randn(1, 2, 1, 4), torch.tensor([[[0.5], [-torch.inf]]])
    nothing = torch.full_like(lse, -torch.inf)
    leaves = [x.requires_grad_() for x in (out, lse, torch.zeros_like(out), nothing)]
    merged, total = vsparse.merge_attention([leaves[0], leaves[2]], [leaves[1], leaves[3]])
    assert torch.equal(merged[:, 0], out[:, 0])
    assert torch.equal(merged[:, 1], torch.zeros_like(merged[:, 1]))
    assert torch.equal(total, lse)
    (merged.sum() + torch.where(total.isinf(), 0, total).sum()).backward()
    assert all(bool(x.grad.isfinite().all()) for x in leaves)


# ---- schemas and fakes -------------------------------------------------------------------------------------------


def orders() -> tuple[Tensor, Tensor]:
    """Where each of 14 slots comes from among 12 rows, and where each row goes; another for the second head."""
    index = torch.tensor([[[3, -1, 0, 11, 7, -1, 1, -1, 2, 10, 9, 8, -1, 5], [*range(6), -1, -1, *range(6, 12)]]])
    inverse = torch.full((1, 2, 13), -1)
    inverse.scatter_(-1, torch.where(index < 0, 12, index), torch.arange(14).expand_as(index))
    return index, inverse[..., :12].contiguous()


def op_cases() -> dict[str, tuple[Callable[..., object], tuple[object, ...]]]:
    (q, k, v), blocks = attention_case()
    flat, side = as_tensors(blocks), blocks.q
    out, lse = vsparse.block_sparse_attention(q, k, v, blocks)
    grad_lse = torch.where(lse.isinf(), 0, torch.ones_like(lse))
    outs, lses = [out, out + 1], [lse, lse + 1]
    mass = (q, k, lse, side.length, blocks.k.length, None, None)
    rest = (side.block, blocks.k.block, 0.5)
    return {
        "attention": (OPS.block_sparse_attention, (q, k, v, *flat, 0.5, None)),
        "attention backward": (OPS.block_sparse_attention_backward, (out, grad_lse, q, k, v, out, lse, *flat, 0.5)),
        "mass": (OPS.block_mass, (*mass, None, None, None, *rest)),
        "mass of candidates": (OPS.block_mass, (*mass, blocks.index, blocks.count, None, *rest)),
        "mass of rows": (OPS.block_mass, (*mass, None, None, torch.tensor([0, 2]), *rest)),
        "search": (OPS.search_attention, (q, q, q, side.length, None, side.block, 0.5)),
        "pool": (OPS.block_pool, (q, side.length, None, side.block)),
        "pool backward": (OPS.block_pool_backward, (vsparse.block_pool(q, side), q, side.length, None, side.block)),
        "merge": (OPS.merge_attention, (outs, lses)),
        "reorder": (OPS.reorder, (q, *orders())),
        "merge backward": (OPS.merge_attention_backward, (out, grad_lse, outs, lses)),
    }


@pytest.mark.parametrize("name", list(op_cases()))
def test_opcheck(name: str) -> None:
    op, args = op_cases()[name]
    trained = {"attention", "search", "pool", "merge", "reorder"}

    def leaf(x: object) -> object:
        if isinstance(x, list):
            return [leaf(y) for y in x]
        return x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x

    ready = tuple(leaf(x) for x in args) if name in trained else args
    torch.library.opcheck(op.default, ready)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_report_real_shapes_dtypes_and_strides(dtype: torch.dtype) -> None:
    for op, args in op_cases().values():
        wide = {"lse"}

        def narrow(x: object) -> object:
            if isinstance(x, list):
                return [narrow(y) for y in x]
            floating = isinstance(x, Tensor) and x.is_floating_point()
            return x.to(dtype if x.ndim == 4 else torch.float32) if floating else x  # type: ignore[union-attr]

        assert wide
        if any(isinstance(x, list) for x in args):
            continue
        oracle.strides_agree(op, [narrow(x) for x in args])


# ---- identities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_keep_all_is_dense_attention(dtype: torch.dtype, scale: float) -> None:
    layout = TileLayout(Grid(t=3, h=5, w=4), tile=(2, 2, 3))
    blocking = layout.bind()
    generator = torch.Generator().manual_seed(int(scale))
    inputs = [(torch.randn(2, 60, 2, 16, generator=generator) * scale).to(dtype) for _ in range(3)]

    def sparse(*x: Tensor) -> Tensor:
        packed = (blocking.pack(y) for y in x)
        return blocking.unpack(vsparse.block_sparse_attention(*packed, BlockMap.full(blocking))[0])

    def dense(*x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x)).transpose(1, 2)

    oracle.assert_identity(sparse, dense, inputs)


def test_moving_tokens_and_layout_together_changes_nothing() -> None:
    grid = Grid(t=4, h=4, w=4)
    raster, tile = RasterLayout(grid, block=8).bind(), TileLayout(grid, tile=(2, 2, 2)).bind()
    q, k, v = (
        torch.randn(1, 64, 2, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)
    )
    keep = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    moved = [raster.unpack(tile.pack(x)) for x in (q, k, v)]
    by_tile = vsparse.block_sparse_attention(*(tile.pack(x) for x in (q, k, v)), BlockMap.from_mask(keep, tile))
    by_raster = vsparse.block_sparse_attention(*(raster.pack(x) for x in moved), BlockMap.from_mask(keep, raster))
    assert torch.equal(by_tile[0], by_raster[0])
    assert torch.equal(by_tile[1], by_raster[1])


def test_mass_of_fresh_lse_sums_to_valid_rows() -> None:
    q, _ = sides()
    x = tensors(q, q)
    _, lse, mass = vsparse.search_attention(*x, q)
    assert torch.equal(mass, vsparse.block_mass(x[0], x[1], lse, q))
    expected = q.length.double().expand(2, 2, -1) * (q.length.sum(-1, keepdim=True) > 0)
    oracle.check("rows", mass.sum(-1), mass.float().sum(-1).double(), expected)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_refuses_in_words() -> None:
    (q, k, v), blocks = attention_case()
    attend = vsparse.block_sparse_attention
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: attend(q[:, :-1], k, v, blocks), "q has S="),
        (lambda: attend(q[0], k, v, blocks), "q must be a floating tensor"),
        (lambda: attend(q.long(), k, v, blocks), "q must be a floating tensor"),
        (lambda: attend(q, k[:, :-1], v, blocks), "k has S="),
        (lambda: attend(q, k, v[:1], blocks), "v must have the shape of k"),
        (lambda: attend(q, k.float(), v, blocks), "k must be torch.float64"),
        (lambda: attend(q[:, :, :1], k, v, blocks), "share B, H and D|leading sizes"),
        (lambda: attend(q[:1], k[:1], v[:1], blocks), "leading sizes"),
        (lambda: attend(q.to("meta"), k.to("meta"), v.to("meta"), blocks), "block map lies on cpu"),
        (lambda: vsparse.block_mass(q, k, q[..., 0][:, :-1], blocks.q, blocks.k), "lse must be"),
        (lambda: vsparse.merge_attention([], []), "at least one"),
        (lambda: vsparse.merge_attention([q], [q]), "part 0"),
        (lambda: vsparse.block_pool(q[:, :-1], blocks.q), "x has S="),
        (lambda: attend(q, k, v, blocks, scale=float("nan")), "scale must be a finite number"),
        (lambda: attend(q, k, v, blocks, skip_threshold=-1.0), "skip_threshold must be at least 0"),
    ]
    for call, word in cases:
        with pytest.raises(ValueError, match=word):
            call()
    assert vsparse.unsupported(q, k, v, blocks) == []
    assert "k must be" in vsparse.unsupported(q, k.float(), v, blocks)[0]
    with pytest.raises(NotImplementedError, match="skip_threshold"):
        attend(q, k, v, blocks, skip_threshold=10.0)


def test_no_implementation_is_a_list_of_reasons() -> None:
    from vsparse import backend

    (q, k, v), blocks = attention_case()
    found = backend.reasons("block_sparse_attention", "xpu", q, k, v, blocks, scale=1.0, skip_threshold=None)
    assert found == ["block_sparse_attention: no implementation for device 'xpu'; there is one for cpu, cuda"]
    with pytest.raises(RuntimeError, match="already registered"):
        backend.register(
            "block_sparse_attention", backend.implementations("block_sparse_attention", "cpu")[0], priority=0
        )
