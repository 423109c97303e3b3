"""What cannot be patched or computed is refused in words, or left dense and counted; nothing is half-patched after."""

from __future__ import annotations

import dataclasses as dc
import functools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import rows
import tiny_pipelines
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

import vsparse
from vsparse import backend
from vsparse.integrations import diffusers as adapter
from vsparse.integrations.diffusers import processors
from vsparse.integrations.diffusers.hosts import HOSTS
from vsparse.methods.sta import STA

HOST = pytest.mark.parametrize("host", rows.HOSTS)
METHOD = pytest.mark.parametrize("method", rows.METHODS)


# ---- refused -----------------------------------------------------------------------------------------------------


class _OtherProcessor:
    def __call__(self, attn: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def _foreign_processor(model: nn.Module) -> nn.Module:
    next(x for name, x in model.named_modules() if name.endswith("1.attn1")).processor = _OtherProcessor()
    return model


def _foreign_child(model: nn.Module) -> nn.Module:
    next(x for name, x in model.named_modules() if name.endswith("1.attn1")).add_module("vsparse", nn.Identity())
    return model


def _itself(model: nn.Module) -> nn.Module:
    return model


REFUSED: list[tuple[Callable[[nn.Module], object], Any, dict[str, Any], type[Exception], str]] = [
    (_itself, "nope", {}, ValueError, "unknown method 'nope'; there are: dense, "),
    (_itself, "vsa", {"densty": 0.2}, ValueError, "no option 'densty'; its options: density, tile, block"),
    (_itself, "dense", {"density": 0.2}, ValueError, "no option 'density'; its options: none"),
    (_itself, "vsa", {"density": float("nan")}, ValueError, r"density must be a number in \(0, 1\], got nan"),
    (_itself, "vsa", {"density": 0.0}, ValueError, r"density must be a number in \(0, 1\], got 0.0"),
    (_itself, "vsa", {"density": True}, ValueError, r"density must be a number in \(0, 1\], got True"),
    (_itself, "vsa", {"density": "half"}, ValueError, r"density must be a number in \(0, 1\], got 'half'"),
    (_itself, "vsa", {"tile": (4, 4)}, ValueError, "tile must be three positive integers"),
    (_itself, "vsa", {"tile": 4}, ValueError, "tile must be three positive integers"),
    (_itself, "vsa", {"block": 0}, ValueError, "block must be a positive integer"),
    (_itself, "adaspa", {"density": 1.5}, ValueError, r"density must be a number in \(0, 1\], got 1.5"),
    (_itself, "adaspa", {"block": 2.0}, ValueError, "block must be a positive integer"),
    (_itself, 3, {}, ValueError, "a vsparse Method, or a profile or its file, got int: 3"),
    (_itself, vsparse.list_methods()["vsa"], {}, ValueError, "method must be a registry key, a vsparse Method"),
    (_itself, "vsa", {"schedule": 0.2}, ValueError, "schedule must be a vsparse.Schedule, got float"),
    (
        _itself,
        "vsa",
        {"schedule": vsparse.Schedule(dense_layers=3)},
        ValueError,
        "dense_layers=3, but transformer has 2 attention layers",
    ),
    (lambda _: nn.Linear(2, 2), "vsa", {}, ValueError, "cannot patch torch.nn.*Linear.*Known models: WanTransformer3D"),
    (lambda _: tiny_pipelines.wan()[0].vae, "vsa", {}, ValueError, "cannot patch diffusers.*AutoencoderKLWan"),
    (lambda _: None, "vsa", {}, ValueError, "cannot patch builtins.NoneType.*Known models: WanTransformer3D"),
    (_foreign_processor, "vsa", {}, NotImplementedError, "blocks.1.attn1: processor .*_OtherProcessor is not known"),
    (_foreign_child, "vsa", {}, NotImplementedError, "blocks.1.attn1: the module already has a child named 'vsparse'"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "method", "options", "error", "words"), REFUSED)
def test_refuses_in_words(
    target: Callable[[nn.Module], object], method: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model, _ = rows.build("wan")
    chosen = target(model)
    mark = rows.footprint(model)
    with pytest.raises(error, match=f"(?s){words}"):
        vsparse.apply(chosen, method, **options)
    if error is ValueError:
        with pytest.raises(error, match=f"(?s){words}"):
            vsparse.plan(chosen, method, **options)
    else:  # a plan lists what cannot be patched instead of refusing
        (reasons,) = vsparse.plan(chosen, method, **options).skipped.items()
        assert re.search(words, ": ".join((reasons[0], "; ".join(reasons[1]))))
    assert rows.footprint(model) == mark


@pytest.mark.parametrize("method", ["vsa", "dsv"])
def test_a_host_that_lacks_what_a_method_needs_is_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = rows.build("wan")
    mark = rows.footprint(model)
    monkeypatch.setattr(adapter, "Site", functools.partial(vsparse.methods.Site, offers=frozenset({"time"})))
    words = rf"{method} needs 'hidden' of a site, which wan does not offer; choose a method that needs nothing of it"
    with pytest.raises(NotImplementedError, match=words):
        vsparse.apply(model, method)
    assert rows.footprint(model) == mark
    assert all(words[:20] in reason for why in vsparse.plan(model, method).skipped.values() for reason in why)
    with vsparse.apply(model, "sla"):
        pass


@dc.dataclass(frozen=True, kw_only=True)
class _Timed(STA):
    key: ClassVar[str] = "timed"
    requires: ClassVar[frozenset[str]] = frozenset({"time"})
    default_schedule: ClassVar[vsparse.Schedule] = vsparse.Schedule()


def test_one_frame_is_refused_where_a_method_needs_time() -> None:
    """How many frames there are is known from the latent: each call is asked, and a plan with sizes."""
    model, inputs = rows.build("wan")
    one, more = rows.prompt("wan", inputs, (1, 4, 6)), rows.prompt("wan", inputs, (2, 4, 6))
    words = r"timed needs 'time', more than one latent frame, and this video has one; generate more frames"
    with vsparse.apply(model, _Timed(block=8)):
        rows.forward(model, more)
        with pytest.raises(NotImplementedError, match=words):
            rows.forward(model, one)
        rows.forward(model, more)
    with vsparse.apply(model, _Timed(block=8), strict=False) as patch:
        with pytest.warns(UserWarning, match=words):
            rows.forward(model, one)
        assert patch.stats()["calls"] == {"dense": len(patch.sites)}
    with pytest.raises(ValueError, match=f"plan: num_frames=1 is Grid.*{words}"):
        vsparse.plan(model, _Timed(block=8), height=64, width=96, num_frames=1, steps=4)


@METHOD
def test_refuses_a_second_patch(method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with rows.sparse(model, method) as patch:
        first = rows.generation(patch, model, values, steps=4)
        mark = rows.footprint(model)
        with pytest.raises(
            ValueError, match=rf"already patched with '{method}': call vsparse.patch_of\(model\).remove"
        ):
            vsparse.apply(model, "dense")
        assert rows.footprint(model) == mark
        patch.reset()
        assert all(map(torch.equal, rows.generation(patch, model, values, steps=4), first))


@pytest.mark.parametrize("point", ["build", "install", "listen", "source"])
@HOST
def test_a_failure_half_way_is_undone(host: str, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs)
    before, mark = rows.forward(model, values), rows.footprint(model)
    owner, name = (vsparse.list_methods()["vsa"], "build") if point == "build" else (adapter, point)
    stock, calls = getattr(owner, name), []

    def fails(*args: Any) -> Any:
        if not torch.empty(0).is_meta:  # planning builds on the meta device, to count parameters
            calls.append(args)
        if len(calls) == (2 if point in ("build", "install") else 1):
            raise RuntimeError("out of memory")
        return stock(*args)

    with monkeypatch.context() as broken:
        broken.setattr(owner, name, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            vsparse.apply(model, "vsa")
    assert rows.footprint(model) == mark
    assert torch.equal(rows.forward(model, values), before)
    with vsparse.apply(model, "vsa", density=1.0):
        rows.forward(model, values)


# ---- lenient -----------------------------------------------------------------------------------------------------


@HOST
def test_lenient_runs_dense_and_counts(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs)
    before = rows.forward(model, values)
    with rows.sparse(model, "vsa") as patch:
        monkeypatch.setattr(backend, "reasons", lambda *args, **options: ["no kernel today", "nor tomorrow"])
        with pytest.raises(NotImplementedError, match="cannot run here:\n  - no kernel today\n  - nor tomorrow"):
            rows.forward(model, values)
        assert not patch.stats()["fallbacks"]
        monkeypatch.undo()
    with rows.sparse(model, "vsa", strict=False) as patch:
        monkeypatch.setattr(backend, "reasons", lambda *args, **options: ["no kernel today", "nor tomorrow"])
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            after = rows.forward(model, values)
            assert [str(x.message) for x in heard] == [
                f"vsparse: transformer runs dense: {reason}" for reason in ("no kernel today", "nor tomorrow")
            ]
            rows.forward(model, values)
            assert len(heard) == 2
        stats = patch.stats()
        assert stats["fallbacks"] == {"no kernel today": 2, "nor tomorrow": 2}
        assert stats["calls"] == {"dense": 2 * len(patch.sites)}
        assert stats["density"] == 1.0
    with vsparse.apply(model, "dense"):
        assert torch.equal(after, rows.forward(model, values))
    assert torch.equal(after, before) or rows.HOSTS[host].padded


@HOST
def test_without_a_kernel_apply_refuses_or_leaves_the_host_alone(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs)
    before, mark = rows.forward(model, values), rows.footprint(model)
    monkeypatch.setattr(backend, "reasons", lambda *args, **options: ["no kernel today"])
    with pytest.raises(NotImplementedError, match=r"cannot patch .* with 'vsa':\n  - transformer\..*: no kernel today"):
        vsparse.apply(model, "vsa")
    assert rows.footprint(model) == mark
    with pytest.warns(UserWarning, match="runs dense: no kernel today"):
        patch = vsparse.apply(model, "vsa", strict=False)
    assert not patch.sites
    assert torch.equal(rows.forward(model, values), before)
    stats = patch.stats()
    assert stats["density"] == 1.0
    assert stats["kernel"] is None
    assert set(stats["fallbacks"].values()) == {1}
    assert len(stats["fallbacks"]) == len(patch.plan.skipped)
    patch.remove()
    assert rows.footprint(model) == mark


def test_lenient_skips_an_unknown_processor_aloud() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)

    class Unknown(type(model.blocks[1].attn1.processor)):  # type: ignore[misc]
        pass

    model.blocks[1].attn1.processor = Unknown()
    mark = rows.footprint(model)
    with pytest.warns(UserWarning, match="transformer.blocks.1.attn1 runs dense: processor .*Unknown is not known"):
        patch = vsparse.apply(model, "vsa", strict=False, density=0.3)
    assert list(patch.plan.skipped) == ["transformer.blocks.1.attn1"]
    rows.forward(model, values)
    rows.forward(model, values)
    assert len(patch.sites) == 1
    (counted,) = patch.stats()["fallbacks"].items()
    assert "Unknown is not known" in counted[0]
    assert counted[1] == 2
    patch.remove()
    assert rows.footprint(model) == mark


def test_a_processor_replaced_after_apply_is_noticed() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    stock = model.blocks[1].attn1.processor
    patch = vsparse.apply(model, "vsa")
    model.blocks[1].attn1.processor = stock
    with pytest.raises(NotImplementedError, match=r"was replaced by WanAttnProcessor after apply.*apply it again"):
        rows.forward(model, values)
    patch.remove()
    assert model.blocks[1].attn1.processor is stock
    assert not list(rows.sites(model))


def test_kernels_are_asked_about_the_dtype_of_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 Wan keeps some parameters in float32, and autocast computes in another dtype than any parameter."""
    asked = []

    def reasons(op: str, device: str, q: torch.Tensor, *args: Any, **options: Any) -> list[str]:
        asked.append(q.dtype)
        return []

    model, inputs = rows.build("wan", dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    wide, _ = rows.build("wan")
    with vsparse.apply(model, "vsa"), vsparse.apply(wide, "vsa"):
        monkeypatch.setattr(backend, "reasons", reasons)
        rows.forward(model, rows.prompt("wan", inputs))
        assert set(asked) == {torch.bfloat16}
        with torch.autocast("cpu", torch.float16):
            rows.forward(wide, rows.prompt("wan", rows.build("wan")[1]))
        assert set(asked) == {torch.bfloat16, torch.float16}


def test_grid_and_latent_must_agree() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "vsa"):
        with pytest.raises(ValueError, match="hidden_states must be a 5-D latent, got"):
            rows.forward(model, {**values, "hidden_states": values["hidden_states"][0]})
        rows.forward(model, values)


def test_an_unknown_mask_is_refused() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    mask = torch.ones(1, 1, 1, math.prod(rows.SMALL), dtype=torch.bool)
    attention = model.blocks[0].attn1
    stock = type(attention).forward
    with vsparse.apply(model, "vsa"):
        attention.forward = lambda hidden, text, _, rotary: stock(attention, hidden, text, mask, rotary)
        with pytest.raises(
            ValueError, match=r"blocks.0.attn1: an attention mask of unknown form, torch.bool \(1, 1, 1"
        ):
            rows.forward(model, values)
        del attention.forward
        rows.forward(model, values)


class WanAttnProcessor:
    """In the place and under the name of the stock one: it asks for something."""

    _attention_backend = _parallel_config = None
    asked: ClassVar[dict[str, Any]] = {}
    keys = 0

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        q, k, v = (layer(hidden_states).unflatten(-1, (2, 16)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        return dispatch_attention_fn(q, k[:, self.keys :], v[:, self.keys :], **self.asked).flatten(2)


@pytest.mark.parametrize(
    ("asked", "keys", "error", "words"),
    [
        ({"dropout_p": 0.1}, 0, NotImplementedError, "the host asks for dropout, which vsparse does not honour"),
        ({"is_causal": True}, 0, NotImplementedError, "the host asks for causal attention, which"),
        ({"scale": 2.0}, 0, NotImplementedError, "the host asks for a scale of its own, which"),
        ({"enable_gqa": True}, 0, NotImplementedError, "the host asks for grouped queries, which"),
        ({"parallel_config": object()}, 0, NotImplementedError, "the host asks for context parallelism that is not on"),
        (
            {"attention_kwargs": {"x": 1}},
            0,
            NotImplementedError,
            r"the host asks for attention_kwargs=\{'x': 1\}, which",
        ),
        ({}, 3, ValueError, "attention over 84 x 81 tokens, but this process has 84 of Grid"),
    ],
)
def test_what_is_not_honoured_is_refused(
    asked: dict[str, Any], keys: int, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    model.blocks[1].attn1.processor = WanAttnProcessor()
    with vsparse.apply(model, "vsa"):
        rows.forward(model, values)
        monkeypatch.setattr(WanAttnProcessor, "asked", asked)
        monkeypatch.setattr(WanAttnProcessor, "keys", keys)
        with pytest.raises(error, match=f"blocks.1.attn1: {words}"):
            rows.forward(model, values)


def test_the_host_table_names_processors_that_can_be_entered() -> None:
    """In this version of diffusers: every claim of every tiny host is free of reasons."""
    for host in rows.HOSTS:
        (root,) = adapter.roots(rows.build(host)[0]) or []
        assert root.claims
        assert not [reason for claim in root.claims for reason in claim.reasons]
    assert processors.reasons(nn.Linear(2, 2), HOSTS[0])
