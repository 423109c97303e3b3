"""Attention recall: how much of the dense model's own attention falls on the keys that a method keeps."""

from __future__ import annotations

import dataclasses as dc

import torch

from vsparse.measure.calibrate import Recorded
from vsparse.measure.recall import kept_by, key_mass
from vsparse.methods import Method, Site
from vsparse.methods.by_layer import ByLayer
from vsparse.methods.dense import Dense

__all__ = ["CALLS", "MOST_TOKENS", "recall_of", "too_long"]

CALLS = 4
"""Calls of each layer that are looked at, spread over the steps and the branches of guidance."""
MOST_TOKENS = 8192
"""Of one call: the exact softmax of every head is computed in float64, on the CPU."""


def too_long(tokens: int) -> str:
    """Why recall is not measured for calls of this length, in words; "" where it is."""
    if tokens <= MOST_TOKENS:
        return ""
    return f"{tokens} tokens: the exact softmax is computed up to {MOST_TOKENS}"


def recall_of(method: Method, recorded: Recorded) -> tuple[float | None, str]:
    """Mean recall of a method over the heads of all layers and recorded calls, and why there is none.

    The method chooses its keys on the very q and k that it is measured on, so one that searches seldom has less in a
    generation. Queries of the video count.

    Args:
        method: What chooses. recorded: of `vsparse.measure.calibrate.recording`, on the CPU.
    """
    shares = []
    for (_, layer), samples in recorded.items():
        for given in samples:
            part = method.of(Site.alone(heads=1, head_dim=1, layer=layer)) if isinstance(method, ByLayer) else method
            if part is not method and isinstance(part, Dense):
                shares.append(torch.ones((), dtype=torch.float64))  # such a layer keeps every key
                continue
            q, k, v = (x[:1].float() for x in (given.q, given.k, given.v))
            length = given.text_length
            if length is not None and int(length[0]) != given.grid.text:
                return None, "the text of the recorded calls is padded"
            sample = dc.replace(given, q=q, k=k, v=v, text_length=None)
            try:
                kept = kept_by(part, sample, layer=layer)
            except ValueError as error:
                return None, str(error)
            shares.append(kept.recall(key_mass(sample, kept.block, kept.keep.shape[-1])).mean())
    return (float(torch.stack(shares).mean()), "") if shares else (None, "no attention call was recorded")
