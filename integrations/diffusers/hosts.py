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

__all__ = ["HOSTS", "Host", "Place", "Text", "host_of"]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Joint text of one forward.

    Args:
        slots: Text tokens, padding included. length: ``[B]`` int32 valid ones (a prefix), None when none is padded.
        source: The tensors that ``length`` follows from.
    """

    slots: int
    length: Tensor | None = None
    source: tuple[Tensor, ...] = ()


def _no_text(_: Mapping[str, Any]) -> Text:
    return Text(slots=0)


@dc.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the tokens of a video are cut when several processes share it.

    Args:
        path: Pattern of the modules' dotted names; "" is the root. inputs: dimension of the tokens in an input, which
            is a tensor or a tuple of them, by the name of the argument. output: the dimension in the output; None: it
            is not cut.
    """

    path: str
    inputs: Mapping[str, int] = dc.field(default_factory=dict)
    output: int | None = None


@dc.dataclass(frozen=True, kw_only=True)
class Host:
    """A family of models that is entered in one way.

    Args:
        family: Name of the row. models: class names of its roots.
        paths: Patterns of the attention modules' dotted names, in the order in which the layers run.
        processors: Class names of the stock processors whose code is known.
        side: Where text stands in the self-attention. text: reads it off a forward's arguments.
        patch: Reads the patch size (frames, rows, columns). latent: axes of t, h, w in the hidden states.
        vae: Usual compression in time and space.
        usual_text: Text tokens of the family's usual prompts, for plans. pipelines: that run it, for the documentation.
        plan: Makes a plan for diffusers' `enable_parallelism` out of its two classes, where a model has none.
        cuts: Where tokens are cut for several processes. joined: the module whose output ``[B, tokens, dim]`` is put
            together again. undivided: Why a model cannot be cut, None when it can.
    """

    family: str
    models: tuple[str, ...]
    paths: tuple[str, ...]
    processors: tuple[str, ...]
    patch: Callable[[nn.Module], tuple[int, int, int]]
    side: Literal["none", "before", "after"] = "none"
    text: Callable[[Mapping[str, Any]], Text] = _no_text
    latent: tuple[int, int, int] = (2, 3, 4)
    vae: tuple[int, int] = (4, 8)
    usual_text: int = 0
    pipelines: tuple[str, ...] = ()
    plan: Callable[[Any, Any], dict[str, Any]] | None = None
    cuts: tuple[Place, ...] = ()
    joined: str = "proj_out"
    undivided: Callable[[nn.Module], str | None] = lambda _: None

    def sites(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Attention modules with their dotted names, in layer order; ``torch.compile`` around a block adds no name."""
        named = {name.replace("._orig_mod", ""): x for name, x in module.named_modules()}
        found: list[tuple[str, nn.Module]] = []
        for path in self.paths:
            pattern = re.compile(path)
            found += [(name, x) for name, x in named.items() if pattern.fullmatch(name)]
        return found

    def grid(self, t: int, h: int, w: int, text: int = 0) -> Grid:
        """The lattice with this family's text."""
        before, after = (text if self.side == side else 0 for side in ("before", "after"))
        return Grid(t=t, h=h, w=w, text_before=before, text_after=after)

    def read(self, module: nn.Module, arguments: Mapping[str, Any]) -> Reading:
        """Grid, batch and text lengths of one forward."""
        hidden = arguments["hidden_states"]
        if not isinstance(hidden, Tensor) or hidden.ndim != 5:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(f"{type(module).__name__}: hidden_states must be a 5-D latent, got {shape}")
        t, h, w = [hidden.shape[axis] // step for axis, step in zip(self.latent, self.patch(module), strict=True)]
        text = self.text(arguments)
        return Reading(
            grid=self.grid(t, h, w, text=text.slots),
            batch=hidden.shape[0],
            device=hidden.device,
            text_length=text.length,
            text_source=text.source,
        )


def _three(module: nn.Module) -> tuple[int, int, int]:
    t, h, w = module.config.patch_size  # type: ignore[union-attr, misc]
    return t, h, w


def _two(module: nn.Module) -> tuple[int, int, int]:
    config: Any = module.config
    return config.patch_size_t or 1, config.patch_size, config.patch_size


def _hunyuan_plan(cut: Any, join: Any) -> dict[str, Any]:
    turned = cut(split_dim=0, expected_dims=2, split_output=True)
    return {
        "rope": {0: turned, 1: turned},
        "x_embedder": {0: cut(split_dim=1, expected_dims=3, split_output=True)},
        "proj_out": join(gather_dim=1, expected_dims=3),
    }


def _cogvideox_plan(cut: Any, join: Any) -> dict[str, Any]:
    turned = cut(split_dim=0, expected_dims=2)
    return {
        "transformer_blocks.0": {"hidden_states": cut(split_dim=1, expected_dims=3)},
        "transformer_blocks.*": {"image_rotary_emb": (turned, turned)},
        "proj_out": join(gather_dim=1, expected_dims=3),
    }


def _replaces_tokens(module: nn.Module) -> str | None:
    config: Any = module.config
    if getattr(config, "image_condition_type", None) != "token_replace":
        return None
    return "its blocks count the tokens of the first frame (image_condition_type='token_replace')"


def _valid(mask: Tensor) -> Tensor:
    return mask.ne(0).sum(1, dtype=torch.int32)


def _padded(arguments: Mapping[str, Any]) -> Text:
    mask = arguments["encoder_attention_mask"]
    return Text(slots=arguments["encoder_hidden_states"].shape[1], length=_valid(mask), source=(mask,))


def _unpadded(arguments: Mapping[str, Any]) -> Text:
    return Text(slots=arguments["encoder_hidden_states"].shape[1])


def _three_streams(arguments: Mapping[str, Any]) -> Text:
    """HunyuanVideo 1.5 sorts image, byT5 and MLLM tokens valid-first; an all-zero image counts as invalid."""
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    streams = [arguments[name] for name in names]
    masks = (arguments["encoder_attention_mask"], arguments["encoder_attention_mask_2"])
    image = streams[2]
    length = _valid(masks[0]) + _valid(masks[1]) + image.ne(0).any().to(torch.int32) * image.shape[1]
    return Text(slots=sum(x.shape[1] for x in streams), length=length, source=(*masks, image))


HOSTS: tuple[Host, ...] = (
    Host(
        family="wan",
        models=("WanTransformer3DModel", "WanVACETransformer3DModel"),
        paths=(r"blocks\.\d+\.attn1", r"vace_blocks\.\d+\.attn1"),
        processors=("WanAttnProcessor", "WanAttnProcessor2_0"),
        patch=_three,
        cuts=(
            Place(path="", inputs={"timestep": 1}),  # of Wan 2.2 5B, one for each token
            Place(path="rope", output=1),
            Place(path=r"blocks\.0", inputs={"hidden_states": 1}),
            Place(path=r"vace_blocks\.\d+", inputs={"hidden_states": 1, "control_hidden_states": 1}),
        ),
        pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"),
    ),
    Host(
        family="hunyuan_video",
        models=("HunyuanVideoTransformer3DModel",),
        paths=(r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn"),
        processors=("HunyuanVideoAttnProcessor2_0",),
        patch=_two,
        side="after",
        text=_padded,
        usual_text=256,
        plan=_hunyuan_plan,
        cuts=(Place(path="rope", output=0), Place(path="x_embedder", output=1)),
        undivided=_replaces_tokens,
        pipelines=("HunyuanVideoPipeline",),
    ),
    Host(
        family="hunyuan_video15",
        models=("HunyuanVideo15Transformer3DModel",),
        paths=(r"transformer_blocks\.\d+\.attn",),
        processors=("HunyuanVideo15AttnProcessor2_0",),
        patch=_two,
        side="after",
        text=_three_streams,
        vae=(4, 16),
        usual_text=1985,
        plan=_hunyuan_plan,
        cuts=(Place(path="rope", output=0), Place(path="x_embedder", output=1)),
        pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    ),
    Host(
        family="cogvideox",
        models=("CogVideoXTransformer3DModel",),
        paths=(r"transformer_blocks\.\d+\.attn1",),
        processors=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
        patch=_two,
        side="before",
        text=_unpadded,
        latent=(1, 3, 4),
        usual_text=226,
        plan=_cogvideox_plan,
        cuts=(Place(path="", inputs={"image_rotary_emb": 0}), Place(path="patch_embed", output=1)),
        pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline"),
    ),
)


def host_of(module: nn.Module) -> Host | None:
    """The row of a model, by class name; wrappers that derive a class from a model's own (FSDP) are seen through."""
    names = {base.__name__ for base in type(module).__mro__}
    return next((host for host in HOSTS if names & set(host.models)), None)
