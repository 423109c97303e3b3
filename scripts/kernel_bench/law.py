"""The numerics law of CONTRIBUTING.md, restated.

For each tensor: ``err(candidate, truth) <= 2 * err(reference in the working dtype, truth) + one ulp at the largest
magnitude``, with the reference in float64 as truth.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor


def ulp(x: Tensor) -> float:
    """One unit in the last place of the dtype at the largest finite magnitude."""
    finite = x[x.isfinite()]
    return float(finite.abs().max()) * torch.finfo(x.dtype).eps if finite.numel() else 0.0


def law(name: str, candidate: Tensor, working: list[Tensor], truth: Tensor) -> tuple[str, float]:
    """What is wrong with a tensor ("" if nothing), and its error as a share of what is allowed."""
    if candidate.shape != truth.shape or candidate.dtype != working[0].dtype:
        return f"{name}: {candidate.dtype} {tuple(candidate.shape)} for {tuple(truth.shape)}", math.inf
    for value in (math.inf, -math.inf):
        if not torch.equal(candidate == value, truth == value):
            return f"{name}: infinities stand elsewhere than in the truth", math.inf
    finite = truth.isfinite()
    gap = torch.where(finite, candidate.double() - truth, 0).abs()
    if bool(gap.isnan().any()):
        return f"{name}: NaN at {gap.isnan().nonzero()[0].tolist()}, {int(gap.isnan().sum())} in all", math.inf
    known = max(float(torch.where(finite, run.double() - truth, 0).abs().max()) for run in working)
    allowed, worst = 2 * known + ulp(working[0]), float(gap.max())
    share = worst / allowed if allowed else (0.0 if worst == 0 else math.inf)
    if worst > allowed:
        place = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]
        return f"{name}: error {worst:.3e} at {place}, allowed {allowed:.3e}", share
    return "", share


def distance(candidate: Tensor, truth: Tensor) -> float:
    """``|candidate - truth| / |truth|`` over finite entries."""
    finite = truth.isfinite()
    gap = torch.where(finite, candidate.double() - truth, 0).norm()
    return float(gap / torch.where(finite, truth, 0).norm().clamp_min(1e-300))


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that reading it, or not writing it, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
