"""What a method spends around the kernel, and what the exact search costs."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vsparse
from vsparse import Blocking, BlockMap, Grid, TileLayout, backend, select
from vsparse.geometry import kept_blocks

from . import plan
from .clock import Candidate, interleaved
from .inputs import Triple, blocking, make, random_map, smooth
from .plan import Group
from .session import Session
from .sweeps import DENSE, dense_call

# Latent grids of Wan at 480p and 720p, with the heads of its 1.3B and 14B models.
CALLS = ((Grid(t=21, h=30, w=52), 12), (Grid(t=21, h=45, w=80), 40))
TINY_CALLS = ((Grid(t=4, h=8, w=8), 2),)
SELECTION_TARGET, PACKING_TARGET, SEARCH_TARGET = 0.05, 0.10, 0.55
DENSITY = 0.1


@dc.dataclass
class Call:
    """One VSA call over a grid, cut into the pieces that are timed."""

    tiles: Blocking
    tokens: list[Triple]
    packed: list[Triple]
    gate: Tensor
    count: int
    chosen: BlockMap
    random: BlockMap

    def means(self, i: int) -> tuple[Tensor, Tensor]:
        q, k, _ = self.packed[i % len(self.packed)]
        q_mean, k_mean = vsparse.block_pool(q, self.tiles), vsparse.block_pool(k, self.tiles)
        assert isinstance(q_mean, Tensor)
        assert isinstance(k_mean, Tensor)
        return q_mean, k_mean

    def scores(self, i: int) -> Tensor:
        q_mean, k_mean = self.means(i)
        return torch.einsum("bqhd,bkhd->bhqk", q_mean, k_mean) * q_mean.shape[-1] ** -0.5

    def select(self, i: int) -> BlockMap:
        return select.top_k(self.scores(i), self.tiles, count=self.count, capacity=self.count)

    def attend(self, i: int, blocks: BlockMap) -> Tensor:
        return vsparse.block_sparse_attention(*self.packed[i % len(self.packed)], blocks)[0]

    def pack(self, i: int) -> list[Tensor]:
        return [self.tiles.pack(x) for x in self.tokens[i % len(self.tokens)]]

    def unpack(self, i: int) -> Tensor:
        return self.tiles.unpack(self.packed[i % len(self.packed)][0])

    def coarse(self, i: int, scores: Tensor) -> Tensor:
        """The coarse output from the scores that the selection needs anyway, gated and added."""
        values = self.packed[i % len(self.packed)][2]
        pooled = vsparse.block_pool(values, self.tiles)
        assert isinstance(pooled, Tensor)
        coarse = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), pooled).to(values.dtype)
        fine = self.tokens[i % len(self.tokens)][0]
        return fine + self.gate * self.tiles.expand(coarse)


def call_of(session: Session, grid: Grid, heads: int, width: int) -> Call:
    """A VSA call over a grid with random tensors."""
    tiles = TileLayout(grid, tile=(4, 4, 4)).to(session.device).bind()
    tokens: list[Triple] = []
    for number in range(2):
        q, k, v = (smooth(grid, heads, width, 3 * number + i, session.device, session.dtype) for i in range(3))
        tokens.append((q, q + k, v))  # keys that resemble the queries of their place
    packed = [(tiles.pack(q), tiles.pack(k), tiles.pack(v)) for q, k, v in tokens]
    count = kept_blocks(0.5 if session.dry else DENSITY, tiles.blocks)
    made = Call(
        tiles, tokens, packed, torch.randn_like(tokens[0][0]), count, BlockMap.full(tiles), BlockMap.full(tiles)
    )
    made.chosen = made.select(0)
    made.random = random_map(tiles, tiles, heads, count / tiles.blocks, seed=3)
    return made


def parts(session: Session, seconds: float) -> None:
    """Kernel, selection, packing and the coarse branch of VSA, each for itself and as shares of the kernel."""
    reserve = session.left - seconds
    width = 64 if session.dry else 128
    for grid, heads in TINY_CALLS if session.dry else CALLS:
        words = "; ".join(
            filter(
                None,
                (
                    session.verdicts.refusal(width, (64, 64), session.dtype, "forward", kind)
                    for kind in ("attention", "pool", "select", "reorder")
                ),
            )
        )
        needed = 8.0
        row: dict[str, Any] = {"grid": [grid.t, grid.h, grid.w], "heads": heads, "head_dim": width}
        if words or (session.left - reserve < needed and not session.dry):
            words = words or "no time left"
            session.report.data["parts"].append({**row, "status": "refused", "words": words, "ms": {}})
            session.screen.say(f"parts of a call over {grid}: refused: {words}")
            continue
        with torch.no_grad():
            row |= _timed(session, call_of(session, grid, heads, width))
        session.report.data["parts"].append(row)
        session.free()
        shares = row["of_kernel"]
        session.screen.say(
            f"parts of a call, {grid.t}x{grid.h}x{grid.w} H={heads}: kernel {row['ms']['kernel, chosen map']:.3f} ms, "
            f"selection {shares['selection']:.3f} of it (target {SELECTION_TARGET}), "
            f"packing {shares['packing']:.3f} (target {PACKING_TARGET}), coarse branch {shares['coarse']:.3f}"
        )


def _timed(session: Session, call: Call) -> dict[str, Any]:
    scores = call.scores(0)
    pieces: dict[str, Callable[[int], object]] = {
        "kernel, chosen map": lambda i: call.attend(i, call.chosen),
        "kernel, random map": lambda i: call.attend(i, call.random),
        "pool q and k": call.means,
        "pool and score": call.scores,
        "pool, score, top-k, lists": call.select,
        "transposed lists (backward)": lambda _: call.chosen.transpose(),
        "pack q, k, v": call.pack,
        "unpack": call.unpack,
        "coarse branch and gate": lambda i: call.coarse(i, scores),
    }
    found = interleaved([Candidate(name, piece) for name, piece in pieces.items()], session.device, session.turn)
    ms = {name: timing.ms for name, timing in found.items()}
    kernel = ms["kernel, chosen map"]
    selection, packing = ms["pool, score, top-k, lists"], ms["pack q, k, v"] + ms["unpack"]
    coarse = ms["coarse branch and gate"]
    words = "; ".join(f"{name}: {timing.words}" for name, timing in found.items() if timing.words)
    return {
        "slots": call.packed[0][0].shape[1],
        "density": float(call.chosen.density().mean()),
        "status": "failed" if words else "measured",
        "words": words,
        "ms": ms,
        # (a) the kernel; (b) with the selection; (c) with packing; (d) with the coarse branch
        "sums_ms": {
            "a": kernel,
            "b": kernel + selection,
            "c": kernel + selection + packing,
            "d": kernel + selection + packing + coarse,
        },
        "of_kernel": {"selection": selection / kernel, "packing": packing / kernel, "coarse": coarse / kernel},
        "targets": {"selection": SELECTION_TARGET, "packing": PACKING_TARGET},
    }


def search(session: Session, seconds: float) -> None:
    """The exact search relative to one dense forward: all pairs, sampled rows, candidates, and the fused first one."""
    reserve = session.left - seconds
    shapes = (
        [Group(256, 2, 64, (64, 64), ())]
        if session.dry
        else [Group(39_936, 12, 128, (64, 64), ()), Group(75_600, 8, 128, (64, 64), ())]
    )
    for group in shapes:
        row: dict[str, Any] = {"slots": group.slots, "heads": group.heads, "head_dim": group.width, "block": [64, 64]}
        words = session.verdicts.refusal(group.width, group.block, session.dtype, "forward", "mass")
        words = words or session.verdicts.refusal(group.width, group.block, session.dtype, "forward")
        if session.left - reserve < 6 and not session.dry:
            words = words or "no time left"
        side = blocking(group.slots, 64, session.device)
        probe = torch.empty(1, side.blocks * 64, group.heads, group.width, device=session.device, dtype=session.dtype)
        options = {"scale": 1.0, "candidates": None, "rows": None}
        lacking = backend.reasons(
            "block_mass", session.device.type, probe, probe, probe[..., 0].float(), side, side, **options
        )
        if lacking or words:
            row |= {"status": "not measured" if lacking else "refused", "words": "; ".join(lacking) or words}
            session.report.data["search"].append(row)
            session.screen.say(f"search {group.name}: {row['status']}: {row['words']}")
            continue
        with torch.no_grad():
            row |= _searched(session, group, side)
        session.report.data["search"].append(row)
        session.free()
        shares = ", ".join(f"{name} {share:.3f}" for name, share in row["of_dense"].items())
        session.screen.say(
            f"search {group.name}, of one dense forward: {shares} (target {SEARCH_TARGET} for all pairs)"
        )


def _searched(session: Session, group: Group, side: Blocking) -> dict[str, Any]:
    inputs = make(group, session.device, session.dtype, plan.dense_heads(group, "forward"))
    everything, some = BlockMap.full(side), random_map(side, side, group.heads, 0.25, seed=5)
    lses = [vsparse.block_sparse_attention(*values, everything)[1] for values in inputs.sets]
    rows = torch.arange(0, 64, 4, device=session.device)

    def mass(i: int, candidates: BlockMap | None = None, offsets: Tensor | None = None) -> Tensor:
        i %= len(lses)
        q, k, _ = inputs.sets[i]
        return vsparse.block_mass(q, k, lses[i], side, candidates=candidates, rows=offsets)

    dense = DENSE[session.device.type].items()
    candidates = [Candidate(f"dense {name}", dense_call(each, inputs.heads_first)) for name, each in dense]
    candidates += [
        Candidate("all pairs", mass),
        Candidate("rows 1/4", lambda i: mass(i, offsets=rows)),
        Candidate("candidates 1/4", lambda i: mass(i, candidates=some)),
        Candidate("search attention", lambda i: vsparse.search_attention(*inputs.sets[i % len(lses)], side)),
    ]
    found = interleaved(candidates, session.device, session.turn)
    scale = group.heads / inputs.heads_first[0][0].shape[1]
    ms = {name: x.ms * (scale if name.startswith("dense") else 1.0) for name, x in found.items()}
    reference = min((ms[name] for name in ms if name.startswith("dense") and ms[name] == ms[name]), default=math.nan)
    words = "; ".join(f"{name}: {x.words}" for name, x in found.items() if x.words)
    return {
        "status": "measured",
        "words": words,
        "ms": ms,
        "timed_dense_heads": inputs.heads_first[0][0].shape[1],
        "of_dense": {name: value / reference for name, value in ms.items() if not name.startswith("dense")},
        "target": SEARCH_TARGET,
    }
