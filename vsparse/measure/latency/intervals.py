"""What repeated measurements tell: a median, an interval that needs no distribution, and whether to quote a ratio."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Sequence
from statistics import median

__all__ = ["CONFIDENCE", "WIDEST", "Interval", "interval", "verdict"]

CONFIDENCE = 0.95
WIDEST = 0.2
"""A ratio is quoted when its interval is at most this share of its median wide."""


@dc.dataclass(frozen=True, kw_only=True)
class Interval:
    """A median and an interval around it, from independent repetitions.

    Args:
        median: Of the values. low, high: two of the values, with as many below the one as above the other.
        coverage: Chance that they enclose the true median, whatever the distribution: ``1 - 2 P(X <= k)`` with X
            binomial (n, 1/2) and k the values outside on each side.
        count: n.
    """

    median: float
    low: float
    high: float
    coverage: float
    count: int

    @property
    def width(self) -> float:
        """From low to high, as a share of the median."""
        return (self.high - self.low) / abs(self.median) if self.median else math.inf


def interval(values: Sequence[float]) -> Interval:
    """The narrowest such interval that covers at least `CONFIDENCE`; of fewer than six values all of them.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("interval: values must hold at least one, got none")
    ordered, count = sorted(values), len(values)

    def coverage(outside: int) -> float:
        return 1.0 - 2.0 * sum(math.comb(count, i) for i in range(outside + 1)) / 2.0**count

    outside = 0
    while 2 * (outside + 1) < count and coverage(outside + 1) >= CONFIDENCE:
        outside += 1
    return Interval(
        median=median(ordered),
        low=ordered[outside],
        high=ordered[-1 - outside],
        coverage=max(0.0, coverage(outside)),
        count=count,
    )


def verdict(speed: Interval) -> str:
    """What a ratio of times, dense over sparse, lets one say.

    The rule: with two rounds or more, an interval no wider than `WIDEST` of its median that does not hold 1 is quoted.
    """
    found = f"{speed.low:.2f} to {speed.high:.2f}"
    if speed.count < 2:
        return "no speed-up is quoted: one round tells no spread"
    if speed.width > WIDEST:
        return (
            f"no speed-up is quoted: this machine is too noisy, the ratio of dense to sparse went from {found}, more "
            f"than {WIDEST:.0%} of its median; stop what else runs here, or take more rounds"
        )
    if speed.low <= 1.0 <= speed.high:
        return f"no difference between dense and sparse can be told: the ratio went from {found}"
    ratio, word = (speed.median, "fast") if speed.median > 1.0 else (1.0 / speed.median, "slow")
    return f"sparse is {ratio:.2f} times as {word} as dense (dense over sparse: {found})"
