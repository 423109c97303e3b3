"""What training takes from a pipeline is what the pipeline uses: text, sizes, every argument of the model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch
from torch import Tensor, nn
from training_pipelines import CAPTION, FAMILIES, build, video

from vsparse.host import TrainingHost, training_host


@contextlib.contextmanager
def heard(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Keyword arguments of every call of a model."""
    found: list[dict[str, Any]] = []

    def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        found.append({key: value for key, value in kwargs.items() if key not in ("return_dict", "attention_kwargs")})

    handle = model.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def flat(values: dict[str, Any]) -> dict[str, Tensor | None]:
    """Tensors of a call by name; those in tuples one by one."""
    found: dict[str, Tensor | None] = {}
    for name, value in values.items():
        parts = dict(enumerate(value)) if isinstance(value, tuple) else {0: value}
        found |= {f"{name}.{i}": x for i, x in parts.items()}
    return found


def euler(pipe: Any) -> None:
    """Fractional timesteps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)


def by_token(pipe: Any) -> None:
    """The form of Wan 2.2 with 5B parameters."""
    pipe.register_to_config(expand_timesteps=True)


def high_noise_alone(pipe: Any) -> None:
    """Wan 2.2 with only the expert for high noise in memory."""
    pipe.register_to_config(boundary_ratio=0.5)


def changed(**config: Any) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        stock = pipe.transformer
        pipe.register_modules(transformer=type(stock).from_config({**stock.config, **config}))

    return change


def bfloat16(pipe: Any) -> None:
    """As `from_pretrained` gives it: some parts of the transformer stay float32."""
    rows.cast(pipe.transformer, torch.bfloat16)
    for part in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, part, None) is not None:
            getattr(pipe, part).to(torch.bfloat16)


FORMS: dict[str, tuple[str, tuple[Callable[[Any], None], ...]]] = {
    **{family: (family, ()) for family in FAMILIES},
    **{f"{family}, bfloat16": (family, (bfloat16,)) for family in FAMILIES},
    "wan, euler": ("wan", (euler,)),
    "wan 2.2, 5B": ("wan", (by_token, euler, bfloat16)),
    "wan 2.2, 5B, unipc": ("wan", (by_token,)),
    "wan 2.2, one expert": ("wan", (high_noise_alone,)),
    "hunyuan_video without guidance": ("hunyuan_video", (changed(guidance_embeds=False),)),
    "cogvideox 2B": ("cogvideox", (changed(use_rotary_positional_embeddings=False),)),
    "cogvideox 1.5": ("cogvideox", (changed(patch_size_t=2, patch_bias=False), bfloat16)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forward_passes_what_the_loop_passes(form: str) -> None:
    """Every argument of the first denoising step, bit for bit; the prediction has the shape of the latents."""
    family, changes = FORMS[form]
    pipe, call = build(family)
    for change in changes:
        change(pipe)
    frames = 7 if form == "cogvideox 1.5" else call["num_frames"]
    side = training_host(pipe)
    side.check_size(frames, call["height"], call["width"])
    kept: list[Tensor] = []
    prepare = pipe.prepare_latents

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        kept.append(prepare(*args, **kwargs))
        return kept[-1]

    pipe.prepare_latents = keep
    with heard(pipe.transformer) as calls:
        pipe(**{**call, "num_frames": frames, "num_inference_steps": 1})
        (wanted,) = calls
    timestep = pipe.scheduler.timesteps[:1]
    with heard(pipe.transformer) as calls, torch.no_grad():
        prediction = side.forward(pipe.transformer, kept[0], timestep, side.encode_text([CAPTION]))
        (found,) = map(flat, calls)
    wanted = flat(wanted)
    assert found.keys() >= wanted.keys(), found.keys() ^ wanted.keys()
    assert all(found[name] is None for name in found.keys() - wanted.keys())
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name], value), name
    assert prediction.shape == kept[0].shape
    assert prediction.dtype == pipe.transformer.dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_takes_batches_and_wrappers(family: str) -> None:
    """A batch is its samples, and a wrapper does not change the dtype."""

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **arguments: Any) -> Any:
            return self.module(**arguments)

    pipe, _ = build(family)
    bfloat16(pipe)
    side = training_host(pipe)
    text = side.encode_text(["a cat", ""])
    noisy = side.encode_video(video(family, batch=2))
    timestep = torch.tensor([900.0, 17.0])
    with heard(pipe.transformer) as calls, torch.no_grad():
        side.forward(Wrapped(pipe.transformer), noisy, timestep, text)
        for i in range(2):
            row = {name: x[i : i + 1] for name, x in text.items()}
            side.forward(pipe.transformer, noisy[i : i + 1], timestep[i : i + 1], row)
    batch, *single = map(flat, calls)
    for name, value in batch.items():
        if value is not None and value.shape[0] == 2 and not name.startswith("image_rotary"):
            rows_of = torch.cat([x[name] for x in single])
            assert value.dtype == rows_of.dtype, name
            assert torch.equal(value, rows_of), name


# ---- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_text_has_one_shape(family: str) -> None:
    """Captions of any length, the empty one included, give tensors that fit into one batch, and different ones."""
    side = training_host(build(family)[0])
    found = side.encode_text(["", "a cat", CAPTION])
    alone = side.encode_text([""])
    for name, value in found.items():
        assert value.shape[0] == 3, name
        assert alone[name].shape == (1, *value.shape[1:]), name
        assert value.requires_grad is False
        assert not torch.equal(value[0], value[2]), name
    assert not torch.equal(found["encoder_hidden_states"][0], found["encoder_hidden_states"][1])


@pytest.mark.parametrize("captions", ["a cat", [], [b"a cat"]])
def test_text_refuses(captions: Any) -> None:
    with pytest.raises(ValueError, match="captions must be a list"):
        training_host(build("wan")[0]).encode_text(captions)


# ---- sizes and experts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FAMILIES, "cogvideox 1.5"])
def test_sizes_that_are_taken(form: str) -> None:
    """A size is taken where nothing is cut or padded; a message names the two neighbours, which are taken."""
    family, changes = FORMS[form]
    pipe, _ = build(family)
    for change in changes:
        change(pipe)
    side = training_host(pipe)
    temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    config = pipe.transformer.config
    t, h = config.patch_size[:2] if family == "wan" else (config.get("patch_size_t"), config.patch_size)
    latent = [n for n in range(1, 40) if n % (t or 1) == 0]
    good = {"frames": {temporal * (n - 1) + 1 for n in latent}, "height": {spatial * h * n for n in range(1, 40)}}
    good["width"] = good["height"]
    fits = {name: min(values) for name, values in good.items()}
    for name, accepted in good.items():
        for value in range(-1, max(accepted)):
            if value in accepted:
                side.check_size(**{**fits, name: value})
                continue
            with pytest.raises(ValueError, match=f"{name} must be") as refused:
                side.check_size(**{**fits, name: value})
            nearest = {int(x) for x in re.findall(r"\d+", str(refused.value).rpartition("nearest:")[2])}
            below, above = ([x for x in accepted if side_of(x)] for side_of in (value.__gt__, value.__lt__))
            assert nearest == ({max(below)} if below else set()) | {min(above)}


def test_experts_are_the_pipelines() -> None:
    """Wan 2.2: at each timestep the transformer that the pipeline calls, and ranges of noise that say the same."""
    pipe, call = tiny_pipelines.wan(experts=2)
    side = training_host(pipe)
    with contextlib.ExitStack() as stack:
        calls = {name: stack.enter_context(heard(getattr(pipe, name))) for name in ("transformer", "transformer_2")}
        pipe(**{**call, "num_inference_steps": 12})
    assert side.experts == {"transformer": (0.9, 1.0), "transformer_2": (0.0, 0.9)}
    for name, (low, high) in side.experts.items():
        times = {float(x["timestep"]) for x in calls[name]}
        assert times
        assert {side.expert(t) for t in times} == {name}
        assert all(low <= t / 1000 < high for t in times)


def test_one_expert_alone() -> None:
    """The second transformer of Wan 2.2 trains without the first in memory."""
    pipe, _ = tiny_pipelines.wan(experts=2)
    second, pipe.transformer = pipe.transformer_2, None
    side = training_host(pipe)
    side.check_size(5, 32, 32)
    with torch.no_grad():
        noisy = side.encode_video(video("wan"))
        assert side.forward(second, noisy, torch.tensor([500]), side.encode_text(["a cat"])).shape == noisy.shape


def test_one_transformer_takes_all_noise() -> None:
    for family in FAMILIES:
        side = training_host(build(family)[0])
        assert side.experts == {"transformer": (0.0, 1.0)}
        assert {side.expert(t) for t in (0.0, 500.0, 999.0)} == {"transformer"}


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_guidance_is_a_choice_where_it_is_embedded() -> None:
    pipe, _ = build("hunyuan_video")
    side = training_host(pipe, guidance=1.0)
    with heard(pipe.transformer) as calls, torch.no_grad():
        text = side.encode_text(["a cat"])
        side.forward(pipe.transformer, side.encode_video(video("hunyuan_video")), torch.tensor([500.0]), text)
    assert calls[0]["guidance"].tolist() == [1000.0]
    with pytest.raises(ValueError, match=r"guidance: WanPipeline embeds no guidance scale, got 6\.0"):
        training_host(build("wan")[0], guidance=6.0)


@pytest.mark.parametrize("name", ["wan_image", "wan_vace"])
def test_other_pipelines_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot train Wan\w+Pipeline; known are the text-to-video pipelines WanPip"):
        training_host(tiny_pipelines.PIPELINES[name]()[0])


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs the pipeline, .* not WanTransformer3DModel alone"):
        training_host(build("wan")[0].transformer)
    with pytest.raises(ValueError, match="it is no pipeline"):
        training_host(nn.Linear(2, 2))


def test_missing_parts_are_named() -> None:
    """Training from stored features needs no encoder; asking for one says which is missing."""
    pipe, _ = build("wan")
    side = training_host(pipe)
    noisy, text = side.encode_video(video("wan")), side.encode_text(["a cat"])
    pipe.text_encoder = pipe.vae = None
    with torch.no_grad():
        assert side.forward(pipe.transformer, noisy, torch.tensor([500]), text).shape == noisy.shape
    with pytest.raises(ValueError, match="WanPipeline was loaded without its text_encoder"):
        side.encode_text(["a cat"])
    with pytest.raises(ValueError, match="WanPipeline was loaded without its vae"):
        side.encode_video(video("wan"))
    with pytest.raises(ValueError, match="text must have encoder_hidden_states, got nothing"):
        side.forward(pipe.transformer, noisy, torch.tensor([500]), {})


def test_protocol_is_complete() -> None:
    """The host's class has everything that the protocol promises."""
    promised = {name for name in vars(TrainingHost) if not name.startswith("_")}
    assert promised == {
        "blank",
        "check_size",
        "decode_video",
        "encode_text",
        "encode_video",
        "expert",
        "experts",
        "forward",
    }
    assert promised <= set(dir(type(training_host(build("wan")[0]))))
