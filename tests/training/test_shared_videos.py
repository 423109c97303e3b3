"""`vsparse finetune` with ``train.context_parallel``: processes that share a video train what one process trains."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finetuning
import pytest
import rows
import torch
from finetuning import lay, settings
from host_law import MERGED, REORDERED, SelfAttention, merged, reordered
from oracle import ulp_floor
from processes import Get
from safetensors.torch import load_file

import vsparse
from vsparse.parallel import ContextParallel
from vsparse.training.data.cache import LatentCache
from vsparse.training.files import PARTIAL
from vsparse.training.finetune import finetune
from vsparse.training.loop import Trainer, TrainSettings
from vsparse.training.optimisers import OptimiserSettings
from vsparse.training.source import Source

TRAIN = 'steps = 4\nprecision = "fp32"\nsave_every = 2\nlog_every = 1\naverage = 0.9'
SHARDED = f"{TRAIN.replace('average = 0.9', 'shard = true')}\naccumulate = 2"
PROMPTS = 'prompts = ["a red circle"]\nheight = 32\nwidth = 32\nframes = 5\nsteps = 2'
TEACHERS = "velocity = 0.5\nconsistency = 0.25\nsegments = 2\nteacher_steps = 4\nguidance = 3.0"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay(tmp_path_factory.mktemp("ground"))


def begin(get: Get, ground: Path, output: Path, parallel: str, stop: int | None = None, **replace: str) -> list[Any]:
    """What each process reports of a run."""
    replace = {"train": TRAIN, **replace}
    replace["train"] += f'\ncontext_parallel = "{parallel}"'
    settings(ground, output, **replace)
    return get().run(finetuning.run, str(output.with_suffix(".toml")), stop)


def alone(ground: Path, output: Path, **replace: str) -> dict[str, float]:
    """Figures of the first step of one process."""
    settings(ground, output, **replace)
    figures: dict[str, float] = finetuning.run(str(output.with_suffix(".toml")), 1, joined=False)["figures"][0]
    return figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "replace"),
    [
        ("ulysses=2", {"validation": PROMPTS}),
        ("ring=2", {"train": SHARDED, "distill": TEACHERS, "model": "lora"}),
    ],
    ids=["ddp", "fsdp2"],
)
def test_a_torn_run_ends_as_the_whole_one(
    pool: Get, ground: Path, tmp_path: Path, parallel: str, replace: dict[str, str]
) -> None:
    """To the byte; it begins as one process does, and what is not sharded is written by the first process alone."""
    if replace.get("model") == "lora":
        replace = {
            **replace,
            "model": f'path = "{ground / "model"}"\ntrain = "lora"\nlora_rank = 4\ngradient_checkpointing = false',
        }
    whole = begin(pool, ground, tmp_path / "whole", parallel, **replace)
    assert [one["refused"] for one in whole] == [None, None]
    assert whole[0]["figures"] == whole[1]["figures"]
    assert whole[0]["batches"] == whole[1]["batches"]
    begin(pool, ground, tmp_path / "torn", parallel, 3, **replace)
    again = begin(pool, ground, tmp_path / "torn", parallel, **replace)
    assert again[0]["figures"] == whole[0]["figures"][2:]
    names = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")}
    assert len(names) == (6 if "distill" in replace else 4)
    for name in names:
        first, second = tmp_path / "whole" / name, tmp_path / "torn" / name
        if "lora" in name.name:  # diffusers writes two notes beside the tensors, in any order
            both = load_file(first), load_file(second)
            assert both[0].keys() == both[1].keys()
            assert all(torch.equal(x, both[1][key]) for key, x in both[0].items())
        else:
            assert second.read_bytes() == first.read_bytes()

    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in lines if "validation/psnr" in row] == ([4] if "validation" in replace else [])
    assert not list(tmp_path.rglob(f"{PARTIAL}*"))
    assert whole[0]["wrote"]
    assert not whole[1]["wrote"], whole[1]["wrote"]

    begun, one = whole[0]["figures"][0], alone(ground, tmp_path / "alone", **replace)
    assert begun.keys() == one.keys()
    allowed = _allowed(ground, tmp_path, **{**replace, "distill": "data = 1.0"})
    parts = [name for name in ("data", "velocity", "consistency") if name in one]
    apart = {name: abs(begun[name] - one[name]) for name in parts}
    assert max(apart.values()) <= allowed, (apart, allowed)
    assert abs(whole[0]["figures"][1]["data"] - one["data"]) > allowed, "another video would pass"


def _allowed(ground: Path, folder: Path, **replace: str) -> float:
    """Twice what the loss of the stock host moves by where its attention is rounded in other ways, and its last bit."""
    replace = {**replace, "method": 'key = "none"'}
    replace.pop("validation", None)
    found = [alone(ground, folder / "stock", **replace)["data"]]
    for i, attend in enumerate((*map(reordered, range(REORDERED)), *map(merged, range(MERGED)))):
        with contextlib.ExitStack() as stack:
            heard = [stack.enter_context(SelfAttention(tokens, attend)) for tokens in (192, 432)]  # of both buckets
            found.append(alone(ground, folder / f"stock-{i}", **replace)["data"])
            assert sum(x.calls for x in heard) >= 2, "no attention was exchanged"
    return 2 * max(abs(x - found[0]) for x in found) + ulp_floor(torch.tensor(found[0]))


def test_processes_of_one_video_get_the_same_batches(ground: Path, tmp_path: Path) -> None:
    """Others get other ones; together they are those that as many processes as videos would get."""
    chosen = settings(ground, tmp_path / "run")
    if not (ground / "cache").exists():
        finetuning.run(str(tmp_path / "run.toml"), 1, joined=False)

    def dealt(process: int, of: int, parallel: str) -> list[str]:
        train = dc.replace(chosen.train, context_parallel=parallel, accumulate=2)
        there = SimpleNamespace(num_processes=of, process_index=process)
        source = Source(LatentCache(ground / "cache"), dc.replace(chosen, train=train), there)
        return [sample.name for sample in source(0, 4)]

    first, second, third, fourth = (dealt(i, 4, "ulysses=2") for i in range(4))
    assert first == second == dealt(0, 2, "")
    assert third == fourth == dealt(1, 2, "")
    assert first != third


@pytest.mark.slow
def test_a_run_that_is_shared_otherwise_is_not_resumed(pool: Get, ground: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(pool, ground, run, "ulysses=2", 3)
    for other in ("ring=2", ""):
        said = begin(pool, ground, run, other)
        assert all(f"train.context_parallel was 'ulysses=2', is {other!r}" in one["refused"] for one in said), said
    said = begin(pool, ground, tmp_path / "three", "ulysses=3")
    words = "context_parallel='ulysses=3' takes groups of 3 processes, and there are 2"
    assert all(words in one["refused"] for one in said), said
    assert not list((tmp_path / "three").glob("*"))


def _refused(folder: str, shared: ContextParallel | None, told: str) -> str:
    """What a loop says of a model whose videos are shared otherwise than its settings have it."""
    model, _ = rows.build("wan")
    if shared is not None:
        vsparse.apply(model, "vsa", parallel=shared, **rows.METHODS["vsa"].sparse)
    with pytest.raises(ValueError, match=r"^train: context_parallel=") as error:
        Trainer(
            model,
            SimpleNamespace(),
            settings=TrainSettings(steps=1, context_parallel=told),
            optimiser=OptimiserSettings(),
            folder=Path(folder),
            identity={},
        )
    return str(error.value)


def test_model_and_settings_share_alike(pool: Get, tmp_path: Path) -> None:
    """Nothing would fail otherwise: gradients would be halved, or batches differ within a video."""
    for shared, told in (
        (None, "ulysses=2"),
        (ContextParallel(ulysses=2, gradients="mean"), ""),
        (ContextParallel(ulysses=2), "ulysses=2"),
    ):
        for said in pool().run(_refused, str(tmp_path), shared, told):
            assert f"context_parallel={told!r}, but videos are shared by {shared or 'ulysses=1'}, gradients=" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.full
def test_four_processes_take_two_videos(pool: Get, four: Get, ground: Path, tmp_path: Path) -> None:
    """As two processes with a video each; and they do not go on with a run of two."""
    shared = begin(four, ground, tmp_path / "shared", "ulysses=2")
    apart = begin(pool, ground, tmp_path / "apart", "")
    assert [one["batches"] for one in shared] == [apart[i]["batches"] for i in (0, 0, 1, 1)]
    assert shared[0]["batches"] != shared[2]["batches"]
    found, wanted = (one[0]["figures"][0]["data"] for one in (shared, apart))
    assert abs(found - wanted) <= _allowed(ground, tmp_path)
    begin(pool, ground, tmp_path / "two", "ulysses=2", 3)
    said = begin(four, ground, tmp_path / "two", "ulysses=2")
    assert all("2 processes wrote it, this run has 4" in one["refused"] for one in said), said


def test_what_cannot_be_shared_is_refused_before_anything_is_done(ground: Path, tmp_path: Path) -> None:
    train = f'{TRAIN}\ncontext_parallel = "ulysses=2"'
    with pytest.raises(ValueError, match="takes groups of 2 processes, and there are 1"):
        finetune(settings(ground, tmp_path / "one", train=train))
    assert not list((tmp_path / "one").glob("*"))
    with pytest.raises(ValueError, match='context_parallel needs a method that attends; "dense" is one, "none" is not'):
        settings(ground, tmp_path / "none", train=train, method='key = "none"')
    with pytest.raises(ValueError, match="distil velocity, or leave context_parallel out"):
        settings(ground, tmp_path / "attention", train=train, distill="attention = 0.5")
    with pytest.raises(ValueError, match="'ulises=2' is not understood"):
        settings(ground, tmp_path / "word", train=f'{TRAIN}\ncontext_parallel = "ulises=2"')
