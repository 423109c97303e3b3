"""The demo, small: what it writes, and what its report says."""

from __future__ import annotations

import dataclasses as dc
import json
from pathlib import Path

import pytest
import torch

import vsparse
from vsparse.measure import demo
from vsparse.measure.adherence import adherence
from vsparse.measure.embedded import EMBEDDED, embedded_pipeline
from vsparse.measure.shapes import draw, scenes
from vsparse.measure.video import read_video
from vsparse.methods import list_methods


@pytest.mark.parametrize(
    "methods",
    [pytest.param(["vsa", "adaspa", "sparge"], id="few"), pytest.param(None, id="all", marks=pytest.mark.full)],
)
def test_demo_writes_videos_sheet_and_report_and_gives_the_pipeline_back(
    methods: list[str] | None, tmp_path: Path
) -> None:
    """With a few methods; that the rest can run on this model is asked below, and `make demo` runs them all."""
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    before, names, steps = list(pipe.transformer.state_dict()), [], []
    wanted = [*demo.trials(methods), *demo.FLOORS]
    runs = demo.run_demo(
        pipe,
        dc.replace(EMBEDDED, steps=2, frames=3),
        tmp_path,
        prompt="a blue square moving up on a light background",
        seed=3,
        wanted=wanted,
        began=names.append,
        stepped=lambda: steps.append(1),
    )
    assert list(pipe.transformer.state_dict()) == before
    assert [run.name for run in runs] == ["dense", *(trial.name for trial in wanted)]
    assert names == ["warm-up", *(run.name for run in runs), "writing"]
    assert len(steps) == 2 * len(runs)
    by_name = {run.name: run for run in runs}
    assert by_name["floor: dense"].quality.identical
    assert by_name["floor: vsa, all blocks"].quality.psnr > 100
    assert by_name["vsa, density=0.25"].density < by_name["vsa, density=0.5"].density < 1
    assert by_name["vsa, density=0.25"].quality.psnr < 60
    for run in runs:
        assert read_video(run.video).shape == (3, demo.ENLARGE * EMBEDDED.height, demo.ENLARGE * EMBEDDED.width, 3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["clip"]["steps"] == 2
    assert [row["name"] for row in report["runs"]] == [run.name for run in runs]
    assert report["runs"][1]["options"] == {"density": 0.5, "tile": [1, 8, 8]}
    expected = {"report.json", "sheet.png", *(run.video.name for run in runs)}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_every_trial_can_run_on_the_embedded_model() -> None:
    pipe = embedded_pipeline()
    size = {"height": EMBEDDED.height, "width": EMBEDDED.width, "num_frames": EMBEDDED.frames, "steps": EMBEDDED.steps}
    for trial in (*demo.trials(), *demo.FLOORS):
        density = vsparse.plan(pipe, trial.method, **size, **trial.options).density
        assert density is not None, trial
        assert (density == 1.0) == (trial in demo.FLOORS), trial
        assert 0 < density <= 1, trial


def test_every_method_is_tried() -> None:
    assert {trial.method for trial in demo.trials()} == {key for key, kind in list_methods().items() if kind.chooses}
    with pytest.raises(ValueError, match="unknown method 'nope'"):
        demo.trials(["nope"])


def test_rows_tell_dense_steps_and_equality() -> None:
    calls = {"dense": 24, "search": 12, "reuse": 108}
    run = demo.Run(
        name="adaspa", method="adaspa", options={}, frames=torch.zeros(1, 16, 16, 3), seconds=2.0,
        stats={"density": 0.4, "calls": calls}, quality=demo.compare(*[torch.zeros(1, 16, 16, 3)] * 2),
    )  # fmt: skip
    assert demo.facts(run, EMBEDDED) == ["density 0.400, 3 of 12 steps dense", "2.0 s", "equal to the bit"]


def test_rows_tell_what_is_seen() -> None:
    scene = scenes()[0]
    frames = draw([scene], seed=0)[0].movedim(0, -1) * 0.5 + 0.5
    run = demo.Run(name="dense", method="", options={}, frames=frames, seconds=2.0, shows=adherence(frames, scene))
    assert demo.facts(run, EMBEDDED)[-1] == "seen: red circle, right, dark, steady"
    assert run.shows is not None
    assert run.shows.right == 5
    assert adherence(frames, scenes()[-1]).right == 1  # steady, and nothing else
