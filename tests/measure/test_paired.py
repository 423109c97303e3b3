"""A generation with its latents, and their distance from those of another one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import Tensor

import vsparse
from vsparse.measure.paired import Clip, clip_of, latent_errors

SIZE = {"height": 32, "width": 32, "frames": 5, "steps": 3}
TEXT = {  # what their encode_prompt gives, in order
    "hunyuan_video": ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
    "hunyuan_video15": ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"),
}


def made(*latents: Tensor) -> Clip:
    return Clip(frames=torch.zeros(1, 16, 16, 3), latents=latents)


def test_error_of_known_latents() -> None:
    reference = made(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), torch.zeros(2), torch.zeros(2))
    clip = made(torch.tensor([3.0, 3.0]), torch.tensor([0.0, 2.0]), torch.zeros(2), torch.ones(2))
    assert latent_errors(clip, reference) == [1 / 5, 0.0, 0.0, math.inf]


def test_error_is_computed_in_float64() -> None:
    """The squares of these leave the range of float32."""
    assert latent_errors(made(torch.tensor([2e30])), made(torch.tensor([1e30]))) == [pytest.approx(1.0)]


def test_refuses_latents_that_do_not_fit() -> None:
    one = made(torch.zeros(2))
    with pytest.raises(ValueError, match="got 2 steps"):
        latent_errors(made(torch.zeros(2), torch.zeros(2)), one)
    with pytest.raises(ValueError, match="same steps and shapes"):
        latent_errors(made(torch.zeros(3)), one)
    with pytest.raises(ValueError, match="the reference has no latents: the pipeline keeps them"):
        latent_errors(one, Clip(frames=one.frames, without_latents="the pipeline keeps them"))


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_latents_of_every_step_are_gathered(name: str) -> None:
    pipe, _ = tiny_pipelines.PIPELINES[name]()
    asked = {"prompt": "a cat", "seed": 1, **SIZE}
    told: list[int] = []
    clip = clip_of(pipe, asked, stepped=lambda: told.append(0))
    assert clip.frames.shape == (5, 32, 32, 3)
    assert len(clip.latents) == len(told) == SIZE["steps"]
    assert all(x.dtype == torch.float32 and x.ndim == 5 for x in clip.latents)
    assert not torch.equal(clip.latents[0], clip.latents[1]), "each step has its own"
    again = clip_of(pipe, asked)
    assert latent_errors(again, clip) == [0.0] * SIZE["steps"]
    other = clip_of(pipe, {**asked, "seed": 2})
    assert min(latent_errors(other, clip)) > 0.1
    assert again.without_latents == ""


def test_sparse_latents_leave_the_dense_ones_where_sparsity_begins() -> None:
    pipe, _ = tiny_pipelines.wan()
    asked = {"prompt": "a cat", "seed": 1, **SIZE}
    dense = clip_of(pipe, asked)
    with vsparse.apply(pipe, "vsa", density=0.5, block=16, schedule=vsparse.Schedule(dense_steps=1 / 3)):
        errors = latent_errors(clip_of(pipe, asked), dense)
    assert errors[0] == 0.0
    assert min(errors[1:]) > 0.0


def with_prompts(name: str) -> Any:
    """A tiny pipeline without text encoders, that takes any prompt for the embeddings of its default call."""
    pipe, call = tiny_pipelines.PIPELINES[name]()
    pipe.encode_prompt = lambda *_, **__: tuple(x for key, x in call.items() if key in TEXT[name])
    return pipe


def test_hunyuan_video_tells_its_latents() -> None:
    pipe = with_prompts("hunyuan_video")
    asked = {"prompt": "a cat", "seed": 1, "height": 128, "width": 128, "frames": 9, "steps": 2}
    assert [x.ndim for x in clip_of(pipe, asked).latents] == [5, 5]


def test_a_pipeline_without_callback_gives_frames_and_a_reason() -> None:
    pipe = with_prompts("hunyuan_video15")
    clip = clip_of(pipe, {"prompt": "a cat", "seed": 1, "height": 32, "width": 32, "frames": 5, "steps": 2})
    assert clip.frames.shape == (5, 32, 32, 3)
    assert clip.latents == ()
    assert clip.without_latents == "HunyuanVideo15Pipeline takes no callback_on_step_end, so its latents cannot be seen"


def test_what_a_pipeline_cannot_do_without_is_said() -> None:
    with pytest.raises(ValueError, match="WanImageToVideoPipeline makes no video without: image"):
        clip_of(tiny_pipelines.wan_image()[0], {"prompt": "a cat", "seed": 0, "steps": 1})
