"""The command line: what it prints and writes, and how it refuses."""

from __future__ import annotations

import dataclasses as dc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from typer.testing import CliRunner, Result

from vsparse import cli
from vsparse.measure import drawing
from vsparse.measure.facts import facts
from vsparse.measure.rates import LINKS
from vsparse.measure.video import read_video
from vsparse.methods import get_method, list_methods
from vsparse.parallel.context import parse

COMMANDS = ("demo", "generate", "plan", "methods", "doctor", "draw", "latency", "quality", "profiles")
MODEL = ["plan", "WanTransformer3DModel"]
SIZE = ["--height", 128, "--width", 128, "--frames", 9]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def text(result: Result) -> str:
    """Everything that was printed, on one line and without table rules."""
    return " ".join("".join(" " if letter in "│┃┌┐└┘─━" else letter for letter in result.output).split())


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no sentence is broken."""
    monkeypatch.setattr(cli.console, "_width", 160)
    monkeypatch.setattr(cli.errors, "_width", 160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "wan"
    tiny_pipelines.wan()[0].save_pretrained(path)
    return path


def test_help_names_every_command_in_its_group() -> None:
    found = text(run("--help"))
    for name in (*COMMANDS, cli.SEE, cli.USE, cli.INSIDE, "vsparse demo"):
        assert name in found
    for name in COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert len(text(result)) > 100
    assert run().output.startswith(run("--help").output[:100]), "no command: the help"


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("vsparse ")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, vsparse.cli; print(sorted({'torch', 'diffusers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "vsparse", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("vsparse ")


def test_methods_lists_the_registry() -> None:
    found = text(run("methods"))
    for key, method in list_methods().items():
        assert key in found
        assert " ".join(facts(key, method).advice.split()) in found
    assert "vsparse methods KEY" in found


@pytest.mark.parametrize("key", list_methods())
def test_methods_tells_one_whole(key: str) -> None:
    found = text(run("methods", key))
    known = facts(key, get_method(key))
    words = [known.summary, known.arguments, known.notes, known.advice, known.source, known.link, known.cost]
    words += [*(f"{name} = {value}" for name, value in known.options.items()), *known.published.values()]
    assert [word for word in words if " ".join(word.split()) not in found] == []


def test_doctor_says_what_runs_and_why_not() -> None:
    result = run("doctor")
    found = text(result)
    assert result.exit_code == 0
    assert f"torch {torch.__version__}" in found
    for op in ("block_sparse_attention", "block_sparse_attention_backward", "search_attention", "block_pool"):
        assert op in found
    if not torch.cuda.is_available():
        assert "cuda: every op: no NVIDIA GPU is visible to torch" in found


def test_plan_of_a_large_model_from_its_class_name() -> None:
    result = run(*MODEL, "-m", "vsa", "--height", 480, "--width", 832, "--frames", 81, "--steps", 50)
    found = text(result)
    assert result.exit_code == 0
    for part in ("vsa on WanTransformer3DModel", "40 (40 heads of 128)", "21 × 30 × 52 = 32,760", "attention FLOPs"):
        assert part in found


def test_plan_chooses_for_several_gpus(tmp_path: Path) -> None:
    size = ["--height", 256, "--width", 256, "--frames", 33, "--steps", 10]
    result = run(*MODEL, "-m", "radial", *size, "--gpus", 8, "--links", "pcie5", "--gpu-memory", 24)
    found = text(result)
    assert result.exit_code == 0, result.output
    for part in (
        "8 x H100, PCIe 5: predicted, not measured",
        "assumed: PCIe 5 x16, data sheet",
        "map: static",
        "10.80 GiB",
    ):
        assert part in found
    (typed,) = re.findall(r"--context-parallel (\S+)", found)
    assert parse(typed).size == 8
    path = tmp_path / "rates.json"
    link, rate = {"latency": 1e-5, "bandwidth": 1e9}, {"flops": 1e12, "overhead": 0.0, "memory": 1e11}
    fitted: dict[str, object] = {kind: {**link, "origin": f"measured: {kind}"} for kind in LINKS}
    fitted["attention"] = {**rate, "origin": "measured: attention"}
    path.write_text(json.dumps({"format": 1, "device": "mine", "per_node": 8, "memory": 2**34, "fitted": fitted}))
    result = run(*MODEL, "-m", "radial", *size, "--gpus", 16, "--rates", path)
    assert result.exit_code == 0, result.output
    found = text(result)
    for part in (
        "16 x mine: predicted",
        "attention: measured: attention",
        "between nodes, ring: measured: between_ring",
    ):
        assert part in found
    assert "assumed" not in found.partition("16 x mine")[2], "the times of one GPU may be"


def test_plan_honours_options_and_schedule(folder: Path) -> None:
    size = ["--height", 32, "--width", 32, "--frames", 5, "--steps", 10]
    options = ["-s", "density=0.5", "--dense-layers", 1, "--dense-steps", 0.5, "--search-at", "0.5,0.8"]
    found = text(run("plan", folder, "-m", "adaspa", *options, *size))
    assert "AdaSpa(density=0.5" in found
    assert "dense_steps=0.5, dense_layers=1, search_at=(0.5, 0.8)" in found
    assert "Give --height" in text(run("plan", folder))


def test_generate_writes_one_video_per_prompt_and_prints_what_ran(folder: Path, tmp_path: Path) -> None:
    size = ["--height", 32, "--width", 32, "--frames", 5, "--steps", 2, "--guidance", 3]
    prompts = ["-p", "a cat", "-p", "a dog", "--negative-prompt", "blur"]
    target = tmp_path / "deep" / "video.mp4"
    method = ["-m", "vsa", "-s", "density=0.5", "-s", "tile=1x4x4", "-s", "block=16"]
    result = run("generate", folder, *prompts, *method, *size, "--output", target)
    assert result.exit_code == 0, result.output
    assert [path.name for path in sorted(target.parent.iterdir())] == ["video-1.mp4", "video-2.mp4"]
    assert read_video(target.with_stem("video-1")).shape == (5, 32, 32, 3)
    found = text(result)
    assert "VSA(density=0.5, tile=(1, 4, 4), block=16)" in found
    assert "density over all calls 0.5000" in found
    assert "ran dense because of nothing" in found


def test_draw_writes_a_layout_and_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("draw", "--grid", "2x8x8", "--text-after", 9, "--density", 0.5, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"a-layout.png", "a-map.png"}
    assert "untrained model" in text(result)
    monkeypatch.setattr(drawing, "EMBEDDED", dc.replace(drawing.EMBEDDED, steps=1))
    result = run("draw", "--layout", "tile", "--tile", "1x8x8", "-o", tmp_path / "b.png")
    assert result.exit_code == 0, result.output
    assert "trained demo model" in text(result)
    assert "tiles of 1 × 8 × 8 tokens" in text(result)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([*MODEL, "-m", "nope"], "unknown method 'nope'; there are: dense"),
        ([*MODEL, "-s", "density"], "--set takes name=value"),
        ([*MODEL, "-s", "density=0.5", "-s", "density=0.2"], "--set density is given twice"),
        ([*MODEL, "-s", "speed=9"], "method 'adaspa' has no option 'speed'; its options: density"),
        ([*MODEL, "-s", "density=nan"], "density must be a number in (0, 1]"),
        ([*MODEL, "--height", 480], "missing: width, num_frames"),
        ([*MODEL, "--search-at", "often"], "--search-at must be shares such as 0.2,0.6"),
        (["plan", "nowhere/nothing"], "no such folder, and not found on the hub"),
        ([*MODEL, "--gpus", 8], "--gpus needs --height, --width and --frames"),
        ([*MODEL, "--rates", "r.json", "--links", "pcie5"], "--rates, --links needs --gpus"),
        ([*MODEL, *SIZE, "--gpus", 8, "--links", "string"], "--links must be one of nvlink4, pcie5, got 'string'"),
        ([*MODEL, *SIZE, "--gpus", 8, "--rates", "r.json"], "r.json: no such file; torchrun"),
        ([*MODEL, *SIZE, "--gpus", 8, "--rates", "r.json", "--links", "pcie5"], "give it or --rates, not both"),
        ([*MODEL, *SIZE, "--gpus", 8, "--gpu-memory", "nan"], "--gpu-memory must be a positive number of GiB"),
        ([*MODEL, *SIZE, "--gpus", 8, "--gpu-memory", 1e-6, "-m", "dense"], "holds no way on 8 processes"),
        ([*MODEL, *SIZE, "--gpus", 41, "-m", "svg2", "--steps", 9], "svg2 shares heads alone"),
        (["draw", "--grid", "5x4"], "--grid must be 3 whole numbers"),
        (["draw", "--layout", "spiral"], "--layout must be one of method, tile, raster"),
        (["draw", "--tile", "4x4x4"], "--tile goes with --layout tile"),
        (["draw", "-m", "dense", "--grid", "2x8x8"], "no sparse call"),
        (["draw", "-o", "map.jpg"], "must end in .png"),
        (["demo", "--methods", "vsa,nope"], "unknown method 'nope'"),
        (["methods", "nope"], "unknown method 'nope'"),
        (["generate", "nowhere", "-p", "x", "-o", "/proc/nothing/a.mp4"], "cannot write into the folder"),
        (["generate", "nowhere", "-p", "x", "-o", "a.gif"], "must end in .mp4"),
    ],
)
def test_refuses_with_one_sentence(
    arguments: list[object], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert complaint in text(result)
    assert "Traceback" not in result.output
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing half-done stays behind"


def test_generate_refuses_a_pipeline_that_is_none_and_wishes_it_cannot_grant(folder: Path, tmp_path: Path) -> None:
    for extra, complaint in (
        (["--device", "cuda:7"], "torch sees no NVIDIA GPU here" if not torch.cuda.is_available() else ""),
        (["--device", "abacus"], "is none that torch knows"),
        (["--dtype", "int4"], "dtype must be one of float32, bfloat16, float16"),
        (["--offload", "--device", "cpu"], "here the CPU computes"),
        (["--image", tmp_path / "no.png"], "no.png"),
    ):
        result = run("generate", folder, "-p", "x", "-o", tmp_path / "a.mp4", *extra)
        assert result.exit_code == 2, extra
        assert complaint in text(result)
    result = run("generate", tmp_path, "-p", "x", "-o", tmp_path / "a.mp4")
    assert "so it is no diffusers pipeline" in text(result)


def test_debug_shows_the_traceback() -> None:
    result = run("--debug", *MODEL, "-m", "nope")
    assert isinstance(result.exception, ValueError)
