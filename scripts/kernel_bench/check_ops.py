"""Checks of the ops around attention: exact mass, pooling, merging, selection, packing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vsparse
from vsparse import BlockMap, Grid, TileLayout, reference, select

from .clock import attempt
from .inputs import blocking, generator
from .law import law, poison
from .samples import Case, sample


def _one(name: str, call: Callable[[], Tensor], plain: Callable[[bool], Tensor]) -> tuple[str, float]:
    with poison():
        first, words = attempt(call)
        again, _ = attempt(call)
    if words:
        return f"{name}: {words}", math.inf
    if not torch.equal(first, again):
        return f"{name}: two runs differ", math.inf
    return law(name, first, [plain(False)], plain(True))


def _gather(found: dict[str, tuple[str, float]]) -> dict[str, Any]:
    words = "; ".join(wrong for wrong, _ in found.values() if wrong)
    return {"forward": words, "backward": "", "errors": {name: share for name, (_, share) in found.items()}}


def mass(case: Case, device: torch.device, tokens: tuple[int, int]) -> dict[str, Any]:
    """Exact block mass of all pairs, of sampled rows, and of candidates."""
    given = sample(case, device, tokens)
    blocks, (q, k, _) = given.blocks, given.clean
    everything = BlockMap.full(blocks.q, blocks.k)
    wide = [x.double() for x in given.clean]
    lse = reference.block_sparse_attention(*wide, everything, scale=given.scale)[1].float()
    rows = torch.arange(0, case.q_block, 4, device=device)
    options: dict[str, dict[str, Any]] = {"all": {}, "rows": {"rows": rows}, "candidates": {"candidates": blocks}}
    found = {}
    for name, option in options.items():

        def plain(truth: bool, option: dict[str, Any] = option) -> Tensor:
            args = (q.double(), k.double(), lse.double()) if truth else (q, k, lse)
            return reference.block_mass(*args, blocks.q, blocks.k, scale=given.scale, **option)

        found[name] = _one(name, lambda o=option: vsparse.block_mass(q, k, lse, blocks.q, blocks.k, **o), plain)
    return _gather(found)


def pool(case: Case, device: torch.device, tokens: tuple[int, int]) -> dict[str, Any]:
    """Mean and self-similarity of blocks."""
    given = sample(case, device, tokens)
    side, x = given.blocks.k, given.clean[1]
    found = {}
    for i, name in enumerate(("mean", "similarity")):
        found[name] = _one(
            name,
            lambda i=i: vsparse.block_pool(x, side, self_similarity=True)[i],
            lambda truth, i=i: reference.block_pool(x.double() if truth else x, side)[i],
        )
    return _gather(found)


def merge(case: Case, device: torch.device, tokens: tuple[int, int]) -> dict[str, Any]:
    """Two parts with rows that are empty in one or in both."""
    numbers, shape = generator(device, 3), (2, tokens[0], 2, case.width)
    dtype = getattr(torch, case.dtype)
    outs = [torch.randn(shape, generator=numbers, device=device).to(dtype) for _ in range(2)]
    lses = [4 * torch.randn(shape[:3], generator=numbers, device=device) for _ in range(2)]
    for i, lse in enumerate(lses):
        lse[:, : 8 * (i + 1)] = -math.inf
        outs[i][:, : 8 * (i + 1)] = 0
    found = {}
    for i, name in enumerate(("out", "lse")):

        def plain(truth: bool, i: int = i) -> Tensor:
            parts = ([x.double() for x in outs], [x.double() for x in lses]) if truth else (outs, lses)
            return reference.merge_attention(*parts)[i]

        found[name] = _one(name, lambda i=i: vsparse.merge_attention(outs, lses)[i], plain)
    return _gather(found)


def order(case: Case, device: torch.device, tokens: tuple[int, int]) -> dict[str, Any]:
    """Packing a batch with texts of several lengths, unpacking, and the gradients of both: to the bit."""
    grid = Grid(t=3, h=13, w=tokens[0] // 40, text_after=90)
    side = TileLayout(grid, tile=(4, 4, 4)).to(device).bind(torch.tensor([90, 7], device=device))
    numbers, dtype = generator(device, 5), getattr(torch, case.dtype)
    x = torch.randn(2, grid.tokens, 3, case.width, generator=numbers, device=device).to(dtype)
    layout = side.layout
    assert layout is not None
    assert side.order is not None
    y = reference.reorder(x, side.order[0])
    pairs: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]] = {
        "pack": (side.pack, x, *side.order),
        "unpack": (side.unpack, y, layout.token_slot, layout.slot_token),
    }
    found = {}
    for name, (call, value, index, inverse) in pairs.items():
        wanted = reference.reorder(value, index)
        gradients = reference.reorder(wanted, inverse)

        def both(call: Callable[[Tensor], Tensor] = call, value: Tensor = value) -> list[Tensor]:
            leaf = value.detach().clone().requires_grad_()
            with torch.enable_grad():
                out = call(leaf)
            return [out.detach(), *torch.autograd.grad(out, leaf, out.detach())]

        with poison():
            given, words = attempt(both)
        if not words and not all(map(torch.equal, given, (wanted, gradients))):
            words = "other values than the definition gives"
        found[name] = (f"{name}: {words}" if words else "", math.inf if words else 0.0)
    return _gather(found)


def selection(case: Case, device: torch.device, tokens: tuple[int, int]) -> dict[str, Any]:
    """Selectors on scores with ties, an empty key block and forced ones: the maps that the CPU gives."""
    here = torch.device("cpu")
    side = blocking(tokens[0], case.q_block, here)
    side.length[..., 1] = 0
    scores = torch.rand(2, 2, side.blocks, side.blocks, generator=generator(here, 4))
    scores[:, 1] = (scores[:, 1] * 4).round() / 4
    forced = torch.eye(side.blocks, dtype=torch.bool)[None, None]
    moved = blocking(tokens[0], case.q_block, device)
    moved.length[..., 1] = 0
    calls: dict[str, Callable[..., BlockMap]] = {
        "top_k": lambda x, y, _: select.top_k(x, y, count=3, capacity=3),
        "top_k, forced": lambda x, y, f: select.top_k(x, y, count=2, forced=f),
        "top_p": lambda x, y, _: select.top_p(x, y, mass=0.6, include_crossing=True),
        "threshold": lambda x, y, _: select.threshold(x, y, value=0.5),
    }
    found = {}
    for name, call in calls.items():
        wanted = call(scores, side, forced)
        with poison():
            args = (scores.to(device), moved, forced.to(device))
            given, words = attempt(lambda call=call, args=args: call(*args))
        if not words and not torch.equal(given.to_mask().cpu(), wanted.to_mask()):
            words = "another map than on the CPU"
        if not words:
            _, words = attempt(given.validate)
        found[name] = (f"{name}: {words}" if words else "", math.inf if words else 0.0)
    return _gather(found)
