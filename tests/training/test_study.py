"""The study's table from known rows, and that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses as dc
import json
from pathlib import Path
from typing import Any

import pytest

from vsparse.methods import get_method
from vsparse.training import study
from vsparse.training.study import SUBJECTS, Row, Study
from vsparse.training.study_report import closed, curves, markdown, plot

SEEN = {"color": 4, "shape": 3, "direction": 2, "background": 4, "coherent": 1}
PLAIN = Row(method="dense", asked=1.0, tuned=False, density=1.0, loss=0.25, adherence=SEEN, clips=4)
ROWS = [
    PLAIN,
    dc.replace(PLAIN, method="vsa", asked=0.25, density=0.3, loss=0.75, psnr=20.0, ssim=0.25, recall=0.75),
    dc.replace(PLAIN, method="vsa", asked=0.25, density=0.3, tuned=True, loss=0.375, psnr=25.0, ssim=0.5, seconds=1.0),
    dc.replace(PLAIN, method="sta", asked=0.25, density=0.3, loss=0.125),
    dc.replace(PLAIN, method="sta", asked=0.25, density=0.3, tuned=True, loss=0.125),
]


def test_the_share_of_the_gap_is_that_of_the_definition() -> None:
    """vsa opened 0.75 - 0.25 and ends 0.375 - 0.25 above the dense model: three quarters; sta opened none."""
    assert [closed(row, ROWS) for row in ROWS] == [None, None, 0.75, None, None]


def test_the_table_says_it() -> None:
    lines = markdown(ROWS).splitlines()
    assert lines[2] == "| dense | 1.000 | 0.2500 |  | 4/4 | 3/4 | 2/4 | 1/4 |  |  |  |  |"
    assert lines[4] == "| vsa 0.25, tuned | 0.300 | 0.3750 | 75 % | 4/4 | 3/4 | 2/4 | 1/4 | 25.0 | 0.500 |  | 1.0 |"


def test_pictures_are_written(tmp_path: Path) -> None:
    assert plot(tmp_path / "loss.png", ROWS).stat().st_size > 0
    runs = {"dense": [[(1, 0.5), (2, 0.25)], [(1, 0.5), (2, 0.375)]], "vsa": [[(1, 0.5), (2, 0.5)]] * 2}
    assert curves(tmp_path / "curves.png", runs).stat().st_size > 0


def test_every_subject_takes_its_options() -> None:
    for subject in SUBJECTS:
        for options in subject.options.values():
            method = get_method(subject.method)(**options)
            assert subject.trained != ("search" in method.exact_phases)


def test_rows_that_are_there_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def measure(self: Study, method: str, asked: float, options: Any, tuned: bool, name: str) -> Row:
        made.append(name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return dc.replace(PLAIN, method=method, asked=asked, tuned=tuned)

    monkeypatch.setattr(Study, "_measure", measure)
    subjects = [x for x in study.SUBJECTS if x.method in ("vsa", "adaspa")]
    with pytest.raises(KeyboardInterrupt):
        Study(tmp_path, steps=2, prompts=1).rows(subjects, lambda _: None)
    rows = Study(tmp_path, steps=2, prompts=1).rows(subjects, lambda _: None)
    names = [f"{row.method}-{row.asked:g}-{'tuned' if row.tuned else 'free'}" for row in rows]
    vsa = [f"vsa-{d}-{kind}" for d in ("0.5", "0.25") for kind in ("free", "tuned")]
    assert names == ["dense-1-free", *vsa, "adaspa-0.5-free", "adaspa-0.25-free"]
    assert made == [*names[:3], *names[2:]]
    assert json.loads((tmp_path / "vsa-0.5-free.json").read_text())["made_with"]["steps"] == 2
    with pytest.raises(ValueError, match="was made with"):
        Study(tmp_path, steps=3, prompts=1).rows(subjects, lambda _: None)
