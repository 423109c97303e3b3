"""XAttention: antidiagonal sums, softmax over folds and top-p by hand, chunks, the faults of the released code."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from one_site import DIM, HEADS, Driven, attention, law, tensors
from oracle import assert_identity
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vsparse
from vsparse.methods import xattention
from vsparse.methods.xattention import XAttention, antidiagonal_mass

VIDEO = vsparse.Grid(t=3, h=5, w=7)
TEXT = vsparse.Grid(t=3, h=5, w=7, text_after=10)
BEFORE = vsparse.Grid(t=3, h=5, w=7, text_before=10)
GRIDS = pytest.mark.parametrize("grid", [VIDEO, TEXT, BEFORE], ids=["video", "text", "text before"])
LENGTHS = torch.tensor([7, 2], dtype=torch.int32)
KINDS = {
    "stride 4": XAttention(mass=0.6, stride=4, block=12),
    "stride 2": XAttention(mass=0.4, stride=2, block=8),
    "stride 1": XAttention(mass=0.7, stride=1, block=8),
}
METHODS = pytest.mark.parametrize("method", KINDS.values(), ids=KINDS)


def driven(method: XAttention, grid: vsparse.Grid) -> Driven:
    one = Driven(method, grid, LENGTHS if grid.text else None)
    one.module.double()
    return one


def folded(grid: vsparse.Grid, method: XAttention) -> list[list[int]]:
    """Video tokens of each fold; no fold straddles two blocks, the last may be short."""
    first, stop = grid.text_before, grid.text_before + grid.video
    blocks = [range(i, min(i + method.block, stop)) for i in range(first, stop, method.block)]
    return [list(block[i : i + method.stride]) for block in blocks for i in range(0, len(block), method.stride)]


def mass_by_hand(q: Tensor, k: Tensor, grid: vsparse.Grid, method: XAttention) -> Tensor:
    """``[blocks, blocks]`` of the video for one head: softmax over the folds of the keys, summed per block pair."""
    folds, stride = folded(grid, method), method.stride
    logits = torch.zeros(len(folds), len(folds), dtype=torch.float64)
    for (i, rows), (j, columns) in itertools.product(enumerate(folds), enumerate(folds)):
        for s in range(stride):
            if stride - 1 - s < len(rows) and s < len(columns):
                logits[i, j] += q[rows[stride - 1 - s]] @ k[columns[s]]
    share = (logits / (math.sqrt(DIM) * stride)).softmax(-1)
    where = torch.tensor([(fold[0] - grid.text_before) // method.block for fold in folds])
    member = torch.nn.functional.one_hot(where).double()
    return member.T @ share @ member


# ---- selection -----------------------------------------------------------------------------------------------------


@GRIDS
@METHODS
def test_selection_by_hand(grid: vsparse.Grid, method: XAttention) -> None:
    """The smallest set of best blocks with the mass, and all text."""
    q, k, v = (x.double() for x in tensors(grid, batch=2))
    one = driven(method, grid)
    one(q, k, v)
    token = torch.arange(grid.tokens)
    video = (token >= grid.text_before) & (token < grid.text_before + grid.video)
    where = (token - grid.text_before).clamp(0, grid.video - 1) // method.block
    wanted = (~video[:, None] | ~video).expand(2, HEADS, -1, -1).clone()
    sizes = set()
    for b, h in itertools.product(range(2), range(HEADS)):
        mass = mass_by_hand(q[b, :, h], k[b, :, h], grid, method)
        keep = torch.zeros_like(mass, dtype=torch.bool)
        for i, row in enumerate(mass):
            order = row.argsort(descending=True)
            total = row[order].cumsum(0) / row.sum()
            assert float((total - method.mass).abs().min()) > 1e-6, "a tie would decide"
            chosen = order[: int((total < method.mass).sum()) + 1]
            assert float(row[chosen].sum()) >= method.mass * float(row.sum()) > float(row[chosen[:-1]].sum())
            keep[i, chosen] = True
            sizes.add(len(chosen))
        wanted[b, h] |= keep[where][:, where] & video[:, None] & video
    assert len(sizes) > 2
    valid = one.valid()
    assert torch.equal(one.keep(), wanted & valid[:, None, None] & valid[:, None, :, None])


@GRIDS
def test_mass_by_hand_in_chunks(grid: vsparse.Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few query blocks go at a time; every fold hands out one unit."""
    method = KINDS["stride 4"]
    q, k, _ = (x.double() for x in tensors(grid, batch=2))
    one = driven(method, grid)
    blocking = one.call.blocking
    q_packed, k_packed = blocking.pack(q), blocking.pack(k)
    whole = antidiagonal_mass(q_packed, k_packed, blocking, method.stride)
    text = torch.zeros(one.layout.blocks, dtype=torch.bool) if blocking.text is None else blocking.text
    by_hand = torch.stack(
        [torch.stack([mass_by_hand(q[b, :, h], k[b, :, h], grid, method) for h in range(HEADS)]) for b in range(2)]
    )
    slack = torch.finfo(torch.float64).eps * grid.tokens
    assert float((whole[:, :, ~text][..., ~text] - by_hand).abs().max()) <= slack
    assert float(whole[:, :, text].abs().sum() + whole[..., text].abs().sum()) == 0.0
    for room in (1, 2 * HEADS * 3 * 3 * one.layout.blocks * 4):
        monkeypatch.setattr(xattention, "_ROOM", room)
        chunked = antidiagonal_mass(q_packed, k_packed, blocking, method.stride)
        assert float((chunked - whole).abs().max()) <= slack


class Largest(TorchDispatchMode):
    """Most entries of a tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(x.numel() for x in tree_leaves(found) if isinstance(x, Tensor))])
        return found


def test_the_coarse_map_is_never_whole() -> None:
    """Wan 14B at 720 x 1280, 81 frames: 3.6e9 entries, at most 2**27 at a time; nothing else exceeds q."""
    blocking = XAttention().layout(vsparse.Grid(t=21, h=45, w=80), driven(XAttention(), VIDEO).site).bind()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 75648, 40, 128, dtype=torch.bfloat16)
        with Largest() as largest:
            mass = antidiagonal_mass(q, q, blocking, 8)
    assert mass.shape == (1, 40, 591, 591)
    assert largest.entries == max(q.numel(), 2**27)


@GRIDS
@METHODS
def test_output_and_gradients_with_the_map_fixed(grid: vsparse.Grid, method: XAttention) -> None:
    """The gradient is that of attention under the chosen map; nothing flows through the choice."""
    inputs = tensors(grid, batch=2)
    one = driven(method, grid)
    one(*(x.double() for x in inputs))
    keep = one.keep()
    assert_identity(lambda *x: one(*x), lambda *x: attention(*x, keep), inputs)


@GRIDS
def test_the_whole_mass_is_full_attention(grid: vsparse.Grid) -> None:
    """Even when the softmax of far folds underflows to nothing."""
    q, k, v = tensors(grid, batch=2, scale=40.0)
    one = Driven(XAttention(mass=1.0, stride=4, block=8), grid, LENGTHS if grid.text else None)
    found = one(q, k, v)
    assert float(one.maps[0].density().min()) == 1.0
    keep = one.valid()[:, None, None] & one.valid()[:, None, :, None]
    law(found, lambda dtype: attention(q.to(dtype), k.to(dtype), v.to(dtype), keep.expand(-1, HEADS, -1, -1)))


@GRIDS
@METHODS
@pytest.mark.parametrize("scale", [0.0, 1e-9, 0.1, 2.0, 16.0])
def test_no_row_outgrows_the_prediction(grid: vsparse.Grid, method: XAttention, scale: float) -> None:
    """Flat scores need most blocks, and stay within the capacity and the predicted density."""
    one = Driven(method, grid, LENGTHS if grid.text else None)
    one(*tensors(grid, batch=2, scale=scale))
    density = one.maps[0].validate().density()
    predicted = method.predicted_density(one.layout, one.site)
    assert 0 < predicted < 1
    assert float(density.max()) <= predicted


# ---- faults of the released code -----------------------------------------------------------------------------------


def test_padding_takes_no_share_of_the_softmax() -> None:
    """Real logits far below 0: the zeros behind the last token would win, and their block with them."""
    grid = vsparse.Grid(t=1, h=1, w=17)
    q, k, v = (torch.ones(1, 17, HEADS, DIM, dtype=torch.float64) for _ in range(3))
    k = -10 * k
    k[:, :8] *= 0.9
    k[:, 16:] *= 40.0  # the last block holds one token and, in its second fold, none
    one = Driven(XAttention(mass=0.3, stride=4, block=8), grid)
    one(q, k, v)
    assert one.maps[0].to_mask()[0, 0, :2].tolist() == [[True, False, False]] * 2


def test_padded_queries_have_no_say() -> None:
    """A fold without a token would hand out its unit evenly and keep blocks that no token asks for."""
    grid = vsparse.Grid(t=1, h=1, w=36)
    q, k, v = (torch.zeros(1, 36, HEADS, DIM, dtype=torch.float64) for _ in range(3))
    q[..., 0], k[:, :16, :, 0] = 50.0, 50.0
    one = Driven(XAttention(mass=0.9, stride=4, block=16), grid)
    one(q, k, v)
    assert one.maps[0].to_mask()[0, 0, 2].tolist() == [True, False, False]


def test_block_0_is_kept_only_when_chosen() -> None:
    grid = vsparse.Grid(t=1, h=1, w=16)
    q, k, v = (torch.ones(1, 16, HEADS, DIM, dtype=torch.float64) for _ in range(3))
    k[:, :8] = -20.0
    one = Driven(XAttention(mass=0.9, stride=4, block=8), grid)
    one(q, k, v)
    assert one.maps[0].to_mask()[0, 0].tolist() == [[False, True]] * 2


def test_large_activations_do_not_overflow_half_precision() -> None:
    """A sum of 32 products of 60 and 60 is more than float16 holds; its logit is not."""
    grid = vsparse.Grid(t=1, h=1, w=16)
    q, k = (torch.full((1, 16, 1, DIM), 60.0) for _ in range(2))
    k[:, 8:] = -60.0
    blocking = XAttention(stride=4, block=8).layout(grid, driven(XAttention(), grid).site).bind()
    mass = antidiagonal_mass(q.half(), k.half(), blocking, 4)
    assert torch.equal(mass, antidiagonal_mass(q, k, blocking, 4))
    assert mass[0, 0].tolist() == [[2.0, 0.0], [2.0, 0.0]]


def test_samples_of_a_batch_choose_apart() -> None:
    q, k, v = (x.double() for x in tensors(TEXT, batch=2))
    method = KINDS["stride 4"]
    both = driven(method, TEXT)
    both(q, k, v)
    for b in range(2):
        alone = Driven(method, TEXT, LENGTHS[b : b + 1])
        alone(q[b : b + 1], k[b : b + 1], v[b : b + 1])
        assert torch.equal(alone.keep()[0], both.keep()[b])


def test_the_global_generator_does_not_move() -> None:
    before = torch.get_rng_state()
    driven(KINDS["stride 4"], VIDEO)(*(x.double() for x in tensors(VIDEO)))
    assert torch.equal(torch.get_rng_state(), before)


# ---- options -------------------------------------------------------------------------------------------------------


def test_defaults_are_published() -> None:
    assert XAttention() == XAttention(mass=0.9, stride=8, block=128)
    schedule = XAttention.default_schedule
    assert [schedule.phase(step=i, steps=50, layer=0, filled=False) for i in (4, 5)] == ["dense", "search"]


def test_the_search_costs_a_stride_less_than_the_logits() -> None:
    one = driven(XAttention(), vsparse.Grid(t=2, h=16, w=16))
    logits = 2.0 * 512**2 * DIM * HEADS
    assert one.method.search_flops(one.layout, one.site, 1, "search") == logits / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mass": 0.0}, "xattention: mass must be a number in"),
        ({"mass": 1.5}, "xattention: mass"),
        ({"stride": 0}, "xattention: stride must be a positive integer"),
        ({"stride": 2.0}, "xattention: stride"),
        ({"stride": 12}, "xattention: block must be a multiple of stride, got block=128 and stride=12"),
        ({"block": 0}, "block"),
    ],
)
def test_refused_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XAttention(**options)
