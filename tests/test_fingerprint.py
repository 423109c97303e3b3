"""Fingerprints: an adapter knows its model through casts, wrappers and fine-tuning; no other model passes for it."""

from __future__ import annotations

import hashlib
import itertools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny_pipelines
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vsparse
from vsparse.fingerprint import LIMIT, SAMPLES, Fingerprint, distance, sample
from vsparse.integrations.diffusers import fingerprint

HOST = pytest.mark.parametrize("host", rows.HOSTS)
WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
ANOTHER = r"load: .*adapter was saved from another model: transformer: "


def stored(model: object, folder: Path) -> Path:
    with vsparse.apply(model, "adaspa") as patch:
        patch.save(folder / "adapter")
    return folder / "adapter"


def taken(weights: dict[str, torch.Tensor], **more: Any) -> Fingerprint:
    return Fingerprint(**{"model": "M", "config": {}, "weights": weights, **more})


def accepted(model: object, folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    vsparse.load(model, folder).remove()
    assert not recwarn.list


def refused(model: Any, folder: Path, words: str) -> None:
    """Refused for an unpatched and for a patched model, both unchanged; with strict=False one warning."""
    mark = rows.footprint(model)
    with pytest.raises(ValueError, match=words):
        vsparse.load(model, folder)
    assert rows.footprint(model) == mark
    with vsparse.apply(model, "adaspa"):
        mark = rows.footprint(model)
        with pytest.raises(ValueError, match=words):
            vsparse.load(model, folder)
        assert rows.footprint(model) == mark
    warned(model, folder, words.removeprefix("load: "), strict=False)


def warned(model: Any, folder: Path, words: str, *, strict: bool = True) -> None:
    """Loaded with exactly one warning, in the name of the caller's line."""
    with pytest.warns(UserWarning, match=words) as found:
        patch = vsparse.load(model, folder, strict=strict)
    assert len(found) == 1
    assert found[0].filename == __file__
    patch.remove()


def same(mine: Fingerprint, other: Fingerprint) -> bool:
    known = (mine.model, mine.config, mine.unread) == (other.model, other.config, other.unread)
    equal = all(torch.equal(x, other.weights[name]) for name, x in mine.weights.items())
    return known and mine.weights.keys() == other.weights.keys() and equal


# ---- the same model ----------------------------------------------------------------------------------------------


@HOST
def test_what_is_done_to_a_model_leaves_its_fingerprint(host: str) -> None:
    from peft import LoraConfig

    model, _ = rows.build(host)
    plain = fingerprint(model)
    with vsparse.apply(model, "dense") as patch:
        assert list(plain.weights) == [site.site.name for site in patch.sites]
    assert {x.shape for x in plain.weights.values()} == {(SAMPLES,)}
    stacks = [stack for name, stack in model.named_children() if name.endswith("blocks")]
    changes: dict[str, Callable[[], object]] = {
        "patched": lambda: rows.sparse(model, "vsa"),
        "compiled": lambda: [block.compile() for stack in stacks for block in stack],
        "wrapped by the compiler": lambda: [
            stack.register_module(name, torch.compile(block))
            for stack in stacks
            for name, block in stack.named_children()
        ],
        "low rank": lambda: model.add_adapter(LoraConfig(r=2, target_modules=["to_q"])),
        "offloaded": lambda: model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        ),
    }
    for name, change in changes.items():
        change()
        assert same(fingerprint(model), plain), name


@HOST
def test_fused_projections(host: str) -> None:
    model, _ = rows.build(host)
    plain = fingerprint(model)
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip(f"{host} has no fused projections")
    model.fuse_qkv_projections()
    assert same(fingerprint(model), plain)


def test_sharded(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    from torch.distributed.fsdp import fully_shard

    model, _ = rows.build("wan")
    plain, folder = fingerprint(model), stored(model, tmp_path)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert type(model.blocks[0].attn1.to_q.weight).__name__ == "DTensor"
        assert type(model).__name__ != "WanTransformer3DModel"
        assert same(fingerprint(model), plain)
        accepted(model, folder, recwarn)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_was_stored(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Its configuration comes back with lists for tuples."""
    model, _ = rows.build("wan")
    folder = stored(model, tmp_path)
    model.save_pretrained(tmp_path / "model")
    accepted(type(model).from_pretrained(tmp_path / "model"), folder, recwarn)


@HOST
@pytest.mark.parametrize("narrow", NARROW)
def test_casts(host: str, narrow: torch.dtype, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Saved in one dtype, loaded in another."""

    def cast(dtype: torch.dtype) -> nn.Module:
        if dtype in WIDE:
            return rows.build(host, dtype=dtype)[0]
        model = rows.build(host, dtype=torch.bfloat16)[0]
        model.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.bfloat16)
        return model

    dtypes = (*WIDE, narrow)
    folders = {dtype: stored(cast(dtype), tmp_path / str(dtype)) for dtype in dtypes}
    assert fingerprint(cast(narrow)).weights.popitem()[1].dtype == narrow
    for one, other in itertools.permutations(dtypes, 2):
        accepted(cast(other), folders[one], recwarn)


@pytest.mark.parametrize("size", [1.0, 2.0**-9])
def test_a_cast_moves_nothing_but_a_second_rounding(size: float) -> None:
    """Even where most weights lie below the normal numbers of float8."""
    generator = torch.Generator().manual_seed(1)
    exact = size * torch.randn(40, SAMPLES, generator=generator, dtype=torch.float64)
    prints = {dtype: taken({"x": exact.to(dtype).flatten()}) for dtype in (*WIDE, *NARROW)}
    for one, other in itertools.product(prints, prints):
        unit = max(torch.finfo(one).eps, torch.finfo(other).eps)
        nested = unit < 2**-4 or one == other or one in WIDE or other in WIDE
        found = distance(prints[one], prints[other])
        assert found is not None
        assert found <= (unit / 2 if nested else LIMIT), (one, other)
        assert (found == 0) or not (one == other or {one, other} <= {*WIDE[:2], torch.bfloat16}), (one, other)
    # A copy that went through float8 and back keeps its rounding: half a unit of the last place.
    normal = exact[exact.abs() >= torch.finfo(torch.float8_e4m3fn).tiny]
    if len(normal):
        found = distance(taken({"x": normal}), taken({"x": normal.to(torch.float8_e4m3fn).double()}))
        assert found is not None
        assert 0 < found <= 2**-4


def test_fine_tuned_and_merged(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    from peft import LoraConfig

    model, inputs = rows.build("wan")
    folder, before = stored(model, tmp_path), fingerprint(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        model(**rows.prompt("wan", inputs))[0].square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    trained = distance(before, fingerprint(model))
    assert trained is not None
    assert trained > 0
    accepted(model, folder, recwarn)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_B" in name:
                x.fill_(0.02)
    model.fuse_lora()
    assert distance(before, fingerprint(model)) not in (0, trained)
    accepted(model, folder, recwarn)


def test_versions_of_a_host_library(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A configuration value that only one of them knows says nothing."""
    model, _ = rows.build("wan")
    folder = stored(model, tmp_path)
    text = tomllib.loads((folder / "vsparse.toml").read_text())
    config = text["models"]["transformer"]["config"]
    config.pop("eps")
    config["of_tomorrow"] = 3
    other = tomli_w.dumps(text)
    (folder / "vsparse.toml").write_text(other)
    weights = folder / "vsparse.safetensors"
    save_file(load_file(weights), weights, metadata={"vsparse.toml": hashlib.sha256(other.encode()).hexdigest()})
    accepted(model, folder, recwarn)


# ---- another model -----------------------------------------------------------------------------------------------


@HOST
def test_another_seed_is_refused(host: str, tmp_path: Path) -> None:
    folder = stored(rows.build(host)[0], tmp_path)
    limit = re.escape(f"{LIMIT:.0%}")
    refused(rows.build(host, seed=5)[0], folder, rf"{ANOTHER}its weights are 1[0-9][0-9]% .* up to {limit} is taken")


def test_layers_in_another_order_are_refused(tmp_path: Path) -> None:
    model, _ = rows.build("wan")
    folder = stored(model, tmp_path)
    model.blocks = nn.ModuleList(reversed(model.blocks))
    refused(model, folder, rf"{ANOTHER}its weights are \d+% of their own size away")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = stored(rows.build("wan")[0], tmp_path)
    refused(rows.build("wan", layers=3)[0], folder, f"{ANOTHER}its num_layers is 3, not 2")
    refused(rows.build("cogvideox")[0], folder, f"{ANOTHER}it is a CogVideoXTransformer3DModel, not a WanTransformer3D")


def test_experts(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Each has its own fingerprint; alone, either may have the other's name."""
    pipe = tiny_pipelines.wan(experts=2)[0]
    both = stored(pipe, tmp_path)
    second = stored(pipe.transformer_2, tmp_path / "second")
    accepted(pipe, both, recwarn)
    accepted(pipe.transformer_2, second, recwarn)
    pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    with pytest.raises(ValueError, match=r"transformer: its weights are .*; transformer_2: its weights are "):
        vsparse.load(pipe, both)
    accepted(pipe.transformer, second, recwarn)
    warned(pipe, second, r"not checked: transformer_2: the adapter was saved without it")


def test_damaged_samples_are_refused(tmp_path: Path) -> None:
    model, _ = rows.build("wan")
    folder = stored(model, tmp_path)
    weights = load_file(folder / "vsparse.safetensors")
    assert weights.keys() == {"host/transformer.blocks.0.attn1", "host/transformer.blocks.1.attn1"}
    save_file({name: x.int() for name, x in weights.items()}, folder / "vsparse.safetensors")
    with pytest.raises(ValueError, match="not a readable vsparse adapter: the samples of transformer are not floating"):
        vsparse.load(model, folder)
    save_file({name: torch.full_like(x, torch.nan) for name, x in weights.items()}, folder / "vsparse.safetensors")
    refused(model, folder, rf"{ANOTHER}its weights are nan% of their own size")


# ---- what cannot be read -----------------------------------------------------------------------------------------


class Packed(torch.Tensor):
    """A weight of a library of its own."""


def quantise(layer: Any) -> None:
    layer.weight = nn.Parameter((100 * layer.weight.detach()).to(torch.int8), requires_grad=False)


def pack(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))


def empty(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().flatten()[:0])


def without(layer: Any) -> None:
    del layer.weight


UNREAD = {
    quantise: r"quantised weights \(torch.int8\)",
    pack: "weights in a Packed, which only its own library reads",
    empty: "offloaded or sharded weights",
    without: "a NoneType where a weight is expected",
}


@pytest.mark.parametrize("change", UNREAD)
def test_unread_weights_are_not_guessed(change: Callable[[Any], None], tmp_path: Path) -> None:
    """One warning, whether the weights could not be read at the save or at the load; architecture is checked still."""
    words = rf"vsparse.load: whether .*adapter was saved .* not checked: transformer: it {{}} {UNREAD[change]}"
    folder = stored(rows.build("wan")[0], tmp_path)
    model, other = rows.build("wan", seed=1)[0], rows.build("wan", layers=3)[0]
    for layer in [block.attn1.to_q for block in (*model.blocks, *other.blocks)]:
        change(layer)
    warned(model, folder, words.format("has"))
    refused(other, folder, f"{ANOTHER}its num_layers is 3, not 2")
    folder = stored(model, tmp_path / "unread")
    warned(rows.build("wan")[0], folder, words.format("had"))
    with pytest.raises(ValueError, match="num_layers"):
        vsparse.load(rows.build("wan", layers=3)[0], folder)


def test_layers_that_can_be_read_are_compared(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = stored(rows.build("wan")[0], tmp_path)
    for seed in (0, 1):
        model = rows.build("wan", seed=seed)[0]
        quantise(model.blocks[0].attn1.to_q)
        if seed:
            refused(model, folder, f"{ANOTHER}its weights are")
        else:
            accepted(model, folder, recwarn)


def test_weights_that_are_elsewhere(tmp_path: Path) -> None:
    import accelerate

    folder = stored(rows.build("wan")[0], tmp_path)
    model = rows.build("wan")[0]
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=False)
    warned(model, folder, "it has offloaded or sharded weights")
    model = rows.build("wan")[0]
    cpu = torch.device("cpu")
    options = {"onload_device": cpu, "offload_device": cpu, "offload_to_disk_path": str(tmp_path / "disk")}
    model.enable_group_offload(offload_type="leaf_level", **options)
    warned(model, folder, "it has weights that are offloaded to disk")


def test_a_patch_that_outlives_its_model_is_saved_without_it(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = rows.build("wan")[0]
    patch = vsparse.apply(model, "vsa")
    patch.remove()
    patch.save(tmp_path / "removed")
    accepted(model, tmp_path / "removed", recwarn)
    del model
    patch.save(tmp_path / "gone")
    warned(rows.build("wan")[0], tmp_path / "gone", "transformer: the adapter was saved without it")


@pytest.mark.parametrize("count", [2, 3, SAMPLES, SAMPLES + 1, 5000])
def test_samples_reach_from_the_first_value_to_the_last(count: int) -> None:
    found = sample(torch.arange(count).double())
    assert isinstance(found, torch.Tensor)
    assert (len(found), found[0], found[-1]) == (min(count, SAMPLES), 0, count - 1)
    steps = found.diff()
    assert steps.max() - steps.min() <= 1
