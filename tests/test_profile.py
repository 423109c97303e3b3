"""Profiles: what is written comes back, what does not fit is refused, and another size is told."""

from __future__ import annotations

import dataclasses as dc
import warnings
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vsparse
from vsparse.fingerprint import digest
from vsparse.host import find_roots
from vsparse.measure.options import asked, schedule
from vsparse.methods import Method, get_method
from vsparse.profile import Model, Profile, Size, shipped

MODEL = Model(name="WanTransformer3DModel", layers=2, heads=2, head_dim=16)
SIZE = Size(height=64, width=96, frames=13, steps=5)
GRID = (4, 4, 6)  # of that size
TEXT = """
format = 1
about = "a try"
method = "vsa"
options = {tile = [1, 2, 2], block = 4, density = 0.5}
schedule = {dense_steps = 0.2, dense_layers = [0]}
[[layers]]
at = "1"
density = [0.25, 0.75]
[model]
class = "WanTransformer3DModel"
layers = 2
heads = 2
head_dim = 16
[size]
height = 64
width = 96
frames = 13
steps = 5
[provenance]
source = "nobody"
"""


def made(**changes: Any) -> Profile:
    fields: dict[str, Any] = {"method": get_method("vsa")(), "model": MODEL, "size": SIZE, "about": "a try"}
    return Profile(**{**fields, **changes})


def written(folder: Path, text: str = TEXT) -> Path:
    path = folder / "try.toml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    found = Profile.read(written(tmp_path))
    base = get_method("vsa")(tile=(1, 2, 2), block=4, density=0.5)
    assert found.method == get_method("by_layer")(parts={"0": base, "1": base.replace(density=(0.25, 0.75))})
    assert found.schedule == vsparse.Schedule(dense_steps=0.2, dense_layers=(0,))
    assert (found.model, found.size, found.name) == (MODEL, SIZE, "try")
    assert not found.measured


densities = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2).map(tuple) | st.floats(0.01, 1.0)
methods = st.one_of(
    st.builds(lambda d: get_method("vsa")(density=d, tile=(1, 2, 2), block=4), densities),
    st.builds(lambda n: get_method("radial")(decay_factor=n), st.floats(0.1, 2.0)),
    st.just(get_method("nabla")(window=None)),
    st.lists(densities, min_size=2, max_size=2).map(
        lambda ds: get_method("by_layer")(parts={str(i): get_method("vsa")(density=d) for i, d in enumerate(ds)})
    ),
    st.just(get_method("by_layer")(parts={"0": "sta"})),
    st.just(get_method("by_layer")(parts={"0": "sta", "1-": get_method("jenga")()})),
    st.just(get_method("by_layer")(parts={"0-": "adaspa"})),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=methods,
    plan=st.sampled_from([None, vsparse.Schedule(), vsparse.Schedule(dense_steps=0.2, search_at=(0.3, 0.5))]),
    figures=st.dictionaries(
        st.text("abc", min_size=1), st.integers() | st.text() | st.tuples(st.integers()), max_size=3
    ),
)
def test_what_is_written_comes_back(tmp_path: Path, method: Method, plan: Any, figures: dict[str, Any]) -> None:
    profile = made(method=method, schedule=plan, provenance=figures, measured=True, name="try")
    found = Profile.read(profile.write(tmp_path / "try.toml"))
    site = vsparse.methods.Site.alone(heads=2, head_dim=16)
    parts = [[x.method.of(dc.replace(site, layer=layer)) for layer in range(2)] for x in (found, profile)]
    assert parts[0] == parts[1]
    assert dc.replace(found, method=method) == profile
    assert [path.name for path in tmp_path.iterdir()] == ["try.toml"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("format = 1", "format = 2"), "format is 2; this version reads format 1"),
        (('about = "a try"', ""), "it has no about"),
        (('about = "a try"', "about = 3"), "about must be a str, got 3"),
        (('method = "vsa"', 'methods = "vsa"'), "a profile has no 'methods'; it has about"),
        (('method = "vsa"', 'method = "vsb"'), "vsb"),
        (("density = 0.5", "density = 1.5"), r"density must be a number in \(0, 1\]"),
        (("density = 0.5", "budget = 0.5"), "has no option 'budget'"),
        (("options = {", "options = 3 #"), "options must be a table, got 3"),
        (("dense_steps = 0.2", "steps = 0.2"), r"\[schedule\] has no 'steps'"),
        (("dense_steps = 0.2", "dense_steps = 2.0"), "dense_steps must lie in"),
        (('at = "1"', 'at = "2"'), "at = '2', and the model has 2 attention layers"),
        (('at = "1"', 'at = "x"'), "a range of layers is"),
        (('at = "1"', "at = 1"), r"\[\[layers\]\] need at"),
        (("[provenance]", '[[layers]]\nat = "0-"\ndensity = 0.3\n[provenance]'), "layer 1 is in two"),
        (("layers = 2", "layers = 0"), r"\[model\] layers must be a whole number of at least 1"),
        (('class = "Wan', 'classes = "Wan'), r"\[model\] has no 'classes'"),
        (("height = 64", ""), r"\[size\] height must be a whole number of at least 1, got 'none'"),
        (("steps = 5", "steps = true"), r"\[size\] steps must be a whole number"),
        (("format = 1", "format = "), "profile .*try.toml"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in TEXT
    with pytest.raises(ValueError, match=words):
        Profile.read(written(tmp_path, TEXT.replace(*change, 1)))


def test_missing_files_and_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no profile .*none of that name is shipped"):
        vsparse.apply(rows.build("wan")[0], tmp_path / "none.toml")
    with pytest.raises(ValueError, match=r"ends in \.toml"):
        made().write(tmp_path / "try.json")
    with pytest.raises(ValueError, match="no form in TOML"):
        made(provenance={"a": object()}).write(tmp_path / "try.toml")
    assert not list(tmp_path.iterdir())


def test_shipped_ones_are_found_by_name() -> None:
    for name, path in shipped().items():
        assert Profile.read(f"profiles/{name}.toml") == Profile.read(f"{name}.toml") == Profile.read(path)


@pytest.mark.parametrize("form", ["text", "path", "profile"])
def test_it_is_applied(tmp_path: Path, form: str) -> None:
    path = written(tmp_path)
    forms: dict[str, Any] = {"text": str(path), "path": path, "profile": Profile.read(path)}
    model, inputs = rows.build("wan")
    stock = rows.forward(model, rows.prompt("wan", inputs, GRID))
    with vsparse.apply(model, forms[form], schedule=vsparse.Schedule(dense_layers=(0,))) as patch:
        rows.forward(model, rows.prompt("wan", inputs, GRID))
        assert patch.plan.profile == forms["profile"]
        assert str(patch.plan).startswith("profile          try: a try (with other settings)\n")
        executed = patch.stats()["sites"]
        assert list(executed) == ["transformer.blocks.1.attn1"]
    assert torch.equal(stock, rows.forward(model, rows.prompt("wan", inputs, GRID)))
    assert str(vsparse.plan(model, path)).startswith("profile          try: a try\n")


def test_its_schedule_is_taken_unless_another_is_given() -> None:
    profile = made(schedule=vsparse.Schedule(dense_steps=0.4))
    model, _ = rows.build("wan")
    assert vsparse.plan(model, profile).schedule == vsparse.Schedule(dense_steps=0.4)
    assert vsparse.plan(model, profile, schedule=vsparse.Schedule()).schedule == vsparse.Schedule()
    assert vsparse.plan(model, dc.replace(profile, schedule=None)).schedule == get_method("vsa").default_schedule


def test_a_plan_takes_its_size() -> None:
    pipe, _ = tiny_pipelines.wan()
    (root,) = find_roots(pipe)[1]
    site = root.claims[0].site
    profile = made(model=dc.replace(MODEL, layers=len(root.claims), heads=site.heads, head_dim=site.head_dim))
    taken = vsparse.plan(pipe, profile)
    assert taken.grid == vsparse.plan(pipe, "vsa", height=64, width=96, num_frames=13).grid
    assert vsparse.plan(pipe, profile, height=32, width=32, num_frames=5).grid != taken.grid


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 30}, "for WanTransformer3DModel with 30 attention layers of 2 heads of 16, and transformer is a"),
        ({"heads": 4}, "2 of 2 heads of 16; choose another one"),
        ({"name": "HunyuanVideoTransformer3DModel"}, "is for HunyuanVideo.* transformer is a WanTransformer3DModel"),
    ],
)
def test_another_model_is_refused(change: dict[str, Any], words: str) -> None:
    model, _ = rows.build("wan")
    with pytest.raises(ValueError, match=words):
        vsparse.apply(model, made(model=dc.replace(MODEL, **change)))
    assert vsparse.patch_of(model) is None


def test_other_weights_are_told() -> None:
    model, _ = rows.build("wan")
    host, (root,) = find_roots(model)
    mine = digest(host.fingerprint(root.module))
    assert mine == digest(host.fingerprint(rows.build("wan")[0].to(torch.bfloat16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vsparse.plan(model, made(model=dc.replace(MODEL, weights=mine)))
    with pytest.warns(UserWarning, match="measured with other weights than those of transformer; its settings"):
        vsparse.plan(rows.build("wan", seed=5)[0], made(model=dc.replace(MODEL, weights=mine)))


def test_another_size_is_told_once_for_each() -> None:
    model, inputs = rows.build("wan")
    with vsparse.apply(model, made(method=get_method("vsa")(tile=(1, 2, 2), block=4))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rows.forward(model, rows.prompt("wan", inputs, GRID))
        with pytest.warns(UserWarning, match="made for 64 x 96, 13 frames, 5 steps: a grid of .* Densities are shares"):
            rows.forward(model, rows.prompt("wan", inputs, (3, 4, 4)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rows.forward(model, rows.prompt("wan", inputs, (3, 4, 4)))


def test_on_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path)
    found = asked(str(path), [])
    assert found == Profile.read(path)
    assert schedule(found, None, None, None) == vsparse.Schedule(dense_steps=0.2, dense_layers=(0,))
    assert schedule(found, 0.5, None, None).dense_steps == 0.5
    plain = made(method=get_method("radial")()).write(tmp_path / "plain.toml")
    changed = asked(str(plain), ["decay_factor=0.3"])
    assert isinstance(changed, Profile)
    assert changed.method == get_method("radial")(decay_factor=0.3)
    assert schedule(changed, None, None, None) == get_method("radial").default_schedule
