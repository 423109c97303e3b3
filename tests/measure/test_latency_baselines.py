"""Dense attention by several libraries: each computes it, those that do not run say why, and known times are told."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from latency_cases import Ticks
from oracle import assert_law
from torch import Tensor

from vsparse.geometry import Grid
from vsparse.measure.latency import baselines, tables
from vsparse.measure.latency.baselines import BASELINES, DEFAULT, Attention, default_attention, refusal_of
from vsparse.measure.latency.layer import Case, measure_layer
from vsparse.methods import get_method

CPU = torch.device("cpu")
SMALL = Case(name="small", grid=Grid(t=2, h=6, w=8), heads=2, head_dim=16)
VSA = get_method("vsa")(density=0.5, tile=(1, 4, 4), block=16)


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, 48, 2, 16, generator=draw).to(dtype) for _ in range(3)]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def refuses(error: Exception, *said: str) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for words in said:
            warnings.warn(words, stacklevel=1)
        raise error

    return attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [DEFAULT, "SDPA, flash", "SDPA, math"])
def test_what_runs_on_a_cpu_is_dense_attention(name: str, dtype: torch.dtype) -> None:
    attention = {DEFAULT: default_attention, **BASELINES}[name]
    assert refusal_of(attention, *qkv(dtype)) == ""
    assert_law(attention, plain, qkv(dtype), grads=False)


@pytest.mark.parametrize("name", ["SDPA, memory-efficient", "SDPA, cuDNN"])
def test_a_backend_for_gpus_refuses_in_pytorchs_words(name: str) -> None:
    assert refusal_of(BASELINES[name], *qkv()).startswith("not on a CPU: No viable backend")


def test_math_refuses_scores_that_the_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 17}[name])
    assert "its scores take about" in refusal_of(BASELINES["SDPA, math"], *qkv())
    monkeypatch.setattr(baselines.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 18}[name])
    assert 2 * 2 * 48**2 * 4 == 18 * 4096 / 2
    assert refusal_of(BASELINES["SDPA, math"], *qkv()) == ""


def test_xformers_is_given_heads_last(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    assert 'pip install "vsparse[xformers]"' in refusal_of(BASELINES["xformers"], *qkv())
    stand_in: Any = types.ModuleType("xformers.ops")
    stand_in.memory_efficient_attention = plain
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    assert_law(BASELINES["xformers"], plain, qkv(), grads=False)


def test_diffusers_is_given_heads_last_and_asked_first() -> None:
    q, k, v = qkv()
    assert torch.equal(baselines._by_diffusers("native", q, k, v), default_attention(q, k, v))
    said = refusal_of(BASELINES["diffusers, _flash_3"], q, k, v)
    assert "not usable because of missing package" in said


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (refuses(NotImplementedError("head_dim 16\n  is not supported")), "head_dim 16 is not supported"),
        (
            refuses(RuntimeError("No kernel."), "Too old. (Triggered internally at /x/sdp.cpp:12.)", "Too old."),
            "No kernel. Too old.",
        ),
        (refuses(AssertionError()), "AssertionError"),
        (lambda q, k, v: q[:, :1], "it returned (1, 1, 2, 16) for (1, 48, 2, 16)"),
    ],
    ids=["words", "warnings", "none", "shape"],
)
def test_reasons_are_the_librarys_words(attention: Attention, words: str) -> None:
    assert refusal_of(attention, *qkv()) == words


def test_known_times() -> None:
    """The clock ticks once for each dense call; fakes turn it on or back."""
    clock, calls = Ticks(), dict.fromkeys(("fast", "slow", "too slow", "refuses"), 0)

    def takes(name: str, seconds: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            clock.time += seconds - 1.0
            calls[name] += 1
            return q

        return attention

    fakes = {"slow": takes("slow", 2.0), "fast": takes("fast", 0.5), "too slow": takes("too slow", 4.5)}
    refusing = {"refuses": refuses(NotImplementedError("float32 is not supported"))}
    found = measure_layer(SMALL, VSA, CPU, torch.float32, rounds=4, clock=clock, baselines={**fakes, **refusing})
    assert found.fastest == "fast"
    assert list(found.baselines) == ["fast", DEFAULT, "slow", "refuses", "too slow"]
    times = {name: (x.seconds.median, x.ratio.median) for name, x in found.baselines.items() if x.seconds and x.ratio}
    assert times == {"fast": (0.5, 1.0), DEFAULT: (1.0, 2.0), "slow": (2.0, 4.0)}
    assert found.baselines["slow"].seconds is not None
    assert found.baselines["slow"].seconds.count == 4, "in every round"
    assert found.baselines["refuses"].refused == "float32 is not supported"
    assert found.baselines["too slow"].refused == f"ran once, in 4.5 s, 4.5 times as long as {DEFAULT}"
    assert calls == {"fast": 6, "slow": 6, "too slow": 2, "refuses": 0}, "once to see whether it runs, once to warm up"
    sparse = found.whole["search"].median
    assert (found.speeds["search"].median, found.best_speeds["search"].median) == (1 / sparse, 0.5 / sparse)
    cells = [list(column.cells) for column in tables.baselines_table(found).columns]
    assert cells[0] == ["fast", DEFAULT, "slow"]
    assert cells[2] == ["–", "2.00 (2.00 to 2.00)", "4.00 (4.00 to 4.00)"]
    assert tables.refused_lines(found)[0] == "refuses: not measured: float32 is not supported"


def test_every_baseline_is_measured_or_says_why() -> None:
    found = measure_layer(SMALL, VSA, CPU, torch.float32, rounds=2)
    assert found.baselines.keys() == {DEFAULT, *BASELINES}
    assert all((one.seconds is None) == bool(one.refused) for one in found.baselines.values())
    assert found.baselines[found.fastest].ratio is not None
    assert found.baselines[found.fastest].ratio.high == 1.0
