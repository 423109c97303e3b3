"""Trained parts on disk: round trips, foreign weights, damage, and nothing changed when a load is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rows
import torch
from safetensors.torch import load_file, save_file

import vsparse

OPTIONS = {"density": 0.3, "tile": (2, 4, 4), "block": 16}
HEADS, DIM = 2, 32


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
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter", "vsparse.json", "vsparse.safetensors"]
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
    assert json.loads((stored / "vsparse.json").read_text())["options"]["density"] == 0.7


def test_a_failing_save_leaves_the_old_adapter(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in stored.iterdir()}

    def fails(*_: object) -> None:
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


# ---- FastWan -----------------------------------------------------------------------------------------------------


PREFIXES = ("blocks.{}.", "blocks.{}.attn1.", "transformer.blocks.{}.")


def _fastwan(form: str, layers: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = {"patch_embedding.weight": torch.zeros(3)}
    for i in range(layers):
        found[form.format(i) + ".weight"] = 0.2 * torch.randn(DIM, DIM, generator=generator)
        found[form.format(i) + ".bias"] = 0.2 * torch.randn(DIM, generator=generator)
    return found


@pytest.mark.parametrize("form", [prefix + "to_gate_compress" for prefix in PREFIXES])
@pytest.mark.parametrize("shape", ["folder", "file", "shards"])
def test_fastwan_gates_load(form: str, shape: str, tmp_path: Path) -> None:
    weights = _fastwan(form)
    if shape == "shards":
        for i, (name, x) in enumerate(weights.items()):
            save_file({name: x}, tmp_path / f"model-{i}.safetensors")
    else:
        save_file(weights, tmp_path / "model.safetensors")
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.load(model, tmp_path / "model.safetensors" if shape == "file" else tmp_path) as patch:
        assert patch.plan.method == vsparse.list_methods()["vsa"]()
        assert len(patch.parameters()) == 4
        for i in range(2):
            gate = model.blocks[i].attn1.vsparse.to_gate_compress
            assert torch.equal(gate.weight, weights[form.format(i) + ".weight"])
            assert torch.equal(gate.bias, weights[form.format(i) + ".bias"])
        loaded = rows.forward(model, values)
    with vsparse.apply(model, "vsa"):
        assert not torch.equal(rows.forward(model, values), loaded)


def test_fastwan_gates_load_into_a_patch_with_another_density(tmp_path: Path) -> None:
    weights = _fastwan("blocks.{}.to_gate_compress")
    save_file(weights, tmp_path / "model.safetensors")
    model, _ = rows.build("wan")
    with vsparse.apply(model, "vsa", density=0.2) as patch:
        assert vsparse.load(model, tmp_path) is patch
        assert torch.equal(
            model.blocks[1].attn1.vsparse.to_gate_compress.bias, weights["blocks.1.to_gate_compress.bias"]
        )


def test_fastwan_gates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_file(_fastwan("blocks.{}.to_gate_compress", layers=3), tmp_path / "model.safetensors")
    _refused(tmp_path, ValueError, "unexpected: transformer.blocks.2.attn1.to_gate_compress.bias")


# ---- damage ------------------------------------------------------------------------------------------------------


def _refused(folder: Path, error: type[Exception], words: str) -> None:
    """Refused for an unpatched and for a patched model, both unchanged."""
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    mark, before = rows.footprint(model), rows.forward(model, values)
    with pytest.raises(error, match=f"(?s){words}"):
        vsparse.load(model, folder)
    assert rows.footprint(model) == mark
    assert torch.equal(rows.forward(model, values), before)
    with rows.randomise(vsparse.apply(model, "vsa", **OPTIONS), seed=8) as patch:
        sparse = rows.forward(model, values)
        mark = rows.footprint(model)
        with pytest.raises(error, match=f"(?s){words}"):
            vsparse.load(model, folder)
        assert rows.footprint(model) == mark
        assert torch.equal(rows.forward(model, values), sparse)
        assert vsparse.patch_of(model) is patch


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "vsparse.json").read_text())
        change(config)
        (folder / "vsparse.json").write_text(json.dumps(config))

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
    "truncated description": (_truncate("vsparse.json", 0.5), "is not a readable vsparse adapter"),
    "empty description": (_truncate("vsparse.json", 0.0), "is not a readable vsparse adapter"),
    "binary description": (lambda p: (p / "vsparse.json").write_bytes(b"\xff\xfe"), "is not a readable vsparse"),
    "a list": (lambda p: (p / "vsparse.json").write_text("[1, 2]"), "is not a readable vsparse adapter"),
    "another format": (_config(lambda c: c.update(format=99)), "format 99; this version reads format 1"),
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
    _refused(stored, ValueError, words)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", FileNotFoundError, "load: .*nowhere does not exist")
    _refused(tmp_path, ValueError, "neither a vsparse adapter .* nor a checkpoint with to_gate_compress weights")
    save_file({"lora_A.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    _refused(tmp_path, ValueError, "neither a vsparse adapter .* nor a checkpoint with to_gate_compress weights")
    _refused(tmp_path / "lora.safetensors", ValueError, "neither a vsparse adapter")
    (tmp_path / "text.txt").write_text("hello")
    _refused(tmp_path / "text.txt", ValueError, "not a readable safetensors file")


def test_no_pickle_is_read(stored: Path) -> None:
    """A pickle in the place of the weights is not opened as one."""
    torch.save({"x": torch.ones(1)}, stored / "vsparse.safetensors")
    _refused(stored, ValueError, "not a readable")


def test_another_method_is_refused(tmp_path: Path) -> None:
    with vsparse.apply(rows.build("wan")[0], "adaspa") as patch:
        patch.save(tmp_path / "adapter")
    model, _ = rows.build("wan")
    with (
        vsparse.apply(model, "vsa"),
        pytest.raises(ValueError, match="holds 'adaspa', the target is patched with 'vsa'"),
    ):
        vsparse.load(model, tmp_path / "adapter")


def test_another_host_is_refused(stored: Path) -> None:
    model, _ = rows.build("hunyuan_video")
    mark = rows.footprint(model)
    with pytest.raises(
        ValueError, match=r"does not fit this model: missing: transformer\.single_transformer_blocks\.0"
    ):
        vsparse.load(model, stored)
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
