"""Trained parts on disk: round trips, foreign weights, damage, and nothing changed when a load is refused."""

from __future__ import annotations

import dataclasses as dc
import itertools
import json
import shutil
import sys
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rows
import tomli_w
import torch
from refusals import refused
from safetensors.torch import load_file, save_file

import vsparse
from vsparse import adapter

OPTIONS = {"density": 0.3, "tile": (2, 4, 4), "block": 16}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """An adapter of a tiny Wan."""
    model, _ = rows.build("wan")
    with rows.randomise(vsparse.apply(model, "vsa", schedule=vsparse.Schedule(dense_layers=1), **OPTIONS)) as patch:
        patch.save(tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "method"), rows.both)
def test_round_trip(host: str, method: str, tmp_path: Path) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs)
    with rows.randomise(vsparse.apply(model, method, **rows.METHODS[method].sparse)) as patch:
        wanted, made = rows.tour(patch, model, values), patch.plan
        patch.save(tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter", "vsparse.safetensors", "vsparse.toml"]
    with vsparse.load(model, tmp_path / "adapter") as patch:
        assert patch.plan == made
        assert all(map(torch.equal, rows.tour(patch, model, values), wanted))


def test_load_brings_back_the_schedule(stored: Path) -> None:
    with vsparse.load(rows.build("wan")[0], stored) as patch:
        assert patch.plan.schedule == vsparse.Schedule(dense_layers=1)
        assert patch.plan.method == vsparse.list_methods()["vsa"](**OPTIONS)


def test_load_into_a_patched_model_overwrites_its_parts(stored: Path) -> None:
    model, _ = rows.build("wan")
    kept = load_file(stored / "vsparse.safetensors")
    assert {name.split(".")[0] for name in kept} == {"transformer", "host/transformer"}
    with rows.randomise(vsparse.apply(model, "vsa", density=0.5), seed=8) as patch:
        ids = [id(x) for x in patch.parameters()]
        assert vsparse.load(model, stored) is patch
        assert [id(x) for x in patch.parameters()] == ids
        assert all(torch.equal(x, kept[name]) for name, x in patch.named_parameters())
        assert patch.plan.method.density == 0.5  # type: ignore[attr-defined]


def test_save_overwrites_an_adapter_and_nothing_else(stored: Path, tmp_path: Path) -> None:
    before = (stored / "vsparse.safetensors").read_bytes()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    with rows.randomise(vsparse.apply(rows.build("wan")[0], "vsa", density=0.7), seed=8) as patch:
        for taken in ("photos", "file"):
            with pytest.raises(
                ValueError, match=rf"save: .*{taken} exists and is not a vsparse adapter; choose another"
            ):
                patch.save(tmp_path / taken)
        patch.save(tmp_path / "empty")
        patch.save(tmp_path / "new" / "deep")
        patch.save(stored)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"
    assert (tmp_path / "file").read_text() == "mine"
    assert (stored / "vsparse.safetensors").read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "photos", "file", "empty", "new"}
    assert tomllib.loads((stored / "vsparse.toml").read_text())["options"]["density"] == 0.7


def test_a_description_that_was_cut_off_but_reads_is_refused(stored: Path) -> None:
    """Cut after any line it is either no description, or not the one that the weights were saved with."""
    whole = (stored / "vsparse.toml").read_text()
    lines, readable = whole.splitlines(keepends=True), 0
    for count in range(len(lines)):
        (stored / "vsparse.toml").write_text("".join(lines[:count]))
        with pytest.raises(ValueError, match="is not a readable vsparse adapter") as refused:
            vsparse.load(rows.build("wan")[0], stored)
        readable += "is not the one that was saved with its weights" in str(refused.value)
    assert readable > 0
    (stored / "vsparse.toml").write_text(whole)
    vsparse.load(rows.build("wan")[0], stored)


def test_a_failing_save_leaves_the_old_adapter(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in stored.iterdir()}

    def fails(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with vsparse.apply(rows.build("wan")[0], "vsa") as patch, pytest.raises(OSError, match="no space left"):
        patch.save(stored)
    assert {path.name: path.read_bytes() for path in stored.iterdir()} == before
    assert [path.name for path in stored.parent.iterdir()] == ["adapter"]


def test_two_experts_round_trip(tmp_path: Path) -> None:
    import tiny_pipelines

    built = tiny_pipelines.wan(experts=2)
    with rows.randomise(vsparse.apply(built[0], "vsa", **OPTIONS)) as patch:
        wanted = tiny_pipelines.run(built)
        assert {name.split(".")[0] for name, _ in patch.named_parameters()} == {"transformer", "transformer_2"}
        patch.save(tmp_path / "both")
    with vsparse.load(built[0], tmp_path / "both"):
        assert torch.equal(tiny_pipelines.run(built), wanted)
    with pytest.raises(ValueError, match=r"does not fit this model: unexpected: transformer_2\."):
        vsparse.load(built[0].transformer, tmp_path / "both")
    assert vsparse.patch_of(built[0].transformer) is None


def test_a_ramp_is_not_written(tmp_path: Path) -> None:
    from vsparse.methods.vsa import density_ramp

    with vsparse.apply(
        rows.build("wan")[0], "vsa", schedule=vsparse.Schedule(ramp=density_ramp(0.3)), **OPTIONS
    ) as patch:
        patch.save(tmp_path / "adapter")
    with vsparse.load(rows.build("wan")[0], tmp_path / "adapter") as patch:
        assert patch.plan.schedule == vsparse.Schedule()


# ---- description -------------------------------------------------------------------------------------------------

# Beside defaults and rows: what may be None as None, and as something else.
MORE: dict[str, list[dict[str, Any]]] = {
    "vsa": [{"density": 1e-7}],
    "sta": [{"window": (None, 3, None)}, {"window": ((None, 3, 3), (1, None, 5))}],
    "nabla": [{"window": None}],
    "sparge": [{"similarity": (0.1, -0.2), "mass": (0.5, 1.0), "skip_threshold": 1e-6}],
    "unicp": [
        {"inner": vsparse.list_methods()["nabla"](window=None)},
        {"inner": "sta", "windows": ((1, 2), (3, 4))},
    ],
    "by_layer": [
        {"parts": {"0": "dense", "1": ("nabla", {"window": None}), "2-": ("sta", {"window": (None, 3, 3)})}},
        {"parts": {"0": vsparse.list_methods()["unicp"](inner=vsparse.list_methods()["nabla"](window=None))}},
        {"parts": {}},
    ],
    "pattern": [{"break_at": "frame"}, {"pattern": "same_frame", "by": "layer"}],
}


def _examples(key: str) -> list[vsparse.Method]:
    kind, row = vsparse.list_methods()[key], rows.METHODS[key]
    given = [{}, row.everything or {}, row.sparse, *MORE.get(key, [])]
    return [kind(**{name: x for name, x in options.items() if name != "schedule"}) for options in given]


def _holds_none(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and any(map(_holds_none, value)))


def _may_be_none(hint: Any) -> bool:
    return hint is type(None) or any(map(_may_be_none, typing.get_args(hint)))


@pytest.mark.parametrize("key", vsparse.list_methods())
def test_every_option_comes_back(key: str, tmp_path: Path) -> None:
    """None has no form in TOML; whatever may be None is written as None and as something else."""
    methods = _examples(key)
    for name, hint in typing.get_type_hints(type(methods[0])).items():
        if name in {field.name for field in dc.fields(methods[0])} and _may_be_none(hint):
            assert {_holds_none(getattr(method, name)) for method in methods} == {True, False}, name
    for method, schedule in itertools.product(methods, SCHEDULES):
        adapter.save(tmp_path / "adapter", method, schedule, ["wan"], {}, {})
        stored = adapter.read(tmp_path / "adapter")
        assert (stored.method, stored.schedule) == (method, schedule)
        assert repr(stored.method.options()) == repr(method.options())


SCHEDULES = (
    vsparse.Schedule(),
    vsparse.Schedule(dense_steps=0.25, dense_layers=(0, 3), search_at=(0.25, 0.5)),
)


def test_a_description_can_be_read_by_people(stored: Path) -> None:
    text = (stored / "vsparse.toml").read_text()
    assert 'method = "vsa"\n' in text
    assert "[options]\ndensity = 0.3\n" in text
    assert '[models.transformer]\nclass = "WanTransformer3DModel"\n' in text


@dc.dataclass(frozen=True, kw_only=True)
class _Odd(vsparse.Method):
    """A method with an option of any kind."""

    key = "odd"
    option: Any = None
    layout = build = None  # type: ignore[assignment]


@pytest.mark.parametrize("option", [float("nan"), [1, 2], {1: 2}, {"none": True}, 1j, b"x"])
def test_an_option_that_would_be_lost_isrefused(option: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"save: method 'odd' has options (that TOML would change|with no form in TOML)"
    ):
        adapter.save(tmp_path / "adapter", _Odd(option=option), vsparse.Schedule(), [], {}, {})
    assert not list(tmp_path.iterdir())


def test_the_first_format_still_loads(stored: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A folder with vsparse.json, which knows nothing of its model; saving over it leaves only the new form."""
    options: dict[str, Any] = {"parts": [["0", "sta", {"window": [None, 3, 3]}], ["1-", "vsa", OPTIONS]]}
    config = {"format": 1, "method": "by_layer", "options": options, "hosts": ["wan"]}
    config["schedule"] = {"dense_steps": 0.0, "dense_layers": [1], "search_at": None}
    (stored / "vsparse.json").write_text(json.dumps(config))
    (stored / "vsparse.toml").unlink()
    kept = load_file(stored / "vsparse.safetensors")
    save_file({x: kept[x] for x in kept if x.startswith("transformer.blocks.1.")}, stored / "vsparse.safetensors")
    for seed in (0, 1):
        with vsparse.load(rows.build("wan", seed=seed)[0], stored) as patch:
            assert patch.plan.schedule == vsparse.Schedule(dense_layers=(1,))
            assert patch.plan.method.options()["parts"][0] == ("0", "sta", patch.plan.method.parts[0][1].options())  # type: ignore[attr-defined]
            assert patch.plan.method.parts[0][1].window == (None, 3, 3)  # type: ignore[attr-defined]
            assert all(torch.equal(x, kept[name]) for name, x in patch.named_parameters())
            method = patch.plan.method
            if seed:
                patch.save(stored)
    assert not recwarn.list
    assert sorted(path.name for path in stored.iterdir()) == ["vsparse.safetensors", "vsparse.toml"]
    with vsparse.load(rows.build("wan", seed=1)[0], stored) as patch:
        assert patch.plan.method == method


# ---- damage ------------------------------------------------------------------------------------------------------


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = tomllib.loads((folder / "vsparse.toml").read_text())
        change(config)
        (folder / "vsparse.toml").write_text(tomli_w.dumps(config))

    return edit


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "vsparse.safetensors")
        change(weights)
        save_file(weights, folder / "vsparse.safetensors")

    return edit


def _truncate(name: str, share: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return edit


FIRST = "transformer.blocks.0.attn1.to_gate_compress.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (_truncate("vsparse.safetensors", 0.5), "not a readable (vsparse adapter|safetensors file)"),
    "empty weights": (_truncate("vsparse.safetensors", 0.0), "not a readable (vsparse adapter|safetensors file)"),
    "no weights": (lambda p: (p / "vsparse.safetensors").unlink(), "not a readable (vsparse adapter|safetensors file)"),
    "weights of noise": (lambda p: (p / "vsparse.safetensors").write_bytes(b"\x80\x04" * 99), "not a readable"),
    "truncated description": (_truncate("vsparse.toml", 0.5), "is not a readable vsparse adapter"),
    "empty description": (_truncate("vsparse.toml", 0.0), "is not a readable vsparse adapter"),
    "binary description": (lambda p: (p / "vsparse.toml").write_bytes(b"\xff\xfe"), "is not a readable vsparse"),
    "a list": (lambda p: (p / "vsparse.toml").write_text("[1, 2]"), "is not a readable vsparse adapter"),
    "another format": (_config(lambda c: c.update(format=99)), "format 99; this version reads format 2"),
    "unknown method": (_config(lambda c: c.update(method="nope")), "unknown method 'nope'; there are"),
    "method of another type": (_config(lambda c: c.update(method=["vsa"])), "is not a readable vsparse adapter"),
    "unknown option": (_config(lambda c: c["options"].update(speed=2)), "no option 'speed'; its options"),
    "options of another type": (_config(lambda c: c.update(options=3)), "is not a readable vsparse adapter"),
    "bad density": (_config(lambda c: c["options"].update(density=7)), r"density must be a number in \(0, 1\], got 7"),
    "density of NaN": (_config(lambda c: c["options"].update(density=float("nan"))), "density must be a number"),
    "unknown schedule": (_config(lambda c: c["schedule"].update(speed=2)), "is not a readable vsparse adapter"),
    "bad schedule": (_config(lambda c: c["schedule"].update(dense_steps=7)), "dense_steps must lie in"),
    "no schedule": (_config(lambda c: c.pop("schedule")), "is not a readable vsparse adapter.*schedule"),
    "a tensor missing": (_weights(lambda w: w.pop(FIRST)), f"does not fit this model: missing: {FIRST}"),
    "a tensor too many": (_weights(lambda w: w.update(extra=torch.ones(1))), "unexpected: extra"),
    "another shape": (_weights(lambda w: w.update({FIRST: torch.ones(3, 3)})), rf"{FIRST} is \(3, 3\), the model"),
    "NaN": (_weights(lambda w: w[FIRST].fill_(float("nan"))), f"{FIRST} holds values that are not finite"),
    "integers": (_weights(lambda w: w.update({FIRST: w[FIRST].int()})), f"{FIRST} is torch.int32, not floating"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_changes_nothing(damage: str, stored: Path) -> None:
    edit, words = DAMAGE[damage]
    edit(stored)
    refused(stored, ValueError, words)


def test_what_is_no_adapter_isrefused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", FileNotFoundError, "load: .*nowhere does not exist")
    refused(tmp_path, ValueError, "neither a vsparse adapter .* nor a checkpoint with to_gate_compress weights")
    save_file({"lora_A.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    refused(tmp_path, ValueError, "neither a vsparse adapter .* nor a checkpoint with to_gate_compress weights")
    refused(tmp_path / "lora.safetensors", ValueError, "neither a vsparse adapter")
    (tmp_path / "text.txt").write_text("hello")
    refused(tmp_path / "text.txt", ValueError, "not a readable safetensors file")


def test_no_pickle_is_read(stored: Path) -> None:
    """A pickle in the place of the weights is not opened as one."""
    torch.save({"x": torch.ones(1)}, stored / "vsparse.safetensors")
    refused(stored, ValueError, "not a readable")


def test_another_method_isrefused(tmp_path: Path) -> None:
    with vsparse.apply(rows.build("wan")[0], "adaspa") as patch:
        patch.save(tmp_path / "adapter")
    model, _ = rows.build("wan")
    with (
        vsparse.apply(model, "vsa"),
        pytest.raises(ValueError, match="holds 'adaspa', the target is patched with 'vsa'"),
    ):
        vsparse.load(model, tmp_path / "adapter")


def test_another_host_isrefused(stored: Path) -> None:
    model, _ = rows.build("hunyuan_video")
    mark = rows.footprint(model)
    words = "was saved from another model: transformer: it is a HunyuanVideoTransformer3DModel, not a WanTransformer3D"
    with pytest.raises(ValueError, match=words):
        vsparse.load(model, stored)
    words = r"does not fit this model: missing: transformer\.single_transformer_blocks\.0"
    with pytest.warns(UserWarning, match="another model"), pytest.raises(ValueError, match=words):
        vsparse.load(model, stored, strict=False)
    assert rows.footprint(model) == mark


def test_load_refuses_a_target_without_attention(stored: Path) -> None:
    with pytest.raises(ValueError, match=r"vsparse cannot patch torch.nn.*Linear"):
        vsparse.load(torch.nn.Linear(2, 2), stored)


def test_an_adapter_can_be_moved(stored: Path, tmp_path: Path) -> None:
    shutil.move(stored, tmp_path / "elsewhere")
    with vsparse.load(rows.build("wan")[0], tmp_path / "elsewhere") as patch:
        assert len(patch.parameters()) == 4


def test_the_host_dtype_wins(stored: Path) -> None:
    with vsparse.load(rows.build("wan", dtype=torch.bfloat16)[0], stored) as patch:
        assert {x.dtype for x in patch.parameters()} == {torch.bfloat16}


def test_without_safetensors_the_message_names_the_extra(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = rows.build("wan")
    mark = rows.footprint(model)
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"safetensors.*vsparse\[diffusers\]"):
        vsparse.load(model, stored)
    assert rows.footprint(model) == mark
    with vsparse.apply(model, "vsa") as patch, pytest.raises(ImportError, match=r"safetensors.*vsparse\[diffusers\]"):
        patch.save(stored.parent / "other")
    assert not (stored.parent / "other").exists()
