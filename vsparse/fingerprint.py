"""Fingerprints of models: what tells the model that an adapter was saved from apart from another one."""

from __future__ import annotations

import dataclasses as dc
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["LIMIT", "SAMPLES", "Fingerprint", "differences", "digest", "distance", "sample", "unchecked"]

SAMPLES = 64

# The geometric middle between the two things to be told apart. Below: the same weights after they were stored coarsely,
# as layerwise casting does in float8_e4m3, whose half unit is 2^-4 of a value. Above: independent weights of one size,
# which are sqrt(2) of that size apart. The room between is for a merged LoRA and for fine-tuning.
LIMIT = (2.0**-4 * 2.0**0.5) ** 0.5


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprint:
    """A model in a few kilobytes.

    Args:
        model: Name of its class. config: what the class was built with: numbers, strings, None and tuples of them.
        weights: Attention module -> `sample` of one of its weights. unread: what is there instead of a missing one.
    """

    model: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    unread: str = ""


def sample(weight: object) -> Tensor | str:
    """Up to `SAMPLES` values of a weight, evenly spread from its first to its last, or what it is that cannot be read.

    Returns:
        ``[SAMPLES]`` on the CPU, in the dtype that the weight is stored in. A sharded weight (DTensor) is gathered for
        it, so every process must call this.
    """
    if not isinstance(weight, Tensor):
        return f"a {type(weight).__name__} where a weight is expected"
    value: Tensor = getattr(weight, "full_tensor", weight.detach)().detach()
    if type(value) is not Tensor:
        return f"weights in a {type(value).__name__}, which only its own library reads"
    if not value.is_floating_point():
        return f"quantised weights ({value.dtype})"
    if value.is_meta or value.numel() < 2:
        return "offloaded or sharded weights"
    count = min(SAMPLES, value.numel())
    at = torch.arange(count) * (value.numel() - 1) // (count - 1)
    return value.flatten()[at.to(value.device)].cpu()


def differences(kept: Fingerprint, found: Fingerprint) -> list[str]:
    """Why ``found`` is another model than ``kept``, in words; empty when it is the same, or a version of it.

    Configuration that only one of them has does not count: versions of a host library add and drop some.
    """
    if kept.model != found.model:
        return [f"it is a {found.model}, not a {kept.model}"]
    reasons = [
        f"its {name} is {found.config[name]!r}, not {value!r}"
        for name, value in kept.config.items()
        if name in found.config and found.config[name] != value
    ]
    apart = distance(kept, found)
    if not reasons and apart is not None and not apart <= LIMIT:
        reasons.append(
            f"its weights are {apart:.0%} of their own size away from those that the adapter was saved with; up to "
            f"{LIMIT:.0%} is taken for a cast, a merged LoRA or a fine-tuned copy"
        )
    return reasons


def unchecked(kept: Fingerprint, found: Fingerprint) -> str:
    """Why the weights of two models could not be compared; "" when they were."""
    if distance(kept, found) is not None:
        return ""
    if found.unread:
        return f"it has {found.unread}"
    return f"it had {kept.unread or 'other attention modules'} when the adapter was saved"


def digest(found: Fingerprint) -> str | None:
    """16 hexadecimal digits that name the weights, the same once they are rounded to bfloat16; None: not read.

    Unlike `differences` it tells a fine-tuned copy from what it was made of.
    """
    if not found.weights:
        return None
    told = hashlib.sha256()
    for name, values in sorted(found.weights.items()):
        told.update(name.encode())
        told.update(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return told.hexdigest()[:16]


def distance(kept: Fingerprint, found: Fingerprint) -> float | None:
    """How far the weights of two models are apart: the norm of their difference over their own; None: not to be told.

    0 for the same weights, sqrt(2) for independent ones. Each value is rounded to the dtype of the other model first,
    so that a cast leaves nothing but a second rounding.
    """
    both = [(x, found.weights[name]) for name, x in kept.weights.items() if name in found.weights]
    pairs = [(x.to(y.dtype).double(), y.to(x.dtype).double()) for x, y in both if x.shape == y.shape]
    if not pairs:
        return None
    mine, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    size = ((mine.square().sum() + other.square().sum()) / 2).sqrt()
    return float((mine - other).norm() / size.clamp_min(torch.finfo(size.dtype).tiny))
