"""The tiny hosts are worth testing with: they run, repeat, and their attention matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_pipelines
import torch
from torch import Tensor, nn

real = nn.functional.scaled_dot_product_attention


def averaged(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Self-attention that ignores its scores."""
    if query.shape[-2] == key.shape[-2]:
        query = torch.zeros_like(query)
    return real(query, key, value, attn_mask=attn_mask, **options)


@pytest.mark.parametrize("name", tiny.HOSTS)
def test_attention_matters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.random.get_rng_state()
    model, inputs = tiny.HOSTS[name]()
    given = inputs(2, (2, 6, 8))
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        (right,) = model(**given)
        assert torch.equal(model(**given)[0], right)
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", averaged)
        (wrong,) = model(**given)
    assert right.isfinite().all()
    assert (wrong - right).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video15"])
def test_text_lengths_matter(name: str) -> None:
    model, inputs = tiny.HOSTS[name]()
    with torch.no_grad():
        one, two = (model(**inputs(2, (1, 4, 4), lengths))[0] for lengths in ([3, 9], [3, 4]))
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


def test_refuses_lengths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="text_lengths must be 2 integers"):
        tiny.hunyuan_video()[1](2, (1, 4, 4), [3])
    with pytest.raises(ValueError, match="attends to all its 8 text slots"):
        tiny.cogvideox()[1](1, (1, 4, 4), [3])


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_pipelines_run_and_repeat(name: str) -> None:
    built = tiny_pipelines.PIPELINES[name]()
    first = tiny_pipelines.run(built)
    assert first.isfinite().all()
    assert torch.equal(first, tiny_pipelines.run(built))


def test_both_experts_run() -> None:
    built = tiny_pipelines.wan(experts=2)
    seen: list[str] = []
    for name in ("transformer", "transformer_2"):
        remember: Callable[..., None] = lambda *_, name=name: seen.append(name)  # noqa: E731
        getattr(built[0], name).register_forward_pre_hook(remember)
    tiny_pipelines.run(built)
    assert seen == ["transformer"] * 2 + ["transformer_2"] * 2
