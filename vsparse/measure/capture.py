"""The block maps that a method really runs: caught in a patched pipeline, or in an untrained model."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.methods import Method, Site, SparseAttention
from vsparse.optional import require
from vsparse.patch import Patch, apply

__all__ = ["Seen", "capture", "random_map", "tapped"]

MOST_TOKENS = 20_000
STEPS = 5


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """One executed map: where, at which denoising step (-1: unknown), in which phase."""

    site: Site
    step: int
    phase: str
    blocks: BlockMap


@contextlib.contextmanager
def capture(patch: Patch, *, layers: tuple[int, ...] | None = None) -> Iterator[list[Seen]]:
    """Gather the maps of every sparse call inside the block; for looking at, since it keeps them all and reads steps.

    Args:
        patch: A patch in force. layers: only these layers; None: all.

    Yields:
        A list that grows with every call.
    """
    chosen = [site for site in patch.sites if layers is None or site.site.layer in layers]
    if not chosen:
        raise ValueError(f"no patched layer among {layers}; there are {len(patch.sites)}")
    seen: list[Seen] = []
    with contextlib.ExitStack() as stack:
        for site in chosen:
            stack.enter_context(tapped(site, _noting(site, seen)))
        yield seen


@contextlib.contextmanager
def tapped(sparse: SparseAttention, told: Callable[[BlockMap, int], None]) -> Iterator[None]:
    """Hear of every map that a site executes inside the block, and of the batch."""
    report = sparse.tally

    def tally(blocks: BlockMap, batch: int, *more: BlockMap) -> None:
        for one in (blocks, *more):
            told(one, batch)
        report(blocks, batch, *more)

    sparse.tally = tally  # type: ignore[method-assign]
    try:
        yield
    finally:
        del sparse.tally


def _noting(sparse: SparseAttention, seen: list[Seen]) -> Callable[[BlockMap, int], None]:
    def told(blocks: BlockMap, _: int) -> None:
        step = -1 if sparse.call is None else int(sparse.call.step)
        seen.append(Seen(site=sparse.site, step=step, phase=sparse.phase, blocks=blocks))

    return told


def random_map(method: Method, grid: Grid, *, heads: int = 4, seed: int = 0) -> Seen:
    """The map that a method runs in one attention layer of an untrained model on a smooth random video.

    The model is a stock diffusers transformer of one layer with random weights: Wan without text, HunyuanVideo with
    text after the video, CogVideoX with text before it. The structure of its maps comes from the smooth video and the
    positions only; a trained model's maps differ.

    Args:
        method: What selects. grid: the lattice, text included. heads: of 64 channels. seed: of weights and video.

    Returns:
        The last executed map of a five-step run, in which searches and reuses have had their turn.

    Raises:
        ValueError: text on both sides, too many tokens to try on a CPU, or a method without a sparse call.
    """
    if grid.tokens > MOST_TOKENS:
        raise ValueError(f"a random map is tried with at most {MOST_TOKENS:,} tokens, got {grid.tokens:,}")
    if grid.text_before and grid.text_after:
        raise ValueError(f"no host has text on both sides of the video: {grid}")
    model, inputs = _random_host(grid, heads, seed)
    with torch.no_grad(), apply(model, method) as patch, capture(patch, layers=(0,)) as seen, patch.generation(STEPS):
        for step in range(STEPS):
            with patch.step(step):
                model(**inputs)
    if not seen:
        raise ValueError(f"{method.key!r} made no sparse call, so there is no map to draw")
    return seen[-1]


def _random_host(grid: Grid, heads: int, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A one-layer model with random weights, and inputs for the grid."""
    diffusers = require("diffusers", "diffusers")
    width, channels, text_width, text = 64, 16, 32, grid.text
    common = {"num_attention_heads": heads, "attention_head_dim": width}
    common |= {"in_channels": channels, "out_channels": channels}
    draw = torch.Generator().manual_seed(seed)
    video = _smooth_video(grid, channels, draw)
    inputs: dict[str, Any] = {
        "hidden_states": video,
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text or 8, text_width, generator=draw),
        "return_dict": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not text:
            small = {"patch_size": (1, 1, 1), "num_layers": 1, "text_dim": text_width, "ffn_dim": 64}
            model = diffusers.WanTransformer3DModel(**common, **small)
        elif grid.text_after:
            small = {"num_layers": 1, "num_single_layers": 0, "num_refiner_layers": 1, "patch_size": 1}
            sizes = {"text_embed_dim": text_width, "pooled_projection_dim": 8, "rope_axes_dim": (16, 24, 24)}
            model = diffusers.HunyuanVideoTransformer3DModel(**common, **small, **sizes, guidance_embeds=False)
            inputs["encoder_attention_mask"] = torch.ones(1, text, dtype=torch.int64)
            inputs["pooled_projections"] = torch.zeros(1, 8)
        else:
            small = {"num_layers": 1, "patch_size": 1, "text_embed_dim": text_width, "max_text_seq_length": text}
            sizes = {"sample_height": grid.h, "sample_width": grid.w, "sample_frames": 4 * grid.t - 3}
            model = diffusers.CogVideoXTransformer3DModel(**common, **small, **sizes)
            inputs["hidden_states"] = video.transpose(1, 2)
        for name, parameter in model.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight")):
                parameter.data.fill_(1.6)  # a natural spread of the logits; at 1 an untrained softmax is nearly flat
    return model.eval(), inputs


def _smooth_video(grid: Grid, channels: int, draw: torch.Generator) -> Tensor:
    coarse = torch.randn(1, channels, *(max(2, n // 3) for n in (grid.t, grid.h, grid.w)), generator=draw)
    size = (grid.t, grid.h, grid.w)
    wide = nn.functional.interpolate(coarse, size, mode="trilinear", align_corners=True)
    return 2.0 * wide + 0.3 * torch.randn(wide.shape, generator=draw)
