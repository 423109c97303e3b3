"""From a folder of videos to a result that diffusers and vsparse load: the whole way on a tiny pipeline."""

from __future__ import annotations

import dataclasses as dc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from finetuning import VSA, Ear, lay, settings

import vsparse
from vsparse.training import checkpoints
from vsparse.training.finetune import finetune
from vsparse.training.settings import Settings
from vsparse.training.settings_file import example, meanings, read


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline on disk and five clips of two sizes beside it, one of them broken."""
    return lay(tmp_path_factory.mktemp("ground"))


def test_full_training_leaves_a_transformer_and_gates(ground: Path, tmp_path: Path) -> None:
    ear = Ear()
    result = finetune(settings(ground, tmp_path / "run"), told=ear)
    assert [problem.name for problem in ear.problems] == ["4.mp4"]
    assert len(ear.figures) == 4
    assert sorted(path.name for path in result.iterdir()) == ["transformer", "vsparse"]
    model = tiny_pipelines.wan()[0].transformer
    trained = type(model).from_pretrained(result / "transformer")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    patch = vsparse.load(trained, result / "vsparse")
    assert patch.plan.method.key == "vsa"
    assert all(float(x.detach().abs().max()) > 0 for x in patch.parameters())
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["step-00000002", "step-00000004"]


def test_the_same_command_goes_on_or_does_nothing(ground: Path, tmp_path: Path) -> None:
    """Cut off after the first checkpoint it ends with the bytes of the whole run; finished, it leaves all as it is."""

    whole = finetune(settings(ground, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        finetune(settings(ground, tmp_path / "cut"), told=Ear(stop=3))
    cut = finetune(settings(ground, tmp_path / "cut"))
    for path in whole.rglob("*.safetensors"):
        assert (cut / path.relative_to(whole)).read_bytes() == path.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()}
    assert finetune(settings(ground, tmp_path / "cut")) == cut
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()} == before


def test_lora_and_gates_lie_in_one_folder(ground: Path, tmp_path: Path) -> None:
    text = f'path = "{ground / "model"}"\ntrain = "lora"\nlora_rank = 4'
    result = finetune(settings(ground, tmp_path / "adapter", model=text))
    assert sorted(path.name for path in result.iterdir()) == ["pytorch_lora_weights.safetensors", "vsparse"]
    merged = finetune(settings(ground, tmp_path / "merged", 'result = "pipeline"', model=text))
    assert (merged / "model_index.json").is_file()
    videos = []
    for folder in (ground / "model", merged):
        pipe, call = _pipeline(folder)
        if folder != merged:
            pipe.load_lora_weights(result)
        vsparse.load(pipe, result / "vsparse")
        videos.append(pipe(**call, generator=torch.Generator().manual_seed(0)).frames)
    stock, call = _pipeline(ground / "model")
    apart = (videos[0] - stock(**call, generator=torch.Generator().manual_seed(0)).frames).abs().max()
    # Merging rounds a product once more: far less than what was learnt.
    assert float((videos[0] - videos[1]).abs().max()) < 1e-3 * float(apart)


def _pipeline(folder: Path) -> tuple[Any, dict[str, Any]]:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, tiny_pipelines.wan()[1]


def test_only_the_gates_learn(ground: Path, tmp_path: Path) -> None:
    result = finetune(settings(ground, tmp_path / "run", model=f'path = "{ground / "model"}"\ntrain = "method"'))
    assert sorted(path.name for path in result.iterdir()) == ["vsparse"]
    with pytest.raises(ValueError, match="'sta' adds no parameters"):
        finetune(
            settings(
                ground, tmp_path / "sta", model=f'path = "{ground / "model"}"\ntrain = "method"', method='key = "sta"'
            )
        )


def test_a_ramp_ends_at_the_target(ground: Path, tmp_path: Path) -> None:
    method = f"{VSA}\ndense_steps = 1\nramp_steps = 2"
    run = settings(ground, tmp_path / "run", method=method, train='steps = 4\nprecision = "fp32"')
    densities = []
    real = vsparse.Patch.training_step

    def heard(patch: vsparse.Patch, i: int) -> None:
        real(patch, i)
        assert patch.plan.schedule.ramp is not None
        densities.append(patch.plan.schedule.ramp(i))

    with pytest.MonkeyPatch.context() as change:
        change.setattr(vsparse.Patch, "training_step", heard)
        finetune(run)
    assert densities == [1.0, 1.0, 0.75, 0.5]


def test_all_losses_together(ground: Path, tmp_path: Path) -> None:
    """Data, velocity and attention from the present weights, consistency from those of the start."""
    words = "velocity = 0.5\nattention = 0.5\nconsistency = 0.25\nsegments = 2\nteacher_steps = 4\nguidance = 3.0"
    ear = Ear()
    with pytest.raises(ValueError, match="give copy='device' or copy='cpu'"):
        finetune(settings(ground, tmp_path / "run", distill=words))
    finetune(settings(ground, tmp_path / "run", distill=f'{words}\nkeep_start = "cpu"'), told=ear)
    for row in ear.figures:
        parts = row["data"] + 0.5 * row["velocity"] + 0.5 * row["attention"] + 0.25 * row["consistency"]
        # Three products and three sums in float32, each rounded by half a unit at most.
        assert abs(row["loss"] - parts) <= 3 * torch.finfo(torch.float32).eps * parts
        assert all(row[name] > 0 for name in ("velocity", "attention", "consistency"))


def test_streaming_trains_without_a_cache(ground: Path, tmp_path: Path) -> None:
    data = f'source = "{ground / "videos"}"\nbatch = 2\nworkers = 0\nstreaming = true'
    finetune(settings(ground, tmp_path / "run", data=data))
    assert not (tmp_path / "run" / "cache").exists()


def test_validation_writes_pairs_of_videos_and_figures(ground: Path, tmp_path: Path) -> None:
    prompts = 'prompts = ["a red circle", "a blue square"]\nheight = 32\nwidth = 32\nframes = 5\nsteps = 2'
    train = 'steps = 4\nprecision = "fp32"\nvalidate_every = 2'
    finetune(settings(ground, tmp_path / "run", validation=prompts, train=train))
    folder = tmp_path / "run" / "validation"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]
    names = ["1-dense.mp4", "1-sparse.mp4", "2-dense.mp4", "2-sparse.mp4", "figures.json"]
    assert sorted(path.name for path in (folder / "step-00000004").iterdir()) == names
    figures = json.loads((folder / "step-00000004" / "figures.json").read_text())
    assert [row["prompt"] for row in figures] == ["a red circle", "a blue square"]
    assert all(row["density"] < 1 for row in figures)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation/psnr" in row] == [2, 4]


def test_a_tensorboard_log_reads_back(ground: Path, tmp_path: Path) -> None:
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    finetune(settings(ground, tmp_path / "run", "tensorboard = true"))
    log = event.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    assert [row.step for row in log.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("section", "text", "words"),
    [
        ("train", "step = 4", r"unknown key train\.step; there are: steps, "),
        ("train", 'steps = "four"', r"train\.steps must be int, got 'four'"),
        ("method", 'key = "vsparse"', "vsparse"),
        ("method", 'key = "sta"\nramp_steps = 3', "'sta' has no density"),
        ("method", 'key = "vsa"\noptions = {densty = 0.5}', "method 'vsa' has no option 'densty'"),
        ("model", 'path = "x"\ntrain = "all"', r"model\.train must be .*got 'all'"),
        ("distill", "data = 0.0", "one of them positive"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    ground: Path, tmp_path: Path, section: str, text: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        settings(ground, tmp_path / "run", **{section: text})


def test_what_does_not_fit_together_is_refused_before_training(ground: Path, tmp_path: Path) -> None:
    run = settings(ground, tmp_path / "run")
    size = dc.replace(run, data=dc.replace(run.data, buckets=(dc.replace(run.data.buckets[0], frames=4),)))
    with pytest.raises(ValueError, match="frames must be 1 plus a multiple of 2, got 4; nearest: 3 and 5"):
        finetune(size)
    with pytest.raises(ValueError, match="'adaspa' computes everything in the call that finds its map"):
        finetune(settings(ground, tmp_path / "adaspa", method='key = "adaspa"'))
    with pytest.raises(ValueError, match="has no transformer_2"):
        finetune(
            settings(ground, tmp_path / "two", model=f'path = "{ground / "model"}"\ntransformer = "transformer_2"')
        )
    text = f'path = "{ground / "model"}"\ntrain = "lora"\nlora_targets = ["to_nothing"]'
    with pytest.raises(ValueError, match="no linear layer of the transformer ends in to_nothing"):
        finetune(settings(ground, tmp_path / "lora", model=text))
    assert not list(tmp_path.rglob("step-*"))


def test_the_example_names_every_setting_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "example.toml"
    path.write_text(example())
    plain = read(path)
    assert plain == read_without_comments(path)
    kinds = [type(getattr(plain, f.name)) for f in dc.fields(plain) if dc.is_dataclass(getattr(plain, f.name))]
    for kind in (Settings, *kinds):
        said = meanings(kind)
        assert set(said) >= {f.name for f in dc.fields(kind)} - {f.name for f in dc.fields(Settings)}
        assert all(said.values())


def read_without_comments(path: Path) -> Settings:
    """The same file with every default that it shows written out."""
    lines = [re.sub(r"^#(?=\w)", "", line) for line in path.read_text().splitlines()]
    full = path.with_name("full.toml")
    full.write_text("\n".join(line for line in lines if "(left out)" not in line))
    return read(full)


def test_yaml_says_the_same(ground: Path, tmp_path: Path) -> None:
    import tomllib

    import yaml

    run = settings(ground, tmp_path / "run")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tomllib.loads((tmp_path / "run.toml").read_text())))
    assert read(path) == run
    with pytest.raises(ValueError, match=r"must end in \.toml, \.yaml or \.yml"):
        read(ground / "videos" / "0.txt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "none.toml")


def test_the_settings_of_the_tutorial_are_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text()
    (found,) = re.findall(r"cat > run\.toml <<'END'\n(.*?)\nEND\n", text, re.DOTALL)
    path = tmp_path / "run.toml"
    path.write_text(found)
    run = read(path)
    assert run.method.options["density"] == 0.25
    assert run.data.buckets[0].frames == 9
