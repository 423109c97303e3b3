"""The host table: one row per model family."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vsparse.geometry import Grid
from vsparse.runtime import Reading

__all__ = ["HOSTS", "Host", "host_of"]


@dc.dataclass(frozen=True, kw_only=True)
class Host:
    """A family of models that is entered in one way.

    Args:
        family: Name of the row. models: class names of its roots.
        paths: Patterns of the attention modules' dotted names, in the order in which the layers run.
        processors: Class names of the stock processors whose code is known.
        text: Where text stands in the self-attention. lengths: reads ``[B]`` text lengths off a forward's arguments.
        patch: Reads the patch size (frames, rows, columns). latent: axes of t, h, w in the hidden states.
        vae: Usual compression in time and space.
        pipelines: Pipelines it is tested with, for the documentation.
    """

    family: str
    models: tuple[str, ...]
    paths: tuple[str, ...]
    processors: tuple[str, ...]
    patch: Callable[[nn.Module], tuple[int, int, int]]
    text: Literal["none", "before", "after"] = "none"
    lengths: Callable[[Mapping[str, Any]], tuple[Tensor, ...]] | None = None
    latent: tuple[int, int, int] = (2, 3, 4)
    vae: tuple[int, int] = (4, 8)
    pipelines: tuple[str, ...] = ()

    def sites(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Attention modules with their dotted names, in layer order."""
        named = dict(module.named_modules())
        found: list[tuple[str, nn.Module]] = []
        for path in self.paths:
            pattern = re.compile(path)
            found += [(name, x) for name, x in named.items() if pattern.fullmatch(name)]
        return found

    def grid(self, module: nn.Module, t: int, h: int, w: int, text: int = 0) -> Grid:
        """The lattice with this family's text."""
        side = {"none": {}, "before": {"text_before": text}, "after": {"text_after": text}}[self.text]
        return Grid(t=t, h=h, w=w, **side)

    def read(self, module: nn.Module, arguments: Mapping[str, Any]) -> Reading:
        """Grid, batch and text lengths of one forward."""
        hidden = arguments["hidden_states"]
        if not isinstance(hidden, Tensor) or hidden.ndim != 5:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(f"{type(module).__name__}: hidden_states must be a 5-D latent, got {shape}")
        sizes = [hidden.shape[axis] // step for axis, step in zip(self.latent, self.patch(module), strict=True)]
        text = 0 if self.text == "none" else arguments["encoder_hidden_states"].shape[1]
        masks = () if self.lengths is None else self.lengths(arguments)
        length = None
        if masks:
            length = torch.stack([mask.ne(0).sum(1, dtype=torch.int32) for mask in masks]).sum(0, dtype=torch.int32)
        return Reading(
            grid=self.grid(module, *sizes, text=text),
            batch=hidden.shape[0],
            device=hidden.device,
            text_length=length,
            text_source=masks,
        )


def _three(module: nn.Module) -> tuple[int, int, int]:
    t, h, w = module.config.patch_size  # type: ignore[union-attr, misc]
    return t, h, w


def _two(module: nn.Module) -> tuple[int, int, int]:
    config: Any = module.config
    return config.patch_size_t or 1, config.patch_size, config.patch_size


def _encoder_mask(arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return (arguments["encoder_attention_mask"],)


HOSTS: tuple[Host, ...] = (
    Host(
        family="wan",
        models=("WanTransformer3DModel", "WanVACETransformer3DModel"),
        paths=(r"blocks\.\d+\.attn1", r"vace_blocks\.\d+\.attn1"),
        processors=("WanAttnProcessor", "WanAttnProcessor2_0"),
        patch=_three,
        pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"),
    ),
    Host(
        family="hunyuan_video",
        models=("HunyuanVideoTransformer3DModel",),
        paths=(r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn"),
        processors=("HunyuanVideoAttnProcessor2_0",),
        patch=_two,
        text="after",
        lengths=_encoder_mask,
        pipelines=("HunyuanVideoPipeline",),
    ),
)


def host_of(module: nn.Module) -> Host | None:
    """The row of a model, by class name; wrappers that derive a class from a model's own (FSDP) are seen through."""
    names = {base.__name__ for base in type(module).__mro__}
    return next((host for host in HOSTS if names & set(host.models)), None)
