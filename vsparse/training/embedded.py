"""The parts of the embedded model before training, and the loss of its VAE."""

from __future__ import annotations

import math
import string
from typing import Any

import torch
from torch import Tensor, nn

from vsparse.measure.shapes import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES
from vsparse.optional import require

__all__ = [
    "Z_DIM",
    "build_text_encoder",
    "build_tokenizer",
    "build_transformer",
    "build_vae",
    "crops",
    "decode",
    "encode",
    "set_latent_statistics",
    "vae_loss",
]

Z_DIM = 8
TEXT_DIM = 64
NOISE = 0.1
"""Standard deviation of the noise on latents in training, and of the posterior that the finished VAE declares."""


def build_tokenizer() -> Any:
    """A T5 tokenizer whose vocabulary is the words of the prompts, and single characters for all else."""
    words = ["a", "moving", "on", "background", *COLORS, *SHAPES, *DIRECTIONS, *BACKGROUNDS]
    characters = [*string.ascii_letters, *string.digits, *".,!?'-:;\"()"]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    scores += [("\u2581" + word, -1.0) for word in words]  # the mark of a word's begin: a whole word beats its letters
    scores += [("\u2581", -8.0), *((character, -10.0) for character in characters)]
    return require("transformers", "diffusers").T5TokenizerFast(vocab=scores, extra_ids=0)


def build_text_encoder(tokenizer: Any, *, seed: int = 0) -> Any:
    """A `UMT5EncoderModel` of one layer and width 64 that is not trained: each word keeps a direction of its own.

    Args:
        tokenizer: Gives the number of entries.
        seed: Of the weights; the generator of torch is left as it was.

    Returns:
        float32, on the CPU, in evaluation mode.
    """
    transformers = require("transformers", "diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.UMT5Config(
            vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=16, d_ff=64, num_layers=1, num_heads=2
        )
        encoder = transformers.UMT5EncoderModel(config).eval()
        nn.init.normal_(encoder.shared.weight)  # large against what the random layer adds, so that words stay apart
    return encoder.requires_grad_(False)


def build_transformer(*, z_dim: int = Z_DIM, seed: int = 0) -> Any:
    """The `WanTransformer3DModel` to be trained: 6 layers, 2 heads of 64, patch 1×1×1.

    Args:
        z_dim: Latent channels.
        seed: Of the weights; the generator of torch is left as it was.

    Returns:
        float32, on the CPU. It begins by predicting zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = require("diffusers", "diffusers").WanTransformer3DModel(
            patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=64, in_channels=z_dim, out_channels=z_dim,
            text_dim=TEXT_DIM, freq_dim=256, ffn_dim=512, num_layers=6, rope_max_seq_len=64, cross_attn_norm=True,
        )  # fmt: skip
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    for block in model.blocks:
        block.scale_shift_table.data.mul_(0.3)
    return model


def build_vae(*, z_dim: int = Z_DIM, seed: int = 0) -> Any:
    """The `AutoencoderKLWan` to be trained: 8× in space, of which 4× by patches, and 2× in time.

    Residual branches begin at zero. Attention in the middle stays off, so that a crop is seen as it would be inside its
    picture. The posterior's variance is a constant, `NOISE` squared.

    Args:
        z_dim: Latent channels.
        seed: Of the weights; the generator of torch is left as it was.

    Returns:
        float32, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = require("diffusers", "diffusers").AutoencoderKLWan(
            base_dim=32, z_dim=z_dim, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
            in_channels=48, out_channels=48, patch_size=4, scale_factor_temporal=2, scale_factor_spatial=8,
            latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim,
        )  # fmt: skip
    for name, parameter in vae.named_parameters():
        if name.rsplit(".", 1)[0].endswith("conv2"):
            nn.init.zeros_(parameter)
        if ".attentions." in name:
            parameter.requires_grad_(False)
            if ".proj." in name:
                nn.init.zeros_(parameter)
    with torch.no_grad():
        vae.quant_conv.weight[z_dim:] = 0
        vae.quant_conv.bias[z_dim:] = 2 * math.log(NOISE)
    return vae


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Means of the latents, `[B, C, T, h, w]`, of pixels `[B, 3, F, H, W]` in [-1, 1]; not normalised."""
    mean: Tensor = vae.encode(pixels, return_dict=False)[0].mean
    return mean


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels `[B, 3, F, H, W]` of latents that are not normalised, without the clamp of `vae.decode`.

    The clamp has no gradient where a pixel overshoots, and a VAE that begins there would not learn.
    """
    patches = require("diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers").unpatchify
    vae.clear_cache()
    hidden, frames = vae.post_quant_conv(latents), []
    for i in range(latents.shape[2]):
        vae._conv_idx = [0]
        chunk = hidden[:, :, i : i + 1]
        frames.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    pixels: Tensor = patches(torch.cat(frames, 2), patch_size=vae.config.patch_size)
    return pixels


def vae_loss(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Reconstruction error through noisy latents, and a weak pull of the latents to zero.

    Args:
        vae: From `build_vae`.
        pixels: float32 `[B, 3, F, H, W]` in [-1, 1]; `F` is 1 more than a multiple of 4.
        generator: Of the noise, on the device of the pixels.

    Returns:
        A scalar: squared + 0.3 absolute error per value, + 0.001 squared latent.
    """
    latents = encode(vae, pixels)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    error = decode(vae, latents + NOISE * noise) - pixels
    return error.square().mean() + 0.3 * error.abs().mean() + 1e-3 * latents.square().mean()


def set_latent_statistics(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Write mean and standard deviation of each latent channel where pipelines read them: the configuration."""
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def crops(clips: Tensor, *, side: int, generator: torch.Generator) -> Tensor:
    """One square of each clip around a random coloured place, where there is more to learn than on plain ground.

    Args:
        clips: `[B, 3, F, H, W]`. side: Height and width of the squares. generator: On the CPU.

    Returns:
        `[B, 3, F, side, side]`; each square holds a place that is coloured in the middle frame, unless the border is
        nearer.
    """
    height, width = clips.shape[-2:]
    middle = clips[:, :, clips.shape[2] // 2]
    colored = (middle.amax(1) - middle.amin(1)).square().flatten(1)
    place = torch.multinomial(colored, 1, generator=generator)[:, 0]
    shift = torch.randint(0, side, (2, len(clips)), generator=generator)
    top = (place // width - shift[0]).clamp(0, height - side).tolist()
    left = (place % width - shift[1]).clamp(0, width - side).tolist()
    return torch.stack([clip[:, :, y : y + side, x : x + side] for clip, y, x in zip(clips, top, left, strict=True)])
