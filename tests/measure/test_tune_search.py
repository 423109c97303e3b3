"""Whole searches: what is chosen, what a target needs, and that one which was stopped goes on."""

from __future__ import annotations

import dataclasses as dc
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from tuning import CLIPS, METHODS, SIZE

import vsparse
from vsparse.measure.paired import clip_of
from vsparse.measure.pipelines import generate
from vsparse.measure.tune import run, search
from vsparse.measure.tune.choice import UnreachableError
from vsparse.measure.tune.ledger import Ledger
from vsparse.measure.tune.result import Result
from vsparse.measure.tune.search import Search, Target
from vsparse.measure.tune.trials import Trials
from vsparse.profile import Profile, Size


@pytest.fixture(scope="module")
def pipe() -> Any:
    found, _ = tiny_pipelines.wan()
    found.set_progress_bar_config(disable=True)
    return found


def tuned(pipe: Any, folder: Path, target: Target, told: Callable[[str], None] = lambda _: None) -> Result:
    one = {"sparge": METHODS["sparge"]}
    return run.tune(pipe, one, target, CLIPS, SIZE, folder, dense_steps=(0.0,), told=told)


class StoppedError(RuntimeError):
    """Stands for a kill."""


def _same(found: Profile) -> dict[str, Any]:
    """What does not depend on the clock."""
    fields = dc.asdict(found)
    fields["method"], fields["schedule"] = str(found.method), str(found.schedule)
    fields["provenance"] = dict(found.provenance)
    del fields["provenance"]["date"]
    measured = dict(fields["provenance"].pop("measured"))
    for name in ("seconds_dense", "seconds_tuned"):
        measured.pop(name)
    return {**fields, "measured_figures": measured}


def test_a_search_that_is_stopped_anywhere_ends_with_the_same_profile(pipe: Any, tmp_path: Path) -> None:
    heard: list[str] = []
    whole = tuned(pipe, tmp_path / "whole", Target(density=0.6), heard.append)
    profile = _same(whole.profile("x"))
    for stop in (len(heard) // 3, len(heard) - 2):
        folder, count = tmp_path / str(stop), itertools.count(1)

        def told(_: str, stop: int = stop, count: Any = count) -> None:
            if next(count) == stop:
                raise StoppedError

        with pytest.raises(StoppedError):
            tuned(pipe, folder, Target(density=0.6), told)
        assert vsparse.patch_of(pipe.transformer) is None
        again: list[str] = []
        assert _same(tuned(pipe, folder, Target(density=0.6), again.append).profile("x")) == profile
        assert len(again) <= len(heard)


@pytest.mark.full
def test_text_among_the_tokens(tmp_path: Path) -> None:
    """CogVideoX: text before the video is always computed, and counts in what is executed."""
    pipe, call = tiny_pipelines.cogvideox()
    pipe.set_progress_bar_config(disable=True)
    size = {"height": call["height"], "width": call["width"], "frames": call["num_frames"], "steps": 2}
    one = {"sparge": METHODS["sparge"]}
    with pytest.raises(UnreachableError, match="executes at least"):
        run.tune(pipe, one, Target(density=0.5), CLIPS, size, tmp_path, dense_steps=(0.0,))
    result = run.tune(pipe, one, Target(density=0.9), CLIPS, size, tmp_path, dense_steps=(0.0,))
    assert result.verified.met
    assert 0.5 < result.verified.tuned.density <= 0.9


@pytest.mark.full
@pytest.mark.slow
def test_a_command_that_is_killed_ends_with_the_same_profile(tmp_path: Path) -> None:
    """SIGKILL while it works, several times: what the ledger holds is whole, and nothing else is left."""
    tiny_pipelines.wan()[0].save_pretrained(tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text("a cat\na fox\n")
    size = [x for name, value in SIZE.items() for x in (f"--{name}", str(value))]
    method = ["--density", "0.6", "-m", "sparge", "-s", "block=8", "--dense-steps", "0"]

    def start(folder: str) -> subprocess.Popen[bytes]:
        given = [*method, "--prompts", str(tmp_path / "prompts.txt"), *size, "-o", str(tmp_path / folder)]
        command = [sys.executable, "-m", "vsparse", "tune", str(tmp_path / "wan"), *given]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    assert start("whole").wait() == 0
    ledger = tmp_path / "torn" / run.LEDGER
    for count in (1, 4):
        process = start("torn")
        while process.poll() is None and not (ledger.is_file() and _entries(ledger) >= count):
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start("torn").wait() == 0
    whole, torn = (Profile.read(tmp_path / folder / "profile.toml") for folder in ("whole", "torn"))
    assert _same(torn) == _same(whole)
    kept = {path.name for path in (tmp_path / "torn").iterdir()}
    assert {"profile.toml", "report.html", "report.json", run.LEDGER} <= kept


def _entries(ledger: Path) -> int:
    """How many figures it holds: a file that is replaced as a whole can be read at any time."""
    return len(json.loads(ledger.read_text())["found"])


def test_the_profile_meets_its_target_and_is_applied(pipe: Any, tmp_path: Path) -> None:
    result = tuned(pipe, tmp_path, Target(density=0.6))
    assert result.verified.met
    assert result.verified.tuned.density <= 0.6
    assert result.verified.uniform.density >= result.verified.tuned.density
    files = run.write(result, tmp_path, tmp_path / "mine.toml")
    assert [path.name for path in files] == ["mine.toml", "report.html", "report.json"]
    profile = Profile.read(files[0])
    assert profile.measured
    assert profile.size == Size(height=32, width=32, frames=5, steps=2)
    with vsparse.apply(pipe, files[0]) as patch:
        generate(pipe, **SIZE, prompt="a fox", seed=100)
        assert patch.stats()["density"] == result.verified.tuned.outcomes[0].density
    told = files[1].read_text()
    assert result.verdicts[0].split(".")[0] in told
    assert json.loads(files[2].read_text())["verified"]["met"] is True
    # Another target uses what the folder holds.
    heard: list[str] = []
    other = tuned(pipe, tmp_path, Target(error=0.9), heard.append)
    assert not any("probing" in words for words in heard)
    assert other.found.met
    assert other.found.value <= 0.9


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(error=1e-12), "another kernel, all pairs computed, is off by"),
        (Target(seconds=1e-6), "fewer steps, a smaller video or a faster kernel would have to give"),
    ],
)
def test_targets_that_cannot_be_reached(
    pipe: Any, tmp_path: Path, target: Target, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "TRIES", 2)
    result = tuned(pipe, tmp_path, target)
    assert not result.found.met
    assert not result.verified.met
    assert words in result.found.advice
    assert any(words in said for said in result.verdicts)


def test_a_density_below_all_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"density of at most 0.01 cannot be reached: with 0 of 2 steps"):
        tuned(pipe, tmp_path, Target(density=0.01))


def test_seconds_that_are_many(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "TRIES", 2)
    result = tuned(pipe, tmp_path, Target(seconds=1e3))
    assert result.found.met
    assert result.found.value <= 1e3


def test_candidates_and_dense_steps_are_compared(pipe: Any, tmp_path: Path) -> None:
    trials = Trials(pipe, SIZE, Ledger(tmp_path / "search.json", {}), lambda _: None)
    found = Search(trials, METHODS, CLIPS[0], Target(density=0.8), dense_steps=(0.0, 0.5)).run()
    assert {(row["name"], row["dense_steps"]) for row in found.tried} >= {("sparge", 0), ("sparge", 1), ("adaspa", 1)}
    whole = [row for row in found.tried if row["clips"] == len(CLIPS[0])]
    best = min(whole, key=lambda row: row["error"])
    # Its budget may have come down since, as long as it executed more than the target.
    assert (best["name"], best["dense_steps"]) == (found.choice.name, round(2 * found.choice.dense_steps))
    assert found.value <= 0.8
    assert all(weight > 0.0 for row in found.weights for weight in row)
    for scene in CLIPS[0]:  # the reference is the stock pipeline, not what probing made
        stock = clip_of(pipe, {**SIZE, "prompt": scene.prompt, "seed": scene.seed})
        assert torch.equal(trials.dense(scene).latents[-1], stock.latents[-1])
