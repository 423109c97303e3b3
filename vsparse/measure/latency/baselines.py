"""Dense attention as several libraries compute it: which of them run here, and in whose words the others do not."""

from __future__ import annotations

import dataclasses as dc
import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vsparse.measure.latency.intervals import Interval, interval
from vsparse.optional import require

__all__ = ["BASELINES", "DEFAULT", "SLOWEST", "Attention", "Baseline", "compared", "default_attention", "refusal_of"]

DEFAULT = "SDPA, PyTorch's choice"
"""The dense attention that speed-ups have always been told against: what diffusers runs where nothing else is set."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of q, k, v ``[B, N, H, D]``, without a mask, to the same shape."""

_SDPA = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, math": SDPBackend.MATH,
}
SLOWEST = 4.0
"""A dense attention that takes so many times as long as `DEFAULT` is run once, and not in every round."""

_PLACE = re.compile(r"\s*\(Triggered internally at .*?\)")
_ERRORS = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError)


@dc.dataclass(frozen=True, kw_only=True)
class Baseline:
    """What came of one dense attention.

    Args:
        seconds: Of a call. None: it did not run. ratio: its seconds over those of the fastest, round by round.
        refused: Why it did not run, in the words of the library where it has any.
    """

    seconds: Interval | None = None
    ratio: Interval | None = None
    refused: str = ""


def default_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention by the backend that PyTorch chooses, ``[B, N, H, D]``."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _by_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if backend is SDPBackend.MATH and q.device.type == "cpu":
        _check_room(q)
    try:
        with sdpa_kernel(backend):
            return default_attention(q, k, v)
    except RuntimeError as error:
        if q.device.type == "cpu":  # PyTorch's words do not say that it is the device
            raise NotImplementedError(f"not on a CPU: {error}") from error
        raise


def _check_room(q: Tensor) -> None:
    """A GPU says that its memory is full; Linux ends the process."""
    scores = 2.0 * q.shape[0] * q.shape[2] * q.shape[1] ** 2 * 4
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    if scores > free / 2:
        raise NotImplementedError(
            f"its scores take about {scores / 2**30:.3g} GiB, more than half of the {free / 2**30:.3g} GiB now free"
        )


def _by_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = require("xformers.ops", "xformers").memory_efficient_attention(q, k, v)
    return out


def _by_diffusers(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its check first: without it a backend that is not installed fails with no word why."""
    dispatch = require("diffusers.models.attention_dispatch", "diffusers")
    name = dispatch.AttentionBackendName(backend)
    dispatch._check_attention_backend_requirements(name)
    out: Tensor = dispatch.dispatch_attention_fn(q, k, v, backend=name)
    return out


BASELINES: Mapping[str, Attention] = {
    **{name: functools.partial(_by_backend, backend) for name, backend in _SDPA.items()},
    "xformers": _by_xformers,
    "diffusers, flash": functools.partial(_by_diffusers, "flash"),
    "diffusers, _flash_3": functools.partial(_by_diffusers, "_flash_3"),
}
"""Besides `DEFAULT`. Of the backends of diffusers those that compute exact attention, that PyTorch has not, and that
fetch no kernel from the network when they are asked for."""


def refusal_of(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why an attention does not run on these tensors, or nothing: then it has just run.

    Args:
        attention: One of `BASELINES`. q, k, v: ``[B, N, H, D]``.
    """
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            out = attention(q, k, v)
            if q.device.type == "cuda":
                torch.cuda.synchronize(q.device)
        except _ERRORS as error:
            return _words(error, [str(one.message) for one in heard if issubclass(one.category, UserWarning)])
    return "" if out.shape == q.shape else f"it returned {tuple(out.shape)} for {tuple(q.shape)}"


def _words(error: Exception, heard: Sequence[str]) -> str:
    """What a library said, as an error and as warnings, in one line and each thing once."""
    said = [" ".join(_PLACE.sub("", text).split()) for text in (str(error), *heard)]
    return " ".join(dict.fromkeys(text for text in said if text)) or type(error).__name__


def compared(taken: Mapping[str, Sequence[float]], refused: Mapping[str, str]) -> tuple[str, dict[str, Baseline]]:
    """The fastest by its median, and what came of all: those that ran first, the faster ones before the slower.

    Args:
        taken: Seconds of each round by name. refused: why others did not run.
    """
    by_median = sorted(taken, key=lambda name: interval(taken[name]).median)
    best = taken[by_median[0]]
    found = {
        name: Baseline(
            seconds=interval(taken[name]), ratio=interval([a / b for a, b in zip(taken[name], best, strict=True)])
        )
        for name in by_median
    }
    return by_median[0], found | {name: Baseline(refused=words) for name, words in refused.items()}
