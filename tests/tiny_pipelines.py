"""Whole diffusers pipelines made of the tiny hosts: real tokenizer, text encoder, VAE, scheduler; a run takes a moment.

Each builder returns the pipeline and the keyword arguments of a default call (2 steps, 5 frames, 32x32 pixels, latents
out). HunyuanVideo's pipelines have no text encoders: their calls bring prompt embeddings.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import tiny
import torch
from torch import nn

Built = tuple[Any, dict[str, Any]]

LATENT = 4
SIZE = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
PROMPT = {"prompt": "a cat", "negative_prompt": "blur"}


def _text() -> tuple[Any, Any]:
    from transformers import T5TokenizerFast

    letters = string.ascii_letters + string.digits + ".,!?'-:;\"()"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0), ("\u2581", -2.0)] + [(c, -3.0) for c in letters]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    sizes = {"d_model": tiny.TEXT_DIM, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return tokenizer, {**sizes, "vocab_size": len(tokenizer)}


def _umt5() -> tuple[Any, Any]:
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer, sizes = _text()
    with tiny.seeded(1):
        return tokenizer, UMT5EncoderModel(UMT5Config(**sizes)).eval()


def _wan_vae() -> nn.Module:
    from diffusers import AutoencoderKLWan

    with tiny.seeded(2):
        return AutoencoderKLWan(
            base_dim=4,
            z_dim=LATENT,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.0] * LATENT,
            latents_std=[1.0] * LATENT,
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        ).eval()


def _flow(**options: Any) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **options)


def wan(*, experts: int = 1, layers: int = 2) -> Built:
    """`WanPipeline`; two experts make the form of Wan 2.2 (`transformer_2` takes over below 0.9 of the noise)."""
    from diffusers import WanPipeline

    tokenizer, encoder = _umt5()
    models = [tiny.wan(layers=layers, channels=LATENT, seed=10 * i)[0] for i in range(experts)]
    second = {"transformer_2": models[1], "boundary_ratio": 0.9} if experts == 2 else {}
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=_wan_vae(), scheduler=_flow(), transformer=models[0], **second
    )
    return _quiet(pipe), {**PROMPT, **SIZE, "guidance_scale": 4.0, "max_sequence_length": 16}


def wan_image(*, layers: int = 2) -> Built:
    """`WanImageToVideoPipeline` in the Wan 2.2 form: the first frame joins the latents, no image encoder."""
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    tokenizer, encoder = _umt5()
    transformer, _ = tiny.wan(layers=layers, channels=2 * LATENT + 2, out_channels=LATENT)
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=_wan_vae(), scheduler=_flow(), transformer=transformer,
        boundary_ratio=0.0,
    )  # fmt: skip
    image = Image.new("RGB", (SIZE["width"], SIZE["height"]), (200, 60, 30))
    return _quiet(pipe), {**_embeddings(), **SIZE, "image": image, "guidance_scale": 4.0}


def _embeddings() -> dict[str, Any]:
    """Prompt embeddings: these pipelines need ftfy, which is not installed, to read a prompt."""
    text = tiny.wan(layers=1)[1](2, text_lengths=[9, 5])["encoder_hidden_states"]
    return {"prompt_embeds": text[:1], "negative_prompt_embeds": text[1:]}


def wan_vace() -> Built:
    """`WanVACEPipeline` without a control video (an empty one and a full mask are made inside)."""
    from diffusers import WanVACEPipeline

    tokenizer, encoder = _umt5()
    transformer, _ = tiny.wan_vace(channels=LATENT, control_channels=2 * LATENT + 4)
    pipe = WanVACEPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=_wan_vae(), scheduler=_flow(), transformer=transformer
    )
    return _quiet(pipe), {**_embeddings(), **SIZE, "guidance_scale": 4.0}


def hunyuan_video() -> Built:
    """`HunyuanVideoPipeline`; true classifier-free guidance is on, with a shorter negative prompt."""
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    with tiny.seeded(2):
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=LATENT,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ).eval()
    transformer, inputs = tiny.hunyuan_video(channels=LATENT)
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer,
    )
    good, bad = inputs(text_lengths=[17], seed=1), inputs(text_lengths=[5], seed=2)
    call = {
        "prompt_embeds": good["encoder_hidden_states"],
        "pooled_prompt_embeds": good["pooled_projections"],
        "prompt_attention_mask": good["encoder_attention_mask"],
        "negative_prompt_embeds": bad["encoder_hidden_states"],
        "negative_pooled_prompt_embeds": bad["pooled_projections"],
        "negative_prompt_attention_mask": bad["encoder_attention_mask"],
        "true_cfg_scale": 3.0,
    }
    return _quiet(pipe), {**call, **SIZE, "height": 128, "width": 128, "num_frames": 9}


def hunyuan_video15() -> Built:
    """`HunyuanVideo15Pipeline` with its guider."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
    )

    with tiny.seeded(2):
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=LATENT,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=2,
            temporal_compression_ratio=2,
        ).eval()
    transformer, inputs = tiny.hunyuan_video15(channels=2 * LATENT + 1, out_channels=LATENT, patch=2)
    pipe = HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer,
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    call: dict[str, Any] = {}
    for prefix, values in (("", inputs(text_lengths=[9], seed=1)), ("negative_", inputs(text_lengths=[3], seed=2))):
        call[f"{prefix}prompt_embeds"] = values["encoder_hidden_states"]
        call[f"{prefix}prompt_embeds_mask"] = values["encoder_attention_mask"]
        call[f"{prefix}prompt_embeds_2"] = values["encoder_hidden_states_2"]
        call[f"{prefix}prompt_embeds_mask_2"] = values["encoder_attention_mask_2"]
    return _quiet(pipe), {**call, **SIZE}


def cogvideox() -> Built:
    """`CogVideoXPipeline`: both guidance branches in one batched call."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
    from transformers import T5Config, T5EncoderModel

    tokenizer, sizes = _text()
    with tiny.seeded(1):
        encoder = T5EncoderModel(T5Config(**sizes)).eval()
    with tiny.seeded(2):
        vae = AutoencoderKLCogVideoX(
            latent_channels=LATENT,
            block_out_channels=(8, 8),
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=2,
            sample_height=32,
            sample_width=32,
        ).eval()
    transformer, _ = tiny.cogvideox(channels=LATENT, text_slots=16)
    pipe = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    )
    return _quiet(pipe), {**PROMPT, **SIZE, "guidance_scale": 4.0, "max_sequence_length": 16}


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(built: Built, **changes: Any) -> torch.Tensor:
    """Frames (or latents) of one seeded call."""
    pipe, call = built
    return torch.as_tensor(pipe(**{"generator": torch.Generator().manual_seed(0), **call, **changes}).frames)


PIPELINES: dict[str, Callable[..., Built]] = {
    "wan": wan,
    "wan_image": wan_image,
    "wan_vace": wan_vace,
    "hunyuan_video": hunyuan_video,
    "hunyuan_video15": hunyuan_video15,
    "cogvideox": cogvideox,
}
