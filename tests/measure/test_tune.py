"""Tuning: what is probed, how a budget is shared, what a target needs, and that a search which was stopped goes on."""

from __future__ import annotations

import dataclasses as dc
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch.nn import functional as F
from tuning import CLIPS, DENSITIES, METHODS, SIZE
from typer.testing import CliRunner

import vsparse
from vsparse import cli
from vsparse.host import find_roots
from vsparse.measure.calibrate import recording
from vsparse.measure.pipelines import generate
from vsparse.measure.recall import driven
from vsparse.measure.tune import run
from vsparse.measure.tune.choice import Choice, UnreachableError, exact_steps, shared, uniform
from vsparse.measure.tune.ledger import Ledger
from vsparse.measure.tune.page import page
from vsparse.measure.tune.probing import Table, inputs_of, probed, sensitivity, spread_over
from vsparse.measure.tune.result import Result
from vsparse.measure.tune.search import Found, Target
from vsparse.measure.tune.trials import Outcome, Scene
from vsparse.measure.tune.verify import Row, Verified
from vsparse.methods import get_method
from vsparse.profile import Model, Size


@pytest.fixture(scope="module")
def pipe() -> Any:
    found, _ = tiny_pipelines.wan()
    found.set_progress_bar_config(disable=True)
    return found


# ---- probing -----------------------------------------------------------------------------------------------------


def test_what_is_probed_is_what_the_layers_are_given(pipe: Any) -> None:
    """One call, all densities, by hand."""
    asked = {**SIZE, "steps": 1, "guidance": 1.0, "prompt": "a cat", "seed": 0}
    with recording(pipe) as samples:
        generate(pipe, **asked)
    method = METHODS["sparge"]
    table = probed(pipe, {"sparge": method}, lambda: generate(pipe, **asked), densities=DENSITIES, share=1.0)["sparge"]
    assert (table.densities, table.calls) == (DENSITIES, 1)
    for layer in range(2):
        (sample,) = samples["transformer", layer]
        single = [x.transpose(1, 2) for x in (sample.q, sample.k, sample.v)]
        exact = F.scaled_dot_product_attention(*(x.double() for x in single))
        # The probe's own full attention is off by rounding: by so much may a distance from it differ.
        rounding = (F.scaled_dot_product_attention(*single).double() - exact).norm() / exact.norm()
        for j, density in enumerate(DENSITIES):
            module, call = driven(method.replace(density=density), sample, layer=layer)
            module.phase = "search"
            out = module.core(sample.q, sample.k, sample.v, None, call)[0].double().transpose(1, 2)
            wanted = (out - exact).square().sum((0, 2, 3)).sqrt() / exact.norm()
            found = torch.tensor([heads[j] for heads in table.error[layer]], dtype=torch.float64).sqrt()
            assert float((found - wanted).abs().max()) <= 2 * float(rounding)
        assert [heads[-1] for heads in table.error[layer]] == [0.0, 0.0]
        assert all(heads[-1] == 1.0 and heads == sorted(heads) for heads in table.executed[layer])
    assert vsparse.patch_of(pipe.transformer) is None


def test_a_share_of_the_calls_is_spread() -> None:
    chosen = [call for call in range(400) if spread_over(call, 0.25)]
    assert len(chosen) == pytest.approx(100, abs=2)
    assert max(b - a for a, b in itertools.pairwise(chosen)) <= 5
    assert all(spread_over(call, 1.0) for call in range(100))


def test_densities_must_rise_to_one(pipe: Any) -> None:
    for wrong in ((), (0.5,), (0.5, 0.25, 1.0), (0.0, 1.0)):
        with pytest.raises(ValueError, match="must rise to 1"):
            probed(pipe, METHODS, lambda: None, densities=wrong)
    with pytest.raises(ValueError, match="nothing was run"):
        probed(pipe, METHODS, lambda: None)


@pytest.mark.parametrize("name", METHODS)
def test_sensitivity(pipe: Any, name: str) -> None:
    """A layer that keeps everything moves nothing; sparser parts move more than nothing; the model is left alone."""
    with inputs_of(pipe, share=1.0) as inputs:
        generate(pipe, **SIZE, prompt="a cat", seed=0)
    assert len(inputs) == 4
    exact = sensitivity(inputs[:2], METHODS[name], 1.0, 0, None)
    sparse = sensitivity(inputs[:2], METHODS[name], 0.25, 0, None)
    head = sensitivity(inputs[:2], METHODS[name], 0.25, 0, 1)
    assert exact < 1e-9 < head
    assert exact < 1e-9 < sparse
    assert vsparse.patch_of(pipe.transformer) is None


# ---- sharing -----------------------------------------------------------------------------------------------------


def known(densities: tuple[float, ...] = DENSITIES) -> Table:
    """Two layers of two heads; head 0 of layer 0 needs nothing, head 1 of layer 1 needs most."""
    needs = [[0.0, 1.0], [2.0, 16.0]]
    return Table(
        densities=densities,
        executed=[[list(densities)] * 2] * 2,
        error=[[[need * (1.0 - d) for d in densities] for need in layer] for layer in needs],
        calls=3,
    )


@pytest.mark.parametrize("density", [0.25, 0.4, 0.5, 0.7, 0.95])
def test_the_best_of_all_combinations_is_taken(density: float) -> None:
    method, table, weights = METHODS["sparge"], known(), [[1.0, 1.0], [1.0, 0.5]]
    choice = shared("sparge", method, table, weights, density=density, dense_steps=0.0, steps=10)
    cells = [(i, j) for i in range(2) for j in range(2)]
    least = math.inf
    for picked in itertools.product(range(3), repeat=4):
        pairs = list(zip(cells, picked, strict=True))
        if sum(table.densities[p] for p in picked) <= 4 * density + 1e-9:
            least = min(least, sum(weights[i][j] * table.error[i][j][p] for (i, j), p in pairs))
    assert choice.predicted == pytest.approx(math.sqrt(least))
    assert sum(map(sum, choice.densities)) <= 4 * density + 1e-9


def test_dense_steps_use_up_the_budget() -> None:
    method, table, weights = METHODS["sparge"], known(), [[1.0] * 2] * 2
    half = shared("sparge", method, table, weights, density=0.6, dense_steps=0.2, steps=10)
    assert sum(map(sum, half.densities)) / 4 <= (6 - 2) / 8 + 1e-9
    with pytest.raises(UnreachableError, match=r"with 5 of 10 steps dense sparge executes at least 0.625 of the pairs"):
        shared("sparge", method, table, weights, density=0.6, dense_steps=0.5, steps=10)
    with pytest.raises(UnreachableError, match="all of 10 steps are dense"):
        shared("sparge", method, table, weights, density=0.6, dense_steps=1.0, steps=10)


def test_steps_that_compute_everything() -> None:
    assert [exact_steps(METHODS["sparge"], share, 10) for share in (0.0, 0.25, 0.3, 1.0)] == [0, 2, 3, 10]
    # The first search is exact: it is the last dense step, and there is one even if nothing else is dense.
    assert [exact_steps(METHODS["adaspa"], share, 10) for share in (0.0, 0.2, 0.3)] == [1, 2, 3]


def test_what_is_applied(pipe: Any) -> None:
    method = METHODS["sparge"]
    choice = Choice(name="sparge", method=method, dense_steps=0.2, densities=((1.0, 1.0), (0.25, 0.5)))
    found, schedule = choice.applied()
    assert found == method.replace(density=(0.25, 0.5))
    assert schedule == vsparse.Schedule(dense_steps=0.2, dense_layers=(0,))
    found, schedule = dc.replace(choice, densities=((0.5, 0.5), (0.25, 0.5))).applied()
    assert found.key == "by_layer"
    assert schedule.dense_layers == ()
    found, schedule = uniform(choice, 0.5).applied()
    assert found == method.replace(density=0.5)
    searching = dc.replace(choice, method=METHODS["adaspa"]).applied()[1]
    assert searching == vsparse.Schedule(dense_steps=0.2, search_at=(0.2, 0.6), dense_layers=(0,))
    with vsparse.apply(pipe, found, schedule=schedule) as patch:
        generate(pipe, **SIZE, prompt="a cat", seed=0)
        assert 0.5 <= patch.stats()["density"] < 1.0


# ---- derived figures ---------------------------------------------------------------------------------------------


def row(name: str, errors: list[float], density: float) -> Row:
    outcomes = tuple(Outcome(error=x, psnr=30.0, ssim=0.9, density=density) for x in errors)
    return Row(name=name, outcomes=outcomes)


def checked(tuned_errors: list[float], even_errors: list[float], **changes: Any) -> Verified:
    given: dict[str, Any] = {
        "clips": tuple(Scene(f"clip {i}", i) for i in range(len(tuned_errors))),
        "tuned": row("tuned", tuned_errors, 0.29),
        "uniform": row("uniform", even_errors, 0.30),
        "floor": row("floor", [1e-6] * len(tuned_errors), 1.0),
        "uniform_density": 0.3,
        "seconds": (2.0, 1.0),
        "met": True,
        "value": 0.29,
    }
    return Verified(**{**given, **changes})


def test_verdicts() -> None:
    better = checked([0.1, 0.2, 0.3, 0.4], [0.21, 0.3, 0.41, 0.5])
    assert better.gain.mean == pytest.approx(0.105)
    assert "densities by layer and head are better than one density: error 0.2500 against 0.3550" in better.verdict
    assert "better on 4 of 4 clips" in better.verdict
    assert "are worse than" in checked([0.21, 0.3, 0.41, 0.5], [0.1, 0.2, 0.3, 0.4]).verdict
    assert "are not told apart from" in checked([0.1, 0.3], [0.2, 0.2]).verdict
    assert "one clip tells no interval" in checked([0.1], [0.2]).verdict


def test_the_report_says_what_is_known() -> None:
    choice = Choice(name="sparge", method=METHODS["sparge"], dense_steps=0.2, densities=((1.0, 1.0), (0.25, 0.5)))
    tried = {"name": "sparge", "dense_steps": 2, "dense_layers": 1, "predicted": None, "density": 0.29, "error": 0.25}
    found = Found(
        choice=choice,
        met=True,
        value=0.28,
        advice="",
        tried=[{**tried, "clips": 2}],
        tables={"sparge": known()},
        weights=[[1.0, 2.0], [3.0, 0.0]],
    )
    result = Result(
        found=found,
        verified=checked([0.1, 0.2], [0.2, 0.31]),
        model=Model(name="M", layers=2, heads=2, head_dim=8),
        size=Size(height=32, width=32, frames=5, steps=10),
        guidance=None,
        calibration=CLIPS[0],
        target=Target(density=0.3),
        device="here",
    )
    said = " ".join(result.verdicts)
    assert "Target: executed density of at most 0.3. Met on 2 clips that the search has not seen: 0.2900" in said
    assert "2 of 10 steps and 1 of 2 layers dense; 0.290 of all token pairs computed" in said
    assert "dense 2.00 s, tuned 1.00 s" in said
    text = page(result)
    for words in ("0.1500", "0.2550", "one density, 0.300", "a cat (seed 0)"):
        assert words in text
    assert result.profile("p").provenance["measured"]["tuned"]["error"] == pytest.approx(0.15)


# ---- what is typed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give one target of density, error and seconds, got none"),
        ({"density": 0.3, "error": 0.1}, "give one target"),
        ({"density": 1.0}, "density must be a number between 0 and 1, got 1.0"),
        ({"error": 0.0}, "error must be a number above 0, got 0.0"),
        ({"seconds": float("nan")}, "seconds must be a number above 0"),
    ],
)
def test_targets(given: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Target(**given)


def test_candidates() -> None:
    assert list(run.candidates([], {})) == ["adaspa", "sparge", "draft", "jenga"]
    assert run.candidates(["vsa"], {"tile": (1, 2, 2)})["vsa"] == get_method("vsa")(tile=(1, 2, 2))
    assert run.candidates(["sparge"], {}, small=True)["sparge"].options()["block"] == 16
    with pytest.raises(ValueError, match="svg takes none for each head"):
        run.candidates(["svg"], {})
    with pytest.raises(ValueError, match="--set goes with --method"):
        run.candidates([], {"block": 8})


def test_clips_to_search_with_and_to_verify_with() -> None:
    assert run.split(["a", "b", "c"], []) == ([Scene("a", 0), Scene("c", 1)], [Scene("b", 100)])
    assert run.split(["a"], ["b"]) == ([Scene("a", 0)], [Scene("b", 100)])
    with pytest.raises(ValueError, match="give at least two"):
        run.split(["a"], [])
    with pytest.raises(ValueError, match="must not be searched with: 'a'"):
        run.split(["a"], ["a"])
    seen, unseen = run.embedded_clips(4, 4)
    assert not {scene.prompt for scene in seen} & {scene.prompt for scene in unseen}
    assert not {scene.seed for scene in seen} & {scene.seed for scene in unseen}
    with pytest.raises(ValueError, match="clips must be from 1 to"):
        run.embedded_clips(4, 10**6)


def test_ledger(tmp_path: Path) -> None:
    path, calls = tmp_path / "a" / "search.json", []
    ledger = Ledger(path, {"x": (1, 2)})
    for _ in range(2):
        assert ledger.get("one", lambda: calls.append(1) or (0.1, 2)) == [0.1, 2]  # type: ignore[func-returns-value]
    assert calls == [1]
    assert Ledger(path, {"x": [1, 2]}).get("one", pytest.fail) == [0.1, 2]
    with pytest.raises(ValueError, match=r"other settings \(x, y\); take another folder"):
        Ledger(path, {"x": [1], "y": 2})
    path.write_text("{")
    with pytest.raises(ValueError, match="is no ledger of a search"):
        Ledger(path, {})


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ([], "give one target"),
        (["--density", "0.3", "--prompts", "x"], "--prompts and --unseen go with a MODEL"),
        (["--density", "0.3", "--profile", "x.json"], "--profile must end in .toml"),
        (["./none", "--density", "0.3"], "give --prompts"),
        (["--density", "0.3", "-m", "svg"], "svg takes none for each head"),
    ],
)
def test_command_refuses(tmp_path: Path, typed: list[str], words: str) -> None:
    result = CliRunner().invoke(cli.app, ["tune", *typed, "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_a_size_is_needed(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one size of video; give --frames, --steps"):
        run.tune(pipe, METHODS, Target(density=0.5), CLIPS, {"height": 32, "width": 32}, tmp_path)
    assert len(find_roots(pipe)[1]) == 1


def test_command_hands_on_what_was_typed(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}

    def tune(given: Any, methods: Any, target: Any, clips: Any, size: Any, folder: Path, **more: Any) -> None:
        taken.update(methods=methods, target=target, clips=clips, size=size, folder=folder, **more)
        raise ValueError("enough")

    monkeypatch.setattr(run, "tune", tune)
    monkeypatch.setattr("vsparse.measure.embedded.opened", lambda *_, **__: (pipe, {}))
    for name, words in (("seen.txt", "a cat\na dog\n"), ("unseen.txt", "a fox\n")):
        (tmp_path / name).write_text(words)
    files = ["--prompts", str(tmp_path / "seen.txt"), "--unseen", str(tmp_path / "unseen.txt"), "--image", "first.png"]
    size = [x for name, value in SIZE.items() for x in (f"--{name}", str(value))]
    chosen = ["-m", "sparge", "-s", "block=8", "--dense-steps", "0,0.5", "--latency", "2"]
    result = CliRunner().invoke(cli.app, ["tune", "./mine", *files, *size, *chosen, "-o", str(tmp_path)])
    assert "enough" in result.output
    assert taken["target"] == Target(seconds=2.0)
    assert taken["methods"] == {"sparge": METHODS["sparge"]}
    assert taken["clips"] == ([Scene("a cat", 0), Scene("a dog", 1)], [Scene("a fox", 100)])
    assert taken["size"] == {**SIZE, "image": "first.png"}
    assert (taken["dense_steps"], taken["folder"]) == ((0.0, 0.5), tmp_path)
