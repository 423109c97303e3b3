"""k-means over the tokens of every head, in parts that fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vsparse.reference import statistics_dtype

__all__ = ["cluster_tokens"]

_PART = 1 << 26  # distances that are held at once


@torch.library.custom_op("vsparse::cluster_tokens", mutates_args=())
def _cluster(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    by_head = x.transpose(1, 2).to(centroids.dtype)
    step = max(1, _PART // centroids.shape[:3].numel())
    parts = by_head.split(step, dim=2)
    labels, means = _turn(parts, centroids.clone(), moves=iterations > 0)
    for _ in range(iterations - 1):
        labels, means = _turn(parts, means, moves=True)
    return labels, means


def _turn(parts: Sequence[Tensor], means: Tensor, *, moves: bool) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every token, and the centroids, moved to the means of their tokens or not."""
    half = means.square().sum(-1)[..., None, :] / 2
    labels, total, count = [], torch.zeros_like(means), means.new_zeros(*means.shape[:3], 1)
    for part in parts:
        near = (part @ means.transpose(-1, -2) - half).argmax(-1)
        labels.append(near)
        if moves:
            # A product instead of a scattered sum: floats are added in a fixed order on every device.
            member = F.one_hot(near, means.shape[2]).to(part.dtype).transpose(-1, -2)
            total, count = total + member @ part, count + member.sum(-1, keepdim=True)
    if moves:
        means = torch.where(count > 0, total / count.clamp_min(1), means)
    return torch.cat(labels, -1), means


@_cluster.register_fake
def _(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], dtype=torch.int64), torch.empty_like(centroids)


def cluster_tokens(x: Tensor, centroids: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm with squared Euclidean distances, for every sample and head apart; not differentiable.

    Args:
        x: ``[B, N, H, D]`` tokens. centroids: ``[B, H, C, D]`` where to begin, float32 (float64 for float64 tokens).
        iterations: How often tokens are assigned and centroids then moved; 0: assigned once, nothing moves.

    Returns:
        ``labels [B, H, N]`` int64, the nearest centroid before it moved last (of equal ones the first), and the
        centroids, which after an iteration are the means of their tokens; one without a token stays where it was.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a negative number of iterations.
    """
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be a floating tensor [B, N, H, D], got {x.dtype} {tuple(x.shape)}")
    wanted = (x.shape[0], x.shape[2], x.shape[3])
    if centroids.ndim != 4 or (*centroids.shape[:2], centroids.shape[3]) != wanted or not centroids.shape[2]:
        raise ValueError(f"centroids must be [B, H, C, D] for x {tuple(x.shape)}, got {tuple(centroids.shape)}")
    if centroids.dtype != statistics_dtype(x.dtype):
        raise ValueError(f"centroids must be {statistics_dtype(x.dtype)} for x of {x.dtype}, got {centroids.dtype}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations must be an integer >= 0, got {iterations!r}")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        labels, means = _cluster(x.detach(), centroids.detach(), iterations)
    return labels, means
