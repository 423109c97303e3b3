"""The pipeline that comes along: what it is, and that nothing of its origin stayed in it."""

from __future__ import annotations

import dataclasses as dc
import json
import socket

import pytest
import tiny_pipelines
import torch

from vsparse.measure.adherence import adherence
from vsparse.measure.embedded import EMBEDDED, embedded_path, embedded_pipeline
from vsparse.measure.pipelines import generate
from vsparse.measure.shapes import held_out


def test_loads_without_the_network_and_makes_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the embedded pipeline reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    names = [type(pipe.components[name]).__name__ for name in ("text_encoder", "transformer", "vae")]
    assert [type(pipe).__name__, *names] == [
        "WanPipeline", "UMT5EncoderModel", "WanTransformer3DModel", "AutoencoderKLWan",
    ]  # fmt: skip
    for name in ("text_encoder", "transformer", "vae"):
        assert {p.dtype for p in pipe.components[name].parameters()} == {torch.float32}
    assert pipe.transformer.config.attention_head_dim == 64
    tokens = []
    hook = pipe.transformer.blocks[0].attn1.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    steps = []
    asked = dc.asdict(dc.replace(EMBEDDED, steps=1))
    frames = generate(pipe, prompt="a red circle", seed=0, stepped=lambda: steps.append(1), **asked)
    hook.remove()
    assert frames.shape == (9, EMBEDDED.height, EMBEDDED.width, 3)
    assert set(tokens) == {1280}
    assert steps == [1]


def test_configurations_name_no_place() -> None:
    for path in embedded_path().rglob("*config*.json"):
        assert "_name_or_path" not in json.loads(path.read_text()), path.name


def test_arguments_that_a_pipeline_does_not_take_are_refused() -> None:
    class Pipe:
        def __call__(self, prompt: str, generator: object, output_type: str) -> None: ...

    with pytest.raises(ValueError, match="Pipe takes no num_frames, guidance_scale"):
        generate(Pipe(), prompt="x", seed=0, frames=3, guidance=2.0)


def test_a_pipeline_that_lacks_ftfy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    built = tiny_pipelines.wan_vace()

    def missing(*_: object, **__: object) -> object:
        raise NameError("name 'ftfy' is not defined", name="ftfy")

    monkeypatch.setattr(built[0], "encode_prompt", missing)
    with pytest.raises(ImportError, match="WanVACEPipeline of this diffusers needs ftfy: pip install ftfy"):
        generate(built[0], prompt="a cat", seed=0, height=32, width=32, frames=5, steps=1)


@pytest.mark.parametrize("place", [3, 16])
def test_it_follows_prompts_that_it_was_not_trained_on(place: int) -> None:
    pipe, scene = embedded_pipeline(), held_out()[place]
    pipe.set_progress_bar_config(disable=True)
    found = adherence(generate(pipe, prompt=scene.prompt, seed=0, **dc.asdict(EMBEDDED)), scene)
    assert found.follows, found
    assert found.coherent, found
