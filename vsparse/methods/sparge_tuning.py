"""Tuning of SpargeAttn: the numbers of every head from calibration data, within a bound on the error."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vsparse import ops, reference
from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking
from vsparse.methods.base import Call, Site
from vsparse.methods.budgets import check_density
from vsparse.methods.samples import Sample, alike, attended, distance
from vsparse.methods.sparge import SpargeAttention, SpargeAttn

__all__ = ["tune"]

MASSES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.96, 0.98, 0.99)
SIMILARITIES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SKIPS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0)


@dc.dataclass(frozen=True)
class _Packed:
    """A sample in block order, and the exact output."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocking: Blocking
    exact: Tensor


def tune(
    method: SpargeAttn,
    samples: Sequence[Sample],
    *,
    error: float = 0.05,
    skip_error: float | None = 0.06,
    masses: Sequence[float] = MASSES,
    similarities: Sequence[float] = SIMILARITIES,
    skips: Sequence[float] = SKIPS,
) -> dict[str, Any]:
    """The numbers with which the heads of one site compute the fewest pairs within a bound (arXiv 2502.18137).

    First every head gets the pair of mass and similarity of least density whose output is off by less than ``error``
    in every sample, measured as ``sum |O - O'| / sum |O|``; of equal densities the one of less error. Then the site
    gets the smallest ``skip_threshold`` with which every head stays below ``skip_error``. A head that no pair suits
    keeps everything.

    Args:
        method: What is tuned; ``select="mass"``. Its ``block``, ``smooth_keys`` and ``sink`` stay.
        samples: Of one site (`vsparse.measure.calibrate.recording`); the same grid, heads, dtype and device.
        error: Bound of the first search. Published: 0.05 for CogVideoX and Mochi, 0.03 for Open-Sora-Plan, 0.07 for
            Stable Diffusion 3.5 and Flux.
        skip_error: Bound of both together, above ``error``: 0.06, 0.035 and 0.08 there. None: no skipping.
        masses, similarities, skips: What is tried; one attention per sample and pair.

    Returns:
        ``mass`` and ``similarity`` (a tuple with a number per head) and ``skip_threshold``, for ``method.replace``.

    Raises:
        ValueError: a bound or candidate out of range; no samples, or samples that do not fit each other.

    Differs from the released tuner: a grid of masses instead of bisection, as the error is not monotone in the mass;
    the bound holds in every sample at once, where there the numbers of single inputs are combined; skipping is tuned
    for the site, not for each head. Where no kernel skips (on a CPU) the reference does, in memory quadratic in the
    tokens, a head at a time.
    """
    _check(method, error, skip_error, masses, similarities, skips)
    heads, head_dim = alike("tune", samples).q.shape[2:]
    site = Site.alone(heads=heads, head_dim=head_dim)
    pairs = [(mass, least) for mass in sorted(masses) for least in sorted(similarities)]
    with torch.no_grad():
        prepared = _prepare(method, samples, site)
        found = [_measure(method.replace(mass=m, similarity=s, skip_threshold=None), site, prepared) for m, s in pairs]
        mass, similarity = zip(*(_best(pairs, found, head, error) for head in range(site.heads)), strict=True)
        chosen = method.replace(mass=mass, similarity=similarity, skip_threshold=None)
        skip = None if skip_error is None else _skip(chosen, site, prepared, sorted(skips), skip_error)
    return {"mass": mass, "similarity": similarity, "skip_threshold": skip}


def _best(
    pairs: Sequence[tuple[float, float]], found: Sequence[tuple[list[float], list[float]]], head: int, bound: float
) -> tuple[float, float]:
    allowed = [
        (density[head], off[head], pair) for pair, (density, off) in zip(pairs, found, strict=True) if off[head] < bound
    ]
    return min(allowed, default=(1.0, 0.0, (1.0, 0.0)))[2]


def _maps(method: Any, site: Site, samples: Sequence[_Packed]) -> list[BlockMap]:
    module = method.build(site).to(samples[0].q.device)
    assert isinstance(module, SpargeAttention)
    return [module.choose(x.q, x.k, _call(x.blocking)) for x in samples]


def _call(blocking: Blocking) -> Call:
    """A call of all rows, whose budget is everything."""
    assert blocking.layout is not None
    step, density = (torch.full((), x, device=blocking.length.device) for x in (-1, 1.0))
    return Call(layout=blocking.layout, blocking=blocking, text_length=None, step=step, density=density.double())


def _measure(method: Any, site: Site, samples: Sequence[_Packed]) -> tuple[list[float], list[float]]:
    """Mean density and worst error of every head."""
    maps = _maps(method, site, samples)
    density = torch.stack([blocks.density().mean(0) for blocks in maps]).mean(0)
    outs = (ops.block_sparse_attention(x.q, x.k, x.v, blocks)[0] for x, blocks in zip(samples, maps, strict=True))
    off = torch.stack([distance(out, x.exact) for x, out in zip(samples, outs, strict=True)]).amax(0)
    return density.tolist(), off.tolist()


def _skip(method: Any, site: Site, samples: Sequence[_Packed], skips: Sequence[float], bound: float) -> float | None:
    maps = _maps(method, site, samples)
    for threshold in skips:
        outs = (_skipping(x, blocks, threshold) for x, blocks in zip(samples, maps, strict=True))
        if all(float(distance(out, x.exact).max()) < bound for x, out in zip(samples, outs, strict=True)):
            return threshold
    return None


def _skipping(x: _Packed, blocks: BlockMap, threshold: float) -> Tensor:
    if not ops.unsupported(x.q, x.k, x.v, blocks, skip_threshold=threshold):
        return ops.block_sparse_attention(x.q, x.k, x.v, blocks, skip_threshold=threshold)[0]
    heads = []
    for head in range(x.q.shape[2]):
        one = dc.replace(blocks, index=blocks.index[:, head, None], count=blocks.count[:, head, None])
        q, k, v = (y[:, :, head, None] for y in (x.q, x.k, x.v))
        scale = q.shape[-1] ** -0.5
        heads.append(reference.block_sparse_attention(q, k, v, one, scale=scale, skip_threshold=threshold)[0])
    return torch.cat(heads, 2)


def _prepare(method: SpargeAttn, samples: Sequence[Sample], site: Site) -> list[_Packed]:
    layout = method.layout(samples[0].grid, site).to(samples[0].q.device)
    prepared = []
    for sample in samples:
        blocking = layout.bind(sample.text_length)
        q, k, v = (blocking.pack(x.detach()) for x in (sample.q, sample.k, sample.v))
        prepared.append(_Packed(q, k, v, blocking, attended(sample, blocking)))
    return prepared


def _check(
    method: SpargeAttn,
    error: float,
    skip_error: float | None,
    masses: Sequence[float],
    similarities: Sequence[float],
    skips: Sequence[float],
) -> None:
    if not isinstance(method, SpargeAttn) or method.select != "mass":
        raise ValueError(f'tune: method must be a SpargeAttn with select="mass", got {method!r}')
    check_density("tune: error", error)
    if skip_error is not None and not error < skip_error <= 1.0:
        raise ValueError(
            f"tune: skip_error must lie above error={error!r} and at most at 1, or be None, got {skip_error!r}"
        )
    tries: tuple[tuple[str, Sequence[float], Callable[[float], Any]], ...] = (
        ("masses", masses, lambda x: method.replace(mass=x)),
        ("similarities", similarities, lambda x: method.replace(similarity=x)),
        ("skips", skips if skip_error is not None else (0.0,), lambda x: method.replace(skip_threshold=x)),
    )
    for name, values, build in tries:
        if not values:
            raise ValueError(f"tune: {name} must hold at least one number")
        for value in values:
            build(value)
