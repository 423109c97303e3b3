"""What training needs of a diffusers pipeline (`vsparse.host.TrainingHost`): one class per model family.

Everything the pipeline can do itself, it does: its `encode_prompt`, its rotary positions, its condition latents. What
its denoising loop does inline is repeated here, and the tests compare each argument with the loop's, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vsparse.host import TrainingHost

from .hosts import host_of

__all__ = ["training_side"]


class _Side:
    """What the families have in common.

    Args:
        pipe: The pipeline. What is read from it is read when it is used, so that components may come and go.
    """

    text_names: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    # ---- sizes ----------------------------------------------------------------------------------------------------

    @property
    def experts(self) -> Mapping[str, tuple[float, float]]:
        """One transformer for all noise."""
        return {"transformer": (0.0, 1.0)}

    def expert(self, timestep: float) -> str:
        """The one transformer."""
        return "transformer"

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Refuse what the autoencoder or the patches would cut or pad."""
        transformer = self._transformer()
        host = host_of(transformer)
        assert host is not None
        t, h, w = host.patch(transformer)
        temporal, spatial = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        asked = {
            "frames": (frames, temporal * (t - 1) + 1, temporal * t),
            "height": (height, spatial * h, spatial * h),
            "width": (width, spatial * w, spatial * w),
        }
        wrong = [
            f"{name} must be {first} plus a multiple of {step}, got {value}; nearest: {_nearest(value, first, step)}"
            for name, (value, first, step) in asked.items()
            if value < first or (value - first) % step
        ]
        if wrong:
            raise ValueError("; ".join(wrong))

    def _transformer(self) -> Any:
        name = next((name for name in self.experts if getattr(self.pipe, name, None) is not None), "transformer")
        return self._component(name)

    def _component(self, name: str) -> Any:
        found = getattr(self.pipe, name, None)
        if found is None:
            raise ValueError(f"{type(self.pipe).__name__} was loaded without its {name}, which is needed here")
        return found

    # ---- features -------------------------------------------------------------------------------------------------

    def blank(self, frames: int, height: int, width: int, *, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Shapes from the configuration of the transformer and the pipeline's own numbers."""
        self.check_size(frames, height, width)
        temporal, spatial = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        sizes = ((frames - 1) // temporal + 1, height // spatial, width // spatial)
        config = self._transformer().config
        latents = self._layout(torch.zeros(batch, config.out_channels, *sizes)).contiguous()
        named = zip(self.text_names, self._text_shapes(config), strict=True)
        return latents, {name: (torch.ones if "mask" in name else torch.zeros)(batch, *shape) for name, shape in named}

    def _text_shapes(self, config: Any) -> tuple[tuple[int, ...], ...]:
        """Shapes of the text features of one sample, in the order of ``text_names``."""
        return ((self._text_slots(), config.text_embed_dim),)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The pipeline's own embeddings and masks."""
        if isinstance(captions, str) or not captions or not all(isinstance(x, str) for x in captions):
            raise ValueError(f"captions must be a list of at least one string, got {captions!r}")
        for name in self.text_parts:
            self._component(name)
        return dict(zip(self.text_names, self._prompt(list(captions)), strict=True))

    def _prompt(self, captions: list[str]) -> tuple[Tensor, ...]:
        """What `encode_prompt` gives, in the order of ``text_names``."""
        embeds, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, max_sequence_length=self._text_slots()
        )
        return (embeds,)

    def _text_slots(self) -> int:
        """Text tokens of the pipeline's call, which are not always the default of its `encode_prompt`."""
        return int(_call_default(self.pipe, "max_sequence_length"))

    @torch.no_grad()
    def encode_video(self, pixels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Posterior of the autoencoder, scaled and in the transformer's layout."""
        _check_pixels(pixels)
        self.check_size(*pixels.shape[2:])
        latents = torch.cat([self._encode(video[None], generator) for video in pixels])
        shift, factor = self._scale(latents)
        return self._layout((latents - shift) * factor).contiguous()

    def _encode(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """The autoencoder's latents of one video; that of HunyuanVideo 1.5 cannot take two (diffusers #13133)."""
        vae = self._component("vae")
        posterior = vae.encode(pixels.to(self.pipe._execution_device, vae.dtype)).latent_dist
        latents: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
        return latents.to(torch.promote_types(latents.dtype, torch.float32))

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> Tensor:
        """Undo the layout and the scale, then decode."""
        vae, wide = self._component("vae"), torch.promote_types(latents.dtype, torch.float32)
        latents = self._layout(latents).to(self.pipe._execution_device, wide)
        shift, factor = self._scale(latents)
        latents = (latents / factor + shift).to(vae.dtype)
        pixels = torch.cat([vae.decode(x[None], return_dict=False)[0] for x in latents])
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32)).clamp(-1, 1)

    def _layout(self, latents: Tensor) -> Tensor:
        """Between the autoencoder's ``[B, C, T, h, w]`` and the transformer's layout; its own inverse."""
        return latents

    def _scale(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What is subtracted from the autoencoder's latents, and what they are then multiplied with."""
        return 0.0, float(self._component("vae").config.scaling_factor)

    # ---- the model call -------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """One call of a transformer, in the dtype that its pipeline would use."""
        if set(text) != set(self.text_names):
            raise ValueError(f"text must have {', '.join(self.text_names)}, got {', '.join(sorted(text)) or 'nothing'}")
        from diffusers.models.modeling_utils import get_parameter_dtype

        # DDP and FSDP1 hide the list of modules that stay in float32, which the dtype of a model is read without.
        dtype: torch.dtype = get_parameter_dtype(getattr(model, "module", model))
        arguments = self._arguments(noisy.to(dtype), timestep)
        arguments |= {name: text[name].to(noisy.device, dtype) for name in self.text_names}
        prediction: Tensor = model(**arguments, return_dict=False)[0]
        return prediction

    def _arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        """Arguments of the transformer besides text; ``noisy`` has the model's dtype."""
        return {"hidden_states": noisy, "timestep": timestep}


class _Wan(_Side):
    """`WanPipeline`: Wan 2.1, and Wan 2.2 with two experts or with a timestep for each token."""

    @property
    def experts(self) -> Mapping[str, tuple[float, float]]:
        """Above ``boundary_ratio`` of the noise the first transformer, below it the second."""
        boundary = self.pipe.config.boundary_ratio
        if boundary is None:
            return super().experts
        ranges = {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}
        return {name: (low, high) for name, (low, high) in ranges.items() if low < high}

    def expert(self, timestep: float) -> str:
        """Which of the two."""
        boundary, steps = self.pipe.config.boundary_ratio, self.pipe.scheduler.config.num_train_timesteps
        return "transformer" if boundary is None or timestep >= boundary * steps else "transformer_2"

    def _scale(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self._component("vae").config
        mean, std = (latents.new_tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        return mean, 1.0 / std

    def _text_shapes(self, config: Any) -> tuple[tuple[int, ...], ...]:
        return ((self._text_slots(), config.text_dim),)

    def _arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        if self.pipe.config.expand_timesteps:
            # No condition frame: the same timestep for every token.
            tokens = noisy[0, 0, :, ::2, ::2].numel()
            timestep = timestep.float()[:, None].expand(-1, tokens)
        return super()._arguments(noisy, timestep)


class _HunyuanVideo(_Side):
    """`HunyuanVideoPipeline`: two text encoders, and a guidance scale that the model takes as an input."""

    text_names = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")

    def __init__(self, pipe: Any, guidance: float | None) -> None:
        super().__init__(pipe)
        self.guidance = float(_call_default(pipe, "guidance_scale")) if guidance is None else guidance

    def _prompt(self, captions: list[str]) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.pipe.encode_prompt(captions, max_sequence_length=self._text_slots())
        return found

    def _text_shapes(self, config: Any) -> tuple[tuple[int, ...], ...]:
        slots = self._text_slots()
        return (slots, config.text_embed_dim), (config.pooled_projection_dim,), (slots,)

    def _arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        guidance = torch.full((len(noisy),), self.guidance, dtype=noisy.dtype, device=noisy.device) * 1000.0
        return {**super()._arguments(noisy, timestep.float()), "guidance": guidance}


class _HunyuanVideo15(_Side):
    """`HunyuanVideo15Pipeline`: two streams of text, an empty image stream, empty condition latents and mask."""

    text_names = (
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
    )
    text_parts = _HunyuanVideo.text_parts

    def _prompt(self, captions: list[str]) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.pipe.encode_prompt(captions, batch_size=len(captions))
        return found

    def _text_shapes(self, config: Any) -> tuple[tuple[int, ...], ...]:
        first, second = self.pipe.tokenizer_max_length, self.pipe.tokenizer_2_max_length
        return (first, config.text_embed_dim), (first,), (second, config.text_embed_2_dim), (second,)

    def _arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        dtype, device = noisy.dtype, noisy.device
        condition = self.pipe.prepare_cond_latents_and_mask(noisy, dtype, device)
        image = noisy.new_zeros(len(noisy), self.pipe.vision_num_semantic_tokens, self.pipe.vision_states_dim)
        hidden = torch.cat([noisy, *condition], dim=1)
        return {**super()._arguments(hidden, timestep.to(dtype)), "image_embeds": image}


class _CogVideoX(_Side):
    """`CogVideoXPipeline`: frames before channels, rotary positions given from outside.

    The latents of a video are multiplied with the scaling factor whatever ``invert_scale_latents`` says: that switch is
    for the condition image of the image-to-video models, and the pipeline decodes videos without it. CogVideoX 1.5
    patchifies two latent frames at once; where its pipeline pads the noise, training takes lengths that need no padding
    (85 frames make the grid that 81 are padded to).
    """

    def _text_slots(self) -> int:
        return int(self._transformer().config.max_text_seq_length)

    def _layout(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2)

    def _arguments(self, noisy: Tensor, timestep: Tensor) -> dict[str, Any]:
        rotary = None
        if self._transformer().config.use_rotary_positional_embeddings:
            frames, (rows, columns) = noisy.shape[1], (n * self.pipe.vae_scale_factor_spatial for n in noisy.shape[3:])
            rotary = self.pipe._prepare_rotary_positional_embeddings(rows, columns, frames, noisy.device)
        return {**super()._arguments(noisy, timestep), "image_rotary_emb": rotary}


_SIDES: Mapping[str, type[_Side]] = {
    "WanPipeline": _Wan,
    "HunyuanVideoPipeline": _HunyuanVideo,
    "HunyuanVideo15Pipeline": _HunyuanVideo15,
    "CogVideoXPipeline": _CogVideoX,
}


def training_side(target: object, guidance: float | None) -> TrainingHost | None:
    """The family's class around a pipeline; None when the target is nothing of diffusers.

    Raises:
        ValueError: a model without its pipeline, a pipeline that is not text-to-video, or a stray ``guidance``.
    """
    name = type(target).__name__
    if isinstance(target, nn.Module) and host_of(target) is not None:
        raise ValueError(f"training needs the pipeline, which has the autoencoder and text encoders, not {name} alone")
    if not isinstance(getattr(target, "components", None), Mapping):
        return None
    if name not in _SIDES:
        raise ValueError(
            f"vsparse cannot train {name}; known are the text-to-video pipelines {', '.join(_SIDES)}. Others condition "
            "on images or videos, which stored latents and captions do not hold"
        )
    if _SIDES[name] is _HunyuanVideo:
        return _HunyuanVideo(target, guidance)
    if guidance is not None:
        raise ValueError(f"guidance: {name} embeds no guidance scale, got {guidance!r}")
    return _SIDES[name](target)


def _call_default(pipe: object, name: str) -> Any:
    return inspect.signature(type(pipe).__call__).parameters[name].default


def _nearest(value: int, first: int, step: int) -> str:
    below = first + max(0, (value - first) // step) * step
    return str(first) if value < first else f"{below} and {below + step}"


def _check_pixels(pixels: Tensor) -> None:
    if pixels.ndim != 5 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(f"pixels must be floating [B, 3, F, H, W], got {pixels.dtype} {tuple(pixels.shape)}")
    low, high = (float(x) for x in pixels.aminmax())
    if not (low >= -1 and high <= 1):
        raise ValueError(
            f"pixels must lie in [-1, 1], these in [{low:g}, {high:g}]; scale them, and clamp after resizing"
        )
