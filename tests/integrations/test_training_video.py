"""What training makes of videos is what the pipeline decodes: latents there and back, and blank ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import check
from torch import Tensor
from training_pipelines import CAPTION, FAMILIES, MEAN, STD, build, video

from vsparse.host import training_host


def to_vae(family: str, pipe: Any, latents: Tensor) -> Tensor:
    """What each family's autoencoder decodes, of the transformer's latents."""
    if family == "wan":
        mean, std = (latents.new_tensor(x).view(1, -1, 1, 1, 1) for x in (MEAN, STD))
        return latents * std + mean
    latents = latents.permute(0, 2, 1, 3, 4) if family == "cogvideox" else latents
    return latents / pipe.vae.config.scaling_factor


def from_vae(family: str, pipe: Any, latents: Tensor) -> Tensor:
    """The way back."""
    if family == "wan":
        mean, std = (latents.new_tensor(x).view(1, -1, 1, 1, 1) for x in (MEAN, STD))
        return (latents - mean) / std
    latents = latents * pipe.vae.config.scaling_factor
    return latents.permute(0, 2, 1, 3, 4) if family == "cogvideox" else latents


@contextlib.contextmanager
def decoded(pipe: Any) -> Iterator[list[Tensor]]:
    """What the autoencoder is given to decode."""
    found: list[Tensor] = []
    stock = pipe.vae.decode

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(latents)
        return stock(latents, *args, **kwargs)

    pipe.vae.decode = decode
    try:
        yield found
    finally:
        del pipe.vae.decode


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_the_pipelines(family: str) -> None:
    """The autoencoder gets what the pipeline would give it, and its frames come back in [-1, 1]."""
    pipe, call = build(family)
    side = training_host(pipe)
    latents = torch.as_tensor(pipe(**call).frames)
    with decoded(pipe) as given, torch.no_grad():
        call["generator"].manual_seed(0)
        frames = pipe(**{**call, "output_type": "pt"}).frames
        pixels = side.decode_video(latents)
    truth = to_vae(family, pipe, latents.double())
    check("latents", given[1], given[0], truth)
    assert pixels.shape == (1, 3, call["num_frames"], call["height"], call["width"])
    with torch.no_grad():
        again = pipe.vae.double().decode(truth, return_dict=False)[0].clamp(-1, 1)
    check("pixels", pixels, 2 * frames.transpose(1, 2) - 1, again)


@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_is_the_way_back(family: str) -> None:
    """Latents of two videos: the posterior's mode, scaled as the formula says; decoding hands the mode back."""
    pipe, _ = build(family)
    side = training_host(pipe)
    pixels = video(family, batch=2)
    with torch.no_grad():
        mode = torch.cat([pipe.vae.encode(x[None]).latent_dist.mode() for x in pixels])
    latents = side.encode_video(pixels)
    plain = from_vae(family, pipe, mode)
    check("latents", latents, plain, from_vae(family, pipe, mode.double()))
    assert latents.is_contiguous()
    assert latents.requires_grad is False
    with decoded(pipe) as given:
        assert side.decode_video(latents).shape == pixels.shape
    check("decoded", torch.cat(given), to_vae(family, pipe, plain), mode.double())


def test_encoding_draws_from_the_posterior() -> None:
    pipe, _ = build("wan")
    side = training_host(pipe)
    pixels = video("wan")
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4)]
    first, same, other = (side.encode_video(pixels, generator=generator) for generator in seeds)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    with torch.no_grad():
        drawn = pipe.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(3))
    check("latents", first, from_vae("wan", pipe, drawn), from_vae("wan", pipe, drawn.double()))


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(1, 3, 5, 32, 32, dtype=torch.uint8), "floating"),
        (torch.zeros(1, 5, 3, 32, 32), r"\[B, 3, F, H, W\]"),
        (torch.zeros(3, 5, 32, 32), r"\[B, 3, F, H, W\]"),
        (torch.full((1, 3, 5, 32, 32), 1.5), r"lie in \[-1, 1\]"),
        (torch.full((1, 3, 5, 32, 32), torch.nan), r"lie in \[-1, 1\]"),
        (torch.zeros(1, 3, 4, 32, 32), "frames must be 1 plus a multiple of 2, got 4; nearest: 3 and 5"),
    ],
)
def test_encoding_refuses(pixels: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        training_host(build("wan")[0]).encode_video(pixels)


@pytest.mark.parametrize("family", FAMILIES)
def test_blank_features_have_the_shapes_of_real_ones(family: str) -> None:
    """Also where the encoders are not there; masks hide nothing, so that every token is computed."""
    pipe, _ = build(family)
    side, pixels = training_host(pipe), video(family, batch=2)
    latents, text = side.encode_video(pixels), side.encode_text([CAPTION, "a cat"])
    for name in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, None)
    blank, features = side.blank(*pixels.shape[2:], batch=2)
    assert (blank.shape, blank.dtype, blank.is_contiguous()) == (latents.shape, latents.dtype, True)
    assert {name: x.shape for name, x in features.items()} == {name: x.shape for name, x in text.items()}
    assert all(bool(x.all()) for name, x in features.items() if "mask" in name)
    with pytest.raises(ValueError, match="height must be"):
        side.blank(pixels.shape[2], 1, pixels.shape[4], batch=1)
