"""Published pipelines by their names on the hub: what a plan needs of them, known without the hub."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

__all__ = ["CHECKPOINTS", "Checkpoint"]

Part = tuple[str, Mapping[str, Any]]


@dc.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A pipeline of diffusers by its configuration.

    Args:
        pipeline: Class name. parts: its transformers and autoencoder, class name and what of their configuration
            differs from the default of the class. options: other arguments of the pipeline.
    """

    pipeline: str
    parts: Mapping[str, Part]
    options: Mapping[str, Any] = dc.field(default_factory=dict)


def _wan(vae: Mapping[str, Any] | None = None, *, experts: int = 1, **config: Any) -> Mapping[str, Part]:
    names = ("transformer", "transformer_2")[:experts]
    return {**dict.fromkeys(names, ("WanTransformer3DModel", config)), "vae": ("AutoencoderKLWan", vae or {})}


def _cogvideox(**config: Any) -> Mapping[str, Part]:
    return {"transformer": ("CogVideoXTransformer3DModel", config), "vae": ("AutoencoderKLCogVideoX", {})}


_COG_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_VAE_22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}

CHECKPOINTS: Mapping[str, Checkpoint] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Checkpoint(
        pipeline="WanPipeline", parts=_wan(num_attention_heads=12, num_layers=30, ffn_dim=8960)
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Checkpoint(pipeline="WanPipeline", parts=_wan()),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": Checkpoint(
        pipeline="WanPipeline", parts=_wan(experts=2), options={"boundary_ratio": 0.875}
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": Checkpoint(
        pipeline="WanPipeline",
        parts=_wan(_VAE_22, num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48),
        options={"expand_timesteps": True},
    ),
    "hunyuanvideo-community/HunyuanVideo": Checkpoint(
        pipeline="HunyuanVideoPipeline",
        parts={
            "transformer": ("HunyuanVideoTransformer3DModel", {}),
            "vae": ("AutoencoderKLHunyuanVideo", {}),
        },
    ),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v": Checkpoint(
        pipeline="HunyuanVideo15Pipeline",
        parts={
            "transformer": ("HunyuanVideo15Transformer3DModel", {"target_size": 960, "task_type": "t2v"}),
            "vae": ("AutoencoderKLHunyuanVideo15", {}),
        },
    ),
    "zai-org/CogVideoX-2b": Checkpoint(pipeline="CogVideoXPipeline", parts=_cogvideox()),
    "zai-org/CogVideoX-5b": Checkpoint(pipeline="CogVideoXPipeline", parts=_cogvideox(**_COG_5B)),
    "zai-org/CogVideoX1.5-5B": Checkpoint(
        pipeline="CogVideoXPipeline",
        parts=_cogvideox(**_COG_5B, patch_size_t=2, patch_bias=False, sample_height=96, sample_width=170),
    ),
}
"""By name on the hub."""
