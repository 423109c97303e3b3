"""Whole pipelines reach the published phases, whoever tells them the step, and caches that skip layers do no harm."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import rows
import tiny_pipelines
import torch
from rows import ADASPA, SHORT, heard
from torch import nn

import vsparse

BLOCK = {"block": 4, "density": 0.3}

# Since 0.42 a cache context is an object that carries the denoising step, and pipelines that know it pass it.
telling = pytest.mark.skipif(
    not hasattr(diffusers.hooks.hooks, "CacheContext"), reason="about the cache contexts of diffusers 0.42"
)


# ---- pipelines ---------------------------------------------------------------------------------------------------


def _generate(built: tiny_pipelines.Built, **changes: Any) -> torch.Tensor:
    return tiny_pipelines.run(built, num_inference_steps=SHORT, **changes)


# Wan tells the step through its cache context, the others only a name: there the scheduler of the pipeline counts.
PIPELINES = {
    "wan": 2,
    "wan_image": 2,
    "wan_vace": 2,
    "hunyuan_video": 2,
    "hunyuan_video15": 2,
    "cogvideox": 1,
}
TRANSFORMERS = {
    "wan_image": "wan",
}


@pytest.mark.parametrize("name", [name for name in PIPELINES if TRANSFORMERS.get(name, name) in rows.HOSTS])
def test_a_pipeline_reaches_the_published_phases(name: str) -> None:
    built = tiny_pipelines.PIPELINES[name]()
    pipe, calls = built[0], PIPELINES[name]
    dense = _generate(built)
    mark = rows.footprint(pipe.transformer)
    with vsparse.apply(pipe, "adaspa", **BLOCK) as patch:
        with heard(pipe.transformer) as phases:
            sparse = _generate(built)
        assert phases == [(0, phase) for phase in ADASPA for _ in range(calls)]
        assert patch.stats()["state_bytes"] == 0
        assert patch.stats()["searches"] == 2 * calls * len(patch.sites)
        assert not torch.equal(sparse, dense)
        assert torch.equal(_generate(built), sparse)
    assert torch.equal(_generate(built), dense)
    assert rows.footprint(pipe.transformer) == mark


@telling
def test_a_bare_transformer_hears_the_pipeline_that_runs_it() -> None:
    """Wan tells the step in its cache context; a second run starts over, also when the first was cut off."""
    built = tiny_pipelines.wan()
    model = built[0].transformer
    with vsparse.apply(built[0], "adaspa", **BLOCK):
        wanted = _generate(built)
    with vsparse.apply(model, "adaspa", **BLOCK), heard(model) as phases:
        for _ in range(2):
            assert torch.equal(_generate(built), wanted)
        assert phases == 2 * [(0, phase) for phase in ADASPA for _ in ("cond", "uncond")]
        with pytest.raises(ZeroDivisionError):
            _generate(built, callback_on_step_end=lambda *_: 1 / 0)
        assert torch.equal(_generate(built), wanted)
    name_only = tiny_pipelines.wan_image()
    words = r"nothing tells it: patch the pipeline instead of the bare model"
    with vsparse.apply(name_only[0].transformer, "adaspa", **BLOCK), pytest.raises(ValueError, match=words):
        _generate(name_only)


@telling
def test_a_run_that_starts_over_holds_nothing_of_the_last() -> None:
    """A bare model is told steps by its cache context alone: a step that goes back begins a run."""
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "adaspa", **BLOCK) as patch:
        held = []
        for i in (0, 1, 2, 3, 0, 1):
            with model.cache_context("cond", step_index=i, num_inference_steps=rows.STEPS):
                rows.forward(model, values)
            held.append(patch.stats()["state_bytes"] > 0)
        assert held == [False, True, True, True, False, True]
        with pytest.raises(ValueError, match="depends on the denoising step, and nothing tells it"):
            rows.forward(model, values)  # outside of the context nothing is known any more


def test_a_scheduler_exchanged_after_apply_is_heard() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    built = tiny_pipelines.wan_image()
    pipe = built[0]
    with vsparse.apply(pipe, "adaspa", **BLOCK), heard(pipe.transformer) as phases:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        _generate(built)
    assert phases == [(0, phase) for phase in ADASPA for _ in ("cond", "uncond")]


def test_a_pipeline_at_density_one_gives_the_same_video() -> None:
    """Coarse, because a whole denoising loop multiplies rounding; the law itself is in test_density_one."""
    built = tiny_pipelines.wan()
    dense = _generate(built)
    with vsparse.apply(built[0], "adaspa", density=1.0, block=4):
        sparse = _generate(built)
    with vsparse.apply(built[0], "adaspa", **BLOCK):
        wrong = _generate(built)
    assert float((sparse - dense).abs().max()) < 0.01 * float((wrong - dense).abs().max())


def test_two_experts_share_one_step_axis() -> None:
    built = tiny_pipelines.wan(experts=2)
    pipe = built[0]
    dense = _generate(built)
    with vsparse.apply(pipe, "adaspa", **BLOCK) as patch:
        assert {site.site.root for site in patch.sites} == {"transformer", "transformer_2"}
        with heard(pipe.transformer, pipe.transformer_2) as phases:
            _generate(built)
        turn = next(i for i, (model, _) in enumerate(phases) if model == 1)
        assert 0 < turn < len(phases)
        assert turn % 2 == 0
        steps = [phase for phase in ADASPA for _ in ("cond", "uncond")]
        # The second expert has no map when it takes over: where the first would reuse or refresh, it searches.
        after = ["search", "search", *steps[turn + 2 :]]
        assert phases == [(0, phase) for phase in steps[:turn]] + [(1, phase) for phase in after]
        assert patch.stats()["state_bytes"] == 0
    assert torch.equal(_generate(built), dense)


def test_the_first_experts_state_is_freed_when_the_second_takes_over() -> None:
    built = tiny_pipelines.wan(experts=2)
    pipe = built[0]
    held: list[tuple[int, int]] = []
    with vsparse.apply(pipe, "adaspa", **BLOCK):
        patch = vsparse.patch_of(pipe.transformer)
        assert patch is not None
        assert vsparse.patch_of(pipe.transformer_2) is patch

        def look(*_: object) -> None:
            first, second = (rows.sites(model) for model in (pipe.transformer, pipe.transformer_2))
            held.append((sum(x.state.nbytes() for _, x in first), sum(x.state.nbytes() for _, x in second)))

        handle = pipe.transformer_2.register_forward_hook(look)
        _generate(built)
        handle.remove()
    assert held
    assert all(first == 0 and second > 0 for first, second in held)


def test_removing_two_experts_restores_both() -> None:
    built = tiny_pipelines.wan(experts=2)
    models = built[0].transformer, built[0].transformer_2
    marks = [rows.footprint(model) for model in models]
    patch = vsparse.apply(built[0], "vsa")
    with pytest.raises(ValueError, match=r"transformer(_2)? is already patched"):
        vsparse.apply(models[1], "vsa")
    assert all(rows.footprint(model) != mark for model, mark in zip(models, marks, strict=True))
    patch.remove()
    assert [rows.footprint(model) for model in models] == marks


def test_one_model_in_the_place_of_both_experts_is_patched_once() -> None:
    built = tiny_pipelines.wan(experts=2)
    pipe = built[0]
    pipe.transformer_2 = pipe.transformer
    dense = _generate(built)
    mark = rows.footprint(pipe.transformer)
    with vsparse.apply(pipe, "adaspa", **BLOCK) as patch, heard(pipe.transformer) as phases:
        assert len(patch.sites) == 2
        _generate(built)
    assert phases == [(0, phase) for phase in ADASPA for _ in ("cond", "uncond")]
    assert rows.footprint(pipe.transformer) == mark
    assert torch.equal(_generate(built), dense)


def test_a_pipeline_interrupted_and_started_again_is_undisturbed() -> None:
    built = tiny_pipelines.hunyuan_video() if "hunyuan_video" in rows.HOSTS else tiny_pipelines.wan()
    pipe = built[0]
    with vsparse.apply(pipe, "adaspa", **BLOCK):
        wanted = _generate(built)

        def stop(pipe: Any, i: int, t: object, values: dict[str, Any]) -> dict[str, Any]:
            if i == 2:
                raise KeyboardInterrupt
            return values

        with pytest.raises(KeyboardInterrupt):
            _generate(built, callback_on_step_end=stop, generator=torch.Generator().manual_seed(7))
        assert torch.equal(_generate(built), wanted)
        with pytest.raises(KeyboardInterrupt):
            _generate(built, callback_on_step_end=stop, generator=torch.Generator().manual_seed(7))
        assert torch.equal(_generate(built, height=64), _fresh(built, height=64))


def _fresh(built: tiny_pipelines.Built, **changes: Any) -> torch.Tensor:
    patch = vsparse.patch_of(built[0].transformer)
    assert patch is not None
    patch.remove()
    with vsparse.apply(built[0], "adaspa", **BLOCK):
        return _generate(built, **changes)


def test_a_scheduler_that_nobody_steps_is_refused() -> None:
    pipe, _ = tiny_pipelines.wan()
    model, inputs = pipe.transformer, rows.build("wan")[1]
    values = rows.prompt("wan", inputs)
    with vsparse.apply(pipe, "adaspa", **BLOCK):
        pipe.scheduler.set_timesteps(SHORT)

        def loop() -> None:
            for _, branch in itertools.product(range(SHORT), ("cond", "uncond")):
                with model.cache_context(branch):
                    rows.forward(model, values)

        with pytest.raises(ValueError, match="the scheduler of the patched pipeline does not move between calls"):
            loop()


def test_a_pipeline_that_shares_the_transformer_is_refused_or_right() -> None:
    """The patched pipeline idles; another one, with a scheduler of its own, drives the model."""
    from diffusers import WanImageToVideoPipeline

    image = tiny_pipelines.wan_image()
    pipe, call = image
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = WanImageToVideoPipeline(**{**pipe.components, "scheduler": scheduler, "boundary_ratio": 0.0})
    other.set_progress_bar_config(disable=True)
    with vsparse.apply(pipe, "adaspa", **BLOCK):
        with pytest.raises(ValueError, match=r"does not move"):
            _generate((other, call))
        wanted = _generate(image)
    with vsparse.apply(pipe, "adaspa", **BLOCK):
        assert torch.equal(_generate(image), wanted)


# ---- caches that skip layers -------------------------------------------------------------------------------------


def _skipping(model: nn.Module, threshold: float) -> None:
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))


def _head(model: nn.Module) -> Any:
    return model.blocks[0]._diffusers_hook.hooks["fbc_leader_block_hook"]


@telling
@pytest.mark.parametrize("order", ["before", "after"])
def test_first_block_cache(order: str) -> None:
    """Layers that a cache skips at the search step have no map: where they run next, reuse becomes a search."""
    model, inputs = rows.build("wan", layers=3)
    values = rows.prompt("wan", inputs)
    stock = rows.forward(model, values)
    if order == "before":
        _skipping(model, 0.0)
        mark = rows.footprint(model)
        patch = vsparse.apply(model, "adaspa", **BLOCK)
    else:
        patch = vsparse.apply(model, "adaspa", **BLOCK)
        _skipping(model, 0.0)
    ran: list[list[str | None]] = []
    with patch.generation(10), model.cache_context("cond"):
        # Steps of a run of 10: 0 dense, 1 search, 5 refresh, the others reuse.
        for i in range(7):
            _head(model).threshold = 1e9 if i in (1, 5) else -1.0
            with patch.step(i):
                rows.forward(model, values)
            ran.append([site.phase if site.ran else None for site in patch.sites])
    assert ran == [
        ["dense"] * 3,
        ["search", None, None],
        ["reuse", "search", "search"],
        ["reuse"] * 3,
        ["reuse"] * 3,
        ["refresh", None, None],
        ["reuse"] * 3,
    ]
    if order == "before":
        patch.remove()
        assert rows.footprint(model) == mark
        model.disable_cache()
    else:
        model.disable_cache()
        patch.remove()
    assert torch.equal(rows.forward(model, values), stock)


def test_first_block_cache_in_a_pipeline() -> None:
    built = tiny_pipelines.wan(layers=3)
    pipe = built[0]
    with vsparse.apply(pipe, "adaspa", **BLOCK) as patch:
        _skipping(pipe.transformer, 1e9)  # after the first step of a branch only the first layer runs
        _generate(built)
        calls = patch.stats()["calls"]
        pipe.transformer.disable_cache()
    assert calls == {"search": 2 * 3, "reuse": 2 * 3, "refresh": 2}


@pytest.mark.parametrize("cache", ["PyramidAttentionBroadcastConfig", "MagCacheConfig"])
def test_other_caches_run(cache: str) -> None:
    built = tiny_pipelines.wan(layers=3)
    pipe = built[0]
    if cache == "MagCacheConfig":
        config = diffusers.MagCacheConfig(mag_ratios=[1.0] * SHORT, num_inference_steps=SHORT)
    else:
        config = diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("blocks",),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    mark = rows.footprint(pipe.transformer)
    with vsparse.apply(pipe, "adaspa", **BLOCK) as patch:
        pipe.transformer.enable_cache(config)
        assert torch.isfinite(_generate(built)).all()
        assert sum(patch.stats()["calls"].values()) < SHORT * 2 * 3
        pipe.transformer.disable_cache()
    after = rows.footprint(pipe.transformer)
    assert after["keys"] == mark["keys"]
