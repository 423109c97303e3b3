"""Calibration of unicp: windows within an error, a basis for each head, and where slicing is the better of the two."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vsparse.layouts import RasterLayout
from vsparse.methods.base import Call, SparseAttention
from vsparse.methods.samples import Sample, alike
from vsparse.methods.unicp import UniCPAttention, full_attention, protected_steps, relative_change

__all__ = ["calibrate", "fit_bases", "principal_basis", "slicing_error"]


@torch.no_grad()
def principal_basis(samples: Sequence[Sample], rank: int) -> Tensor:
    """The directions that carry most of the queries and keys of each head.

    Args:
        samples: Of one site. rank: R, at most the head dimension.

    Returns:
        ``[H, D, R]`` float64: the eigenvectors of ``E[q q^T] + E[k k^T]`` with the largest eigenvalues, largest first,
        over the video and valid text of all samples.

    Raises:
        ValueError: a rank out of range, no samples, samples that do not fit each other.
    """
    first = alike("unicp", samples)
    heads, dim = first.q.shape[2:]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= dim:
        raise ValueError(f"unicp: rank must be an integer from 1 to the head dimension {dim}, got {rank!r}")
    layout = RasterLayout(first.grid).to(first.q.device)
    total = torch.zeros(heads, dim, dim, dtype=torch.float64, device=first.q.device)
    for sample in samples:
        blocking = layout.bind(sample.text_length)
        for x in (blocking.pack(sample.q).double(), blocking.pack(sample.k).double()):
            total += torch.einsum("bshd,bshe->hde", x, x)
    _, vectors = torch.linalg.eigh(total)
    basis: Tensor = vectors.flip(-1)[..., :rank]
    return basis


@torch.no_grad()
def slicing_error(samples: Sequence[Sample], basis: Tensor) -> float:
    """How far attention with sliced logits is from exact attention, in the sample in which it is farthest.

    Args:
        samples: Of one site. basis: ``[H, D, R]``, `principal_basis`.

    Returns:
        The largest ``sum |O - O'| / sum |O|``, over all heads at once, as changes between steps are measured.
    """
    alike("unicp", samples)
    found = []
    for sample in samples:
        layout = RasterLayout(sample.grid).to(sample.q.device)
        call = Call(
            layout=layout,
            blocking=layout.bind(sample.text_length),
            text_length=sample.text_length,
            step=torch.tensor(-1),
            density=torch.tensor(1.0, dtype=torch.float64),
        )
        sliced, exact = (full_attention(sample.q, sample.k, sample.v, call, b) for b in (basis, None))
        found.append(float(relative_change(sliced, exact)))
    return max(found)


def fit_bases(
    sites: Iterable[SparseAttention], recorded: Mapping[tuple[str, int], Sequence[Sample]]
) -> dict[tuple[str, int], float]:
    """Give the sites of a "unicp" patch with a rank their bases.

    Args:
        sites: ``patch.sites``. recorded: samples of every site, from `vsparse.measure.calibrate.recording`.

    Returns:
        (root, layer) -> `slicing_error` with that basis on the same samples.

    Raises:
        ValueError: sites of another method or without a rank, a site without samples. Nothing is changed then.
    """
    found: list[tuple[UniCPAttention, Tensor, Sequence[Sample]]] = []
    for sparse in sites:
        where = (sparse.site.root, sparse.site.layer)
        if not isinstance(sparse, UniCPAttention) or sparse.basis is None or sparse.method.rank is None:
            raise ValueError(f"unicp: {where} has no basis; apply unicp with a rank, got {sparse.method!r}")
        if where not in recorded:
            raise ValueError(f"unicp: {where} has no calibration samples")
        found.append((sparse, principal_basis(recorded[where], sparse.method.rank), recorded[where]))
    with torch.no_grad():
        for sparse, basis, _ in found:
            assert sparse.basis is not None
            sparse.basis.copy_(basis)
    return {(x.site.root, x.site.layer): slicing_error(samples, basis) for x, basis, samples in found}


def calibrate(
    changes: Sequence[Mapping[int, float]],
    *,
    steps: int,
    bound: float,
    most: int = 4,
    ends: float = 0.1,
    slicing: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The windows, and the steps that are sliced, with which every step of every layer stays within an error.

    The error of an output that is used n steps later is taken to be the sum of the n changes between: never less than
    the true one, but for the different sizes of the outputs that changes are relative to. The window of a step is the
    largest that stays within ``bound``. With ``slicing``, a step of a window is sliced instead of reused if that errs
    less, and a step that no window covers is sliced instead of computed if it stays within the bound and its own
    output would serve no step after it. That choice looks at errors alone: a sliced step still costs most of a computed
    one, a reused one nothing, so windows without ``slicing`` save more time.

    Args:
        changes: For each layer, step -> relative change of the exact output from the step before
            (`vsparse.measure.calibrate.changes`). A step that is not there may have changed by any amount.
        steps: Denoising steps of the calibration; another number later spreads the same numbers over its own steps.
        bound: Greatest error, above 0. most: longest window.
        ends: As in `UniCP`.
        slicing: For each layer, the error of slicing (`fit_bases`); None: no step is sliced.

    Returns:
        ``windows``, ``sliced`` and ``ends`` of `UniCP`.

    Raises:
        ValueError: a number out of range, or not as many errors as layers.
    """
    for name, value in (("steps", steps), ("most", most)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"unicp: {name} must be an integer >= 1, got {value!r}")
    if not 0.0 < bound < math.inf:
        raise ValueError(f"unicp: bound must be positive and finite, got {bound!r}")
    if not changes:
        raise ValueError("unicp: no layer has calibrated changes")
    if slicing is not None and len(slicing) != len(changes):
        raise ValueError(f"unicp: slicing must hold one error per layer, got {len(slicing)} for {len(changes)} layers")
    guard = protected_steps(ends, steps)
    windows, sliced = [], []
    for layer, known in enumerate(changes):
        row = [math.inf if math.isnan(known.get(i, math.inf)) else known.get(i, math.inf) for i in range(steps)]
        spans = [_window(row, i, bound, most, guard) for i in range(steps)]
        windows.append(tuple(spans))
        error = None if slicing is None else slicing[layer]
        sliced.append((False,) * steps if error is None else _sliced(row, spans, error, bound, guard))
    return {"windows": tuple(windows), "sliced": tuple(sliced), "ends": ends}


def _window(changes: Sequence[float], step: int, bound: float, most: int, guard: int) -> int:
    steps = len(changes)
    if step < guard or step >= steps - guard:
        return 1
    total, window = 0.0, 1
    while window < most and step + window < steps - guard:
        total += changes[step + window]
        if not total <= bound:
            break
        window += 1
    return window


def _sliced(
    changes: Sequence[float], windows: Sequence[int], error: float, bound: float, guard: int
) -> tuple[bool, ...]:
    """Walk the steps as the method will, and choose."""
    chosen, last = [], -1
    for step in range(len(changes)):
        at_end = step < guard or step >= len(changes) - guard
        if at_end or last < 0:
            better = False
        elif step < last + windows[last]:
            better = error < sum(changes[last + 1 : step + 1])
        else:
            better = error <= bound and windows[step] == 1
        if at_end or (not better and (last < 0 or step >= last + windows[last])):
            last = step
        chosen.append(better)
    return tuple(chosen)
