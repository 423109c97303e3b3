"""What moves and adds up tensors around attention: bytes per second, and what sharing with nobody costs."""

from __future__ import annotations

import math
from typing import Any

import torch

import vsparse
from vsparse.geometry import Grid
from vsparse.parallel.collectives import ALONE
from vsparse.parallel.sharded import sharded_attention

from .clock import Candidate, Timing, interleaved
from .inputs import random_map, sets_needed
from .session import Session
from .stages import CALLS, DENSITY, TINY_CALLS, call_of

TARGET = 0.02
"""Greatest share of the kernel that context parallelism may add where one process has everything."""


def moving(session: Session, seconds: float) -> None:
    """Packing, unpacking and the merge of two parts against the copy ceiling; attention shared with nobody."""
    reserve, width = session.left - seconds, 64 if session.dry else 128
    for grid, heads in TINY_CALLS if session.dry else CALLS:
        row: dict[str, Any] = {"grid": [grid.t, grid.h, grid.w], "heads": heads, "head_dim": width}
        kinds = ("attention", "merge", "reorder")
        refusals = [session.verdicts.refusal(width, (64, 64), session.dtype, "forward", kind) for kind in kinds]
        words = "; ".join(filter(None, refusals))
        if words or (session.left - reserve < 6.0 and not session.dry):
            session.report.data["moving"].append({**row, "status": "refused", "words": words or "no time left"})
            session.screen.say(f"moving over {grid}: refused: {words or 'no time left'}")
            continue
        with torch.no_grad():
            row |= _timed(session, grid, heads, width)
        session.report.data["moving"].append(row)
        session.free()
        shares = ", ".join(f"{name} {x['of_copy']:.2f}" for name, x in row["moved"].items())
        session.screen.say(
            f"moving, {grid.t}x{grid.h}x{grid.w} H={heads}: of the copy ceiling {shares}; alone as one of a group "
            f"{row['alone']:+.3f} of the kernel (target {TARGET})"
        )


def _timed(session: Session, grid: Grid, heads: int, width: int) -> dict[str, Any]:
    call = call_of(session, grid, heads, width)
    tiles, packed = call.tiles, call.packed
    q, _, _ = packed[0]
    blocks = random_map(tiles, tiles, heads, 0.5 if session.dry else DENSITY, seed=3)
    options = {"group": ALONE, "bounds": (0, tiles.blocks), "common": (0, 0)}
    outs, lses = zip(*(vsparse.block_sparse_attention(*each, blocks) for each in packed), strict=True)
    # Fresh copies, so that the merge does not read from the cache what it read before.
    count = sets_needed(2 * q.nbytes, session.device)
    parts = [([x.clone() for x in outs], [x.clone() for x in lses]) for _ in range(count)]
    candidates = [
        Candidate("pack", lambda i: tiles.pack(call.tokens[i % 2][0])),
        Candidate("unpack", lambda i: tiles.unpack(packed[i % 2][0])),
        Candidate("merge", lambda i: vsparse.merge_attention(*parts[i % count])),
        Candidate("attention", lambda i: vsparse.block_sparse_attention(*packed[i % 2], blocks)),
        Candidate("alone", lambda i: sharded_attention(*packed[i % 2], blocks, **options)),
    ]
    found = interleaved(candidates, session.device, session.turn)
    one, lse = q.nbytes, lses[0].nbytes
    there = call.tokens[0][0].nbytes
    amounts = {"pack": there + one, "unpack": one + there, "merge": 3 * (one + lse)}
    return {
        "status": "failed" if any(x.words for x in found.values()) else "measured",
        "words": "; ".join(f"{name}: {x.words}" for name, x in found.items() if x.words),
        "slots": q.shape[1],
        "moved": {name: _moved(session, amount, found[name]) for name, amount in amounts.items()},
        "attention": found["attention"].json(),
        "alone": found["alone"].ms / found["attention"].ms - 1.0,
        "target": TARGET,
    }


def _moved(session: Session, amount: float, timing: Timing) -> dict[str, Any]:
    rate = amount / (timing.ms * 1e-3) if timing.ms else math.nan
    return {**timing.json(), "bytes": amount, "rate": rate, "of_copy": rate / session.ceiling("copy")}
