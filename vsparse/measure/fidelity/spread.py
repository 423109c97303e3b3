"""What several clips tell together: mean, spread, and an interval of the mean."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Sequence

__all__ = ["CONFIDENCE", "Spread", "quantile", "spread_of"]

CONFIDENCE = 0.95


@dc.dataclass(frozen=True, kw_only=True)
class Spread:
    """Figures of several clips.

    Args:
        mean: Of the finite values; infinite where there is none. low, high: least and greatest of all.
        count: How many values. endless: how many of them are infinite: a PSNR of clips that are equal to the bit.
        sd: Standard deviation with n - 1, of the finite values; None for fewer than two.
        interval: Of the mean, `CONFIDENCE`, by Student's t with n - 1: ``mean -+ t sd / sqrt(n)``. None for fewer than
            two finite values. It takes the clips for independent draws.
    """

    mean: float
    low: float
    high: float
    count: int
    endless: int = 0
    sd: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def why_no_interval(self) -> str:
        """In words; "" where there is one."""
        if self.interval is not None:
            return ""
        if self.count == 1:
            return "one clip: no interval"
        return f"{self.endless} of {self.count} clips equal: no interval"


def spread_of(values: Sequence[float]) -> Spread:
    """Mean, spread and interval.

    Raises:
        ValueError: no values, or one that is NaN.
    """
    if not values or any(math.isnan(x) for x in values):
        raise ValueError(f"spread_of: values must be one number or more, none of them NaN, got {list(values)}")
    finite = [x for x in values if math.isfinite(x)]
    count, n = len(values), len(finite)
    mean = math.fsum(finite) / n if n else math.inf
    sd = half = None
    if n > 1:
        sd = math.sqrt(math.fsum((x - mean) ** 2 for x in finite) / (n - 1))
        half = quantile(n - 1) * sd / math.sqrt(n)
    return Spread(
        mean=mean,
        low=min(values),
        high=max(values),
        count=count,
        endless=count - n,
        sd=sd,
        interval=None if half is None else (mean - half, mean + half),
    )


def quantile(freedom: int, *, confidence: float = CONFIDENCE) -> float:
    """The t for which ``P(-t <= T <= t)`` is the confidence, of Student's distribution.

    Args:
        freedom: Degrees of freedom, a whole number from 1.

    Raises:
        ValueError: fewer than one degree, or a confidence that is not between 0 and 1.
    """
    if freedom < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(f"quantile: freedom must be >= 1 and confidence in (0, 1), got {freedom} and {confidence}")
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _inside(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(high)


def _inside(angle: float, freedom: int) -> float:
    """``P(-t <= T <= t)`` for ``t = sqrt(freedom) tan(angle)``: the finite sums in sine and cosine that the integral
    of ``cos ** (freedom - 1)`` gives for whole degrees of freedom.
    """
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for i in range(freedom // 2):
        total += term
        j = 2 * i + (2 if odd else 1)
        term *= cosine * cosine * j / (j + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
