"""What is measured: shapes by priority, their FLOPs, what they may cost, and which of them fit a time budget."""

from __future__ import annotations

import dataclasses as dc
import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

Step = Literal["forward", "backward"]
STEPS: tuple[Step, ...] = ("forward", "backward")

SLOTS = (32_760, 39_936, 75_600, 92_160, 109_632, 118_800)
HEADS = (7, 12, 24, 40)
WIDTHS = (64, 128)
DENSITIES = (1.0, 0.5, 0.25, 0.125, 0.1, 0.05, 0.037)
BLOCKS = ((64, 64), (128, 64), (64, 128), (128, 128))
GATHERED = ((64, 1), (128, 1), (1, 64))  # those for which other kernels gather single keys or queries into tiles

BACKWARD = 2.5  # products of the backward, in units of those of the forward
TYPICAL = 300e12  # FLOP/s by which times are guessed before anything is measured
SETUP = {"forward": 5.0, "backward": 9.0}  # seconds for inputs, maps and variants that must still be compiled


@dc.dataclass(frozen=True)
class Group:
    """One shape and the densities at which it is timed; they share inputs and the dense attention beside them.

    Args:
        slots: Valid tokens S. heads: H. width: D. block: BQ and BK. densities: kept share of the key blocks.
        must: Measured whatever the budget says.
    """

    slots: int
    heads: int
    width: int
    block: tuple[int, int]
    densities: tuple[float, ...]
    must: bool = False

    @property
    def name(self) -> str:
        return f"S={self.slots} H={self.heads} D={self.width} {self.block[0]}x{self.block[1]}"


@dc.dataclass(frozen=True)
class Dropped:
    """A group that was not measured, and why."""

    group: Group
    step: str
    reason: str


def flops(pairs: float, width: int, step: Step) -> float:
    """FLOPs of the products over ``pairs`` query-key pairs (summed over batch and heads)."""
    return 4.0 * pairs * width * (BACKWARD if step == "backward" else 1.0)


def floor_seconds(group: Group, density: float, step: Step, matrix: float, copy: float) -> float:
    """The least time that the ceilings allow: products at ``matrix`` FLOP/s, or bytes (bf16) at ``copy`` B/s."""
    products = flops(group.slots**2 * density * group.heads, group.width, step) / matrix
    values = group.slots * group.heads
    moved = (8 * values * group.width + 4 * values) / copy
    return max(products, moved * (2.0 if step == "backward" else 1.0))


def target(block: tuple[int, int], width: int, step: Step) -> float:
    """Goal as a share of the matrix ceiling."""
    if step == "backward":
        return 0.38
    if width < 128:
        return 0.45
    return 0.60 if block[0] >= 128 else 0.50


def dense_heads(group: Group, step: Step, most: float = 3e13) -> int:
    """Heads on which dense attention is timed beside a group: as many as ``most`` FLOPs allow, at least one."""
    per_head = flops(group.slots**2, group.width, step)
    return max(1, min(group.heads, int(most // per_head)))


def estimate(group: Group, step: Step) -> float:
    """Seconds a group will take: setup, and about ten calls of each candidate."""
    dense = dense_heads(group, step) / group.heads
    work = [flops(group.slots**2 * x * group.heads, group.width, step) for x in (*group.densities, dense, dense)]
    return SETUP[step] + sum(max(0.2, min(1.0, 10 * x / TYPICAL), 3 * x / TYPICAL) for x in work)


def cover(groups: Iterable[Group], step: Step, seconds: float) -> tuple[list[Group], list[Dropped]]:
    """The groups, in their order, that fit into ``seconds``; what does not fit is named with its estimate."""
    kept: list[Group] = []
    dropped: list[Dropped] = []
    left = seconds
    for group in groups:
        cost = estimate(group, step)
        if group.must or cost <= left:
            kept.append(group)
            left -= cost
        else:
            dropped.append(Dropped(group, step, f"estimated {cost:.1f} s, {max(0.0, left):.1f} s of the budget left"))
    return kept, dropped


_FIRST: tuple[Group, ...] = (
    Group(109_632, 7, 128, (64, 64), (0.037, 0.125, 0.25, 1.0), must=True),
    Group(39_936, 12, 128, (64, 64), (0.1, 0.125, 0.25, 0.05, 0.037, 0.5, 1.0)),
    Group(109_632, 7, 128, (128, 128), (0.037, 0.125)),
    Group(39_936, 12, 128, (128, 128), (0.1, 0.25)),
    Group(39_936, 12, 64, (64, 64), (0.1, 0.25)),
    Group(92_160, 40, 128, (64, 64), (0.1,)),
    Group(39_936, 12, 128, (128, 64), (0.1, 0.25)),
    Group(118_800, 24, 128, (64, 64), (0.1,)),
    Group(75_600, 40, 128, (128, 128), (0.1,)),
    Group(32_760, 24, 64, (128, 128), (0.1, 0.25)),
    Group(39_936, 12, 128, (64, 1), (0.1, 0.05)),
    Group(39_936, 12, 128, (128, 1), (0.05,)),
    Group(39_936, 12, 128, (64, 128), (0.1,)),
    Group(109_632, 7, 64, (64, 64), (0.037, 0.125)),
    Group(32_760, 12, 128, (64, 64), (0.125, 0.5)),
    Group(75_600, 40, 128, (64, 64), (0.05,)),
)


def all_groups() -> list[Group]:
    """The shapes that matter most, then every other combination of S, H and D with blocks of 64."""
    found = list(_FIRST)
    done = {(g.slots, g.heads, g.width, g.block) for g in found}
    rest = itertools.product(SLOTS, HEADS, reversed(WIDTHS))
    return found + [Group(*shape, (64, 64), DENSITIES) for shape in rest if (*shape, (64, 64)) not in done]


def tiny_groups() -> list[Group]:
    """What a dry run goes through: one group that must be measured, one of single keys, one ragged and wider."""
    return [
        Group(256, 2, 64, (64, 64), (0.5, 1.0), must=True),
        Group(130, 1, 64, (64, 1), (0.5,)),
        Group(230, 1, 80, (128, 64), (0.5,)),
    ]


def shares(seconds: float, weights: Sequence[tuple[str, float]]) -> dict[str, float]:
    """``seconds`` divided among stages in proportion to their weights."""
    total = sum(weight for _, weight in weights)
    return {name: max(0.0, seconds) * weight / total for name, weight in weights}
