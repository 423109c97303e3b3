"""Calibration recording: what is kept, that it is what attention was given, and what is tuned from it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch
from host_law import SelfAttention
from oracle import check
from torch import Tensor, nn

import vsparse
from vsparse.measure.calibrate import Recorded, by_layer, recording
from vsparse.methods.attention_tile import search_global_frames
from vsparse.methods.sparge import SpargeAttn
from vsparse.methods.sparge_tuning import tune

HOST = pytest.mark.parametrize("host", ["wan", "hunyuan_video"])


def given(model: nn.Module, values: dict[str, Any]) -> list[list[Tensor]]:
    """q, k, v of every self-attention of the stock model, in the order of the layers."""
    found: list[list[Tensor]] = []

    def note(attend: Any, **options: Any) -> Tensor:
        found.append([options[name].transpose(1, 2).clone() for name in ("query", "key", "value")])
        return attend(**options)

    tokens = rows.tokens(model, values)
    with SelfAttention(tokens, note):
        rows.forward(model, values)
    return found


@pytest.mark.parametrize(("host", "layer"), [("wan", 0), ("wan", 1), ("hunyuan_video", 0)])
def test_samples_are_what_attention_was_given(host: str, layer: int) -> None:
    """To the bit, where the layers before it run as in the stock model."""
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs, batch=2)
    wanted = given(model, values)
    with recording(model, layers=[layer], device="cpu") as found:
        rows.forward(model, values)
    ((key, (sample,)),) = found.items()
    assert key == ("transformer", layer)
    assert all(map(torch.equal, (sample.q, sample.k, sample.v), wanted[layer]))
    assert sample.grid.video == math.prod(rows.SMALL)
    assert not sample.q.requires_grad
    if rows.HOSTS[host].padded:
        assert sample.text_length is not None
        assert sample.text_length.tolist() == list(rows.HOSTS[host].lengths or ())
    else:
        assert sample.text_length is None


@HOST
def test_attention_is_exact_meanwhile_and_nothing_stays(host: str) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs, batch=2)
    before, mark = rows.forward(model, values), rows.footprint(model)
    with recording(model) as found:
        out = rows.forward(model, values)
    assert rows.footprint(model) == mark
    assert torch.equal(rows.forward(model, values), before)
    assert list(found) == [("transformer", layer) for layer in range(len(found))]
    wide, _ = rows.build(host, dtype=torch.float64)
    check("output", out, before, rows.forward(wide, rows.cast_inputs(values, torch.float64)))


@pytest.mark.parametrize(("most", "calls"), [(1, 5), (3, 3), (4, 31), (8, 100)])
def test_samples_are_spread_over_all_calls_and_branches(most: int, calls: int) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs, (1, 2, 2))
    with recording(model, most=most) as found, torch.no_grad():
        for i in range(calls):
            model(**{**values, "hidden_states": torch.full_like(values["hidden_states"], float(i))})
    kept = found["transformer", 0]
    assert len(kept) == len(found["transformer", 1]) == min(most, calls)
    if calls <= most:
        return
    which = []
    with recording(model, most=calls) as everything, torch.no_grad():
        for i in range(calls):
            model(**{**values, "hidden_states": torch.full_like(values["hidden_states"], float(i))})
    for sample in kept:
        (place,) = [i for i, x in enumerate(everything["transformer", 0]) if torch.equal(x.q, sample.q)]
        which.append(place)
    assert which == sorted(which)
    gaps = [b - a for a, b in itertools.pairwise([-1, *which, calls])]
    assert max(gaps) <= 3 * calls / most
    if most >= 4:
        assert {i % 2 for i in which} == {0, 1}, "both branches of guidance"


def test_chosen_layers_of_a_pipeline_of_two_experts() -> None:
    built = tiny_pipelines.wan(experts=2)
    before = tiny_pipelines.run(built)
    with recording(built[0], layers=[1], most=2) as found:
        tiny_pipelines.run(built)
    assert sorted(found) == [("transformer", 1), ("transformer_2", 1)]
    assert all(1 <= len(samples) <= 2 for samples in found.values())
    assert torch.equal(tiny_pipelines.run(built), before)


def test_an_exception_removes_the_recording() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    mark = rows.footprint(model)
    with pytest.raises(ZeroDivisionError), recording(model):
        rows.forward(model, values)
    assert rows.footprint(model) == mark
    assert vsparse.patch_of(model) is None


def test_recomputation_is_not_recorded() -> None:
    model, inputs = rows.build("wan")
    model.train()
    model.enable_gradient_checkpointing()
    with recording(model) as found:
        model(**rows.prompt("wan", inputs))[0].sum().backward()
    assert [len(samples) for samples in found.values()] == [1, 1]


def test_compiled_blocks_are_recorded() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with recording(model) as wanted:
        rows.forward(model, values)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with recording(model) as found:
        rows.forward(model, values)
    assert all(torch.equal(found[key][0].q, wanted[key][0].q) for key in wanted)


@HOST
def test_a_tuned_sparge_is_applied_saved_and_loaded(host: str, tmp_path: Path) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs)
    found = record(model, host, inputs)
    method = SpargeAttn(block=8)
    numbers = tune(method, found["transformer", 1], error=0.3, skip_error=None, masses=(0.5, 0.9), similarities=(0.0,))
    assert len(numbers["mass"]) == found["transformer", 1][0].q.shape[2]
    comes_back(model, values, method.replace(**numbers), tmp_path)


@HOST
def test_a_searched_attention_tile_is_applied_saved_and_loaded(host: str, tmp_path: Path) -> None:
    model, inputs = rows.build(host)
    frames = search_global_frames(by_layer(record(model, host, inputs)), bound=0.3, block=4)
    method = vsparse.list_methods()["attention_tile"](global_frames=frames, block=4)
    comes_back(model, rows.prompt(host, inputs, (4, 3, 4)), method, tmp_path)


def record(model: nn.Module, host: str, inputs: Any) -> Recorded:
    with recording(model, most=2) as found:
        for seed in range(3):
            rows.forward(model, rows.prompt(host, inputs, (4, 3, 4), seed=seed))
    return found


def comes_back(model: nn.Module, values: dict[str, Any], method: vsparse.Method, folder: Path) -> None:
    with vsparse.apply(model, method) as patch:
        wanted = rows.forward(model, values)
        patch.save(folder / "tuned")
    with vsparse.load(model, folder / "tuned") as patch:
        assert patch.plan.method == method
        assert torch.equal(rows.forward(model, values), wanted)


def test_refused_in_words() -> None:
    model, _ = rows.build("wan")
    for most in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"recording: most must be an integer >= 1, got {most!r}"):
            recording(model, most=most).__enter__()  # type: ignore[arg-type]
    for layers, words in (((0, 7), r"no layer \[7\]; there are 2"), ((), r"no layer \[\]; there are 2")):
        with pytest.raises(ValueError, match=words):
            recording(model, layers=layers).__enter__()
    assert vsparse.patch_of(model) is None
    with vsparse.apply(model, "vsa"), pytest.raises(ValueError, match="already patched"):
        recording(model).__enter__()
    with pytest.raises(ValueError, match="root must be given, as there are several: a, b"):
        by_layer({("a", 0): [], ("b", 0): []})
    with pytest.raises(ValueError, match="no root 'c'; recorded are: a, b"):
        by_layer({("a", 0): [], ("b", 0): []}, root="c")
    with pytest.raises(ValueError, match=r"a must be recorded in all layers, got \[1\]"):
        by_layer({("a", 1): []})
