"""Losses that pull a sparse model towards a dense one: at its output, and at the output of each attention."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vsparse.methods import Call, SparseAttention
from vsparse.patch import Patch
from vsparse.training.task import Denoised
from vsparse.training.teachers import StartWeights, teaching

__all__ = ["AttentionDistillation", "VelocityDistillation"]


class VelocityDistillation:
    """The sparse model shall predict what a dense one predicts from the same noisy latents and text.

    The loss is the mean squared distance of the two predictions, whatever the objective lets the model predict. The
    teacher has no dropout and no gradient, and costs a dense forward.

    Args:
        patch: What made the student sparse; the teacher is the same model without it.
        start: The teacher's weights; None: the student's own, as they are at each step.

    Source: sliding tile attention (arXiv 2502.04507) fine-tunes with the data's loss, half of this one and half of
    `AttentionDistillation`, for 1600 steps.
    """

    def __init__(self, patch: Patch, *, start: StartWeights | None = None) -> None:
        self.patch, self.start = patch, start

    def watch(self) -> contextlib.AbstractContextManager[None]:
        """Nothing inside the student is needed."""
        return contextlib.nullcontext()

    def loss(self, made: Denoised) -> Tensor:
        """Float32 scalar (float64 for a float64 model)."""
        with teaching(made.model, self.patch, self.start) as teacher:
            wanted = made.forward(teacher, made.noisy, made.timestep, made.text)
        wide = torch.promote_types(wanted.dtype, torch.float32)
        return (made.prediction.to(wide) - wanted.to(wide)).square().mean()


class AttentionDistillation:
    """Each sparse site shall give what full attention gives on the same queries, keys and values.

    The loss is the mean over sites and samples of ``|O - O'|^2 / |O'|^2``, O the site's output, O' full attention, both
    over valid tokens. O' is constant; through O the gradient reaches what the method has added and also the queries,
    keys and values, hence the layers before. Sites that run dense have no part in it; without any the loss is 0.

    Full attention is PyTorch's, fused where it can be, so that a site costs what a dense layer costs, once: what is
    recomputed for a backward is not distilled again. Until the backward each site keeps one tensor as large as its
    output.

    Args:
        patch: What made the student sparse. sites: some of ``patch.sites``; None: all.

    Raises:
        ValueError: a site that is not the patch's.
    """

    def __init__(self, patch: Patch, *, sites: Sequence[SparseAttention] | None = None) -> None:
        self.sites = patch.sites if sites is None else list(sites)
        known = set(map(id, patch.sites))
        for site in self.sites:
            if id(site) not in known:
                raise ValueError(f"sites must be sites of the patch, got {site!r}")
        self._found: dict[SparseAttention, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Around the student's forward.

        Raises:
            RuntimeError: a site ran unseen (compiled before), or where no gradient comes (reentrant checkpoints).
        """
        self._found = {}
        for site in self.sites:
            site.ran = False
        see = functools.partial(self._see, torch.is_grad_enabled())
        handles = [site.register_forward_hook(see) for site in self.sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        unseen = [x.site.name for x in self.sites if x.ran and x.phase != "dense" and x not in self._found]
        if unseen:
            raise RuntimeError(f"these sites were compiled before and do not see the watch: {', '.join(unseen)}")

    def loss(self, made: Denoised) -> Tensor:
        """Float32 scalar (float64 for a float64 model) of the forward that was watched."""
        found, self._found = list(self._found.values()), {}
        if not found:
            return made.prediction.new_zeros((), dtype=torch.float32)
        return torch.stack([(_norm(missed) / size).square().mean() for missed, size in found]).mean()

    def _see(self, learns: bool, site: SparseAttention, args: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
        """Keep what a site's output misses, and the size of what it should be.

        Nothing here may save a tensor for the backward: under gradient checkpointing that would have to happen again
        when the block is recomputed, after the watch.
        """
        if learns and not torch.is_grad_enabled():
            raise RuntimeError(f"{site.site.name}: checkpoint with use_reentrant=False, else no gradient gets here")
        assert site.call is not None
        with torch.no_grad():
            wanted = _full_attention(*args, site.call)
            valid = _valid_rows(site.call, wanted)
            size = _norm(torch.where(valid, wanted, 0)).clamp_min(torch.finfo(torch.float32).tiny)
            wanted = torch.where(valid, wanted, out)
        self._found[site] = out - wanted, size


def _full_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """As a dense phase of the host computes it; all ``[B, N, H, D]``."""
    size, valid = call.keys(q.shape[0])
    q, k, v = (x.transpose(1, 2) for x in (q, k[:, :size], v[:, :size]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid).transpose(1, 2)


def _valid_rows(call: Call, like: Tensor) -> Tensor:
    """Which tokens are no padding: bool, to be broadcast over ``[B, N, H, D]``."""
    if call.text_length is None:
        return torch.ones((), dtype=torch.bool, device=like.device)
    last = call.grid.video + call.text_length
    return (torch.arange(like.shape[1], device=like.device) < last[:, None])[..., None, None]


def _norm(x: Tensor) -> Tensor:
    """``[B]`` Euclidean norm of each sample, in float32 at least; only ``x`` itself is kept for the backward."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=wide)
    return norm
