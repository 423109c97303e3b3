"""What the documents and the command say of a method is what the method does."""

from __future__ import annotations

import dataclasses as dc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from one_site import DIM, HEADS

from vsparse.geometry import Grid
from vsparse.measure import portraits
from vsparse.measure.facts import facts, setting_words
from vsparse.methods import Method, Site, get_method, list_methods
from vsparse.methods.published import MODELS, Setting, published
from vsparse.schedule import Schedule

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "images" / "methods"
KEYS = list(list_methods())
SITE = Site.alone(heads=HEADS, head_dim=DIM)


def value(formula: str, names: dict[str, Any]) -> float:
    """A formula in which a space between factors means their product."""
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", formula.replace("^", "**"))
    return float(eval(product, {"__builtins__": {}, "min": min}, names))


@pytest.mark.parametrize("grid", [Grid(t=3, h=10, w=18), Grid(t=2, h=8, w=16, text_after=21)], ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_the_formula_of_the_search_is_its_flops(key: str, grid: Grid) -> None:
    method = get_method(key)()
    layout = method.layout(grid, SITE)
    names = {field.name: getattr(method, field.name) for field in dc.fields(method)}
    names |= {"B": 3, "H": HEADS, "D": DIM, "N": grid.tokens, "V": grid.video, "S": layout.slots}
    names |= {"K": layout.video_tiles, "P": method.predicted_density(layout, SITE)}
    names["Q"] = layout.video_tiles if layout.queries is None else layout.queries.video_tiles
    phase = "refresh" if method.state_phases else "search"
    assert value(method.search_cost, names) == pytest.approx(method.search_flops(layout, SITE, 3, phase))


@pytest.mark.parametrize("key", KEYS)
def test_everything_is_said(key: str) -> None:
    known = facts(key, get_method(key))
    assert known.summary
    assert known.advice.endswith((".", "`"))
    assert bool(known.arguments) == bool(known.options)
    doc = " ".join((get_method(key).__doc__ or "").split())
    for part in (known.summary, known.arguments, known.notes):
        assert " ".join(part.split()) in doc
    said = len(" ".join(" ".join((known.summary, known.arguments, known.notes)).split()))
    assert said >= len(doc) - len(" Args: "), "a part of the docstring is lost"


@pytest.mark.parametrize("key", KEYS)
def test_published_settings_are_options_that_can_be_passed(key: str) -> None:
    for model, setting in published(key).items():
        assert model in MODELS
        made = get_method(key)().replace(**setting.options)
        assert isinstance(made, Method)
        assert setting.options or setting.note
        assert setting.schedule != made.default_schedule


def test_settings_in_words() -> None:
    setting = Setting(options={"density": 0.2, "select": "mass"}, schedule=Schedule(dense_steps=0.1), note="by hand")
    assert setting_words(setting) == "density=0.2, select='mass'; Schedule(dense_steps=0.1) (by hand)"
    assert setting_words(Setting(note="n")) == "(n)"


def test_methods_of_others_have_no_settings_of_ours() -> None:
    mine = type("Mine", (get_method("vsa"),), {"__module__": "elsewhere", "__doc__": "Ours, changed."})
    known = facts("vsa", mine)
    assert known.published == dict.fromkeys(MODELS, "")
    assert (known.summary, known.arguments, known.notes) == ("Ours, changed.", "", "")


def test_every_method_has_its_small_picture(tmp_path: Path) -> None:
    names = {f"{key}.png" for key in KEYS if get_method(key).chooses} | {"attention.png"}
    assert {path.name for path in PICTURES.iterdir()} == names
    large = {path.name: path.stat().st_size for path in PICTURES.iterdir() if path.stat().st_size >= 60 * 1024}
    assert not large
    lines = {line.method: (line, value) for line, value in portraits.portrait_lines()}
    assert set(lines) == {key for key in KEYS if get_method(key).chooses}
    for written in (
        portraits.draw_method(tmp_path / "x.png", *lines["sla"]),
        portraits.draw_attention(tmp_path / "y.png"),
    ):
        assert written.read_bytes().startswith(b"\x89PNG")
    assert torch.isfinite(portraits.portrait_sample().q).all()
