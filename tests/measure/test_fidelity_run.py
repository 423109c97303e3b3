"""Quality, run small: clips made and kept, folders compared, the page, the command, and every refusal."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clip_files
import pytest
import tiny_pipelines
import torch
from fidelity_cases import known, only
from typer.testing import CliRunner

from vsparse import cli
from vsparse.measure import options
from vsparse.measure.fidelity import folders, report, rounds, tables
from vsparse.measure.fidelity.page import page
from vsparse.measure.fidelity.result import Fidelity
from vsparse.measure.fidelity.rounds import Subject, exact_floor, measured
from vsparse.measure.fidelity.sheets import telling
from vsparse.measure.fidelity.vbench import wanted_clips
from vsparse.measure.shapes import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, held_out, parse
from vsparse.measure.video import read_video, write_video
from vsparse.methods import get_method
from vsparse.methods.by_layer import ByLayer
from vsparse.profile import Model, Profile, Size
from vsparse.schedule import Schedule

SIZE = {"height": 32, "width": 32, "frames": 5, "steps": 2}
SPARSE = {"density": 0.5, "block": 16}


def subject(**changes: Any) -> Subject:
    method = get_method("vsa")().replace(**{**SPARSE, **changes})
    return Subject(name="vsa", method=method, schedule=Schedule(dense_steps=0.5))


def compare(pipe: Any, folder: Path, *subjects: Subject, told: Callable[..., None] = lambda *_: None) -> Fidelity:
    wanted = wanted_clips(["a cat", "a dog"])
    return measured(pipe, subjects, wanted, SIZE, folder=folder, source="tiny", fps=8, told=told)


def touched(path: Path, *_: Any, **__: Any) -> None:
    """Instead of a video, where nobody looks at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


# ---- made ------------------------------------------------------------------------------------------------------------


def test_clips_are_made_measured_written_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = tiny_pipelines.wan()
    before, heard = list(pipe.transformer.state_dict()), []
    monkeypatch.setattr(rounds, "write_video", touched)
    found = compare(pipe, tmp_path, exact_floor(), subject(), told=lambda *x: heard.append(x))
    assert list(pipe.transformer.state_dict()) == before
    assert [run.name for run in found.runs] == ["dense", "floor", "vsa"]
    floor, vsa = found.runs[1:]
    near, far = (list(found.values(run, "psnr").values()) for run in (floor, vsa))
    assert min(near) > 60 > max(far)
    assert found.density(floor) == 1.0
    assert 0.5 < (found.density(vsa) or 0) < 1.0
    assert tables.ran_rows(found)[2][3:5] == ["1 of 2", "0 of 2"]
    for one in found.outcomes(vsa):
        assert one.distance is not None
        assert one.distance.steps[0] == 0.0 < one.distance.steps[1], "the first step is dense"
        assert one.ran is not None
        assert one.ran.tokens == 3 * 8 * 8
        assert one.seen is None
    assert vsa.recall is not None
    assert 0.5 < vsa.recall < 1.0
    assert heard[-1][1:] == (7, 7)
    assert {path.parent.name for path in tmp_path.rglob("*.mp4")} == {run.name for run in found.runs}
    assert json.loads((tmp_path / "videos" / "prompts.json").read_text()) == {
        "a cat-0.mp4": "a cat",
        "a dog-0.mp4": "a dog",
    }

    made: list[str] = []
    stock = rounds.clip_of

    def counted(pipe: Any, asked: Any) -> Any:
        made.append(asked["prompt"])
        return stock(pipe, asked)

    monkeypatch.setattr(rounds, "clip_of", counted)
    again = compare(pipe, tmp_path, exact_floor(), subject())
    assert made == []
    assert again.as_json()["runs"] == found.as_json()["runs"]
    (tmp_path / "videos" / "vsa" / "a dog-0.mp4").unlink()
    (tmp_path / "clips" / "a cat-0.json").write_text("{")
    compare(pipe, tmp_path, exact_floor(), subject())
    assert made == ["a cat"] * 3 + ["a dog"] * 3, "what is missing or broken is made again, and only that"
    made.clear()
    compare(pipe, tmp_path, exact_floor(), subject(density=0.25))
    assert len(made) == 7, "other settings, other clips"


def test_a_floor_that_cannot_run_is_said_and_a_method_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, _ = tiny_pipelines.wan()
    stock = rounds.apply

    def refusing(target: Any, method: Any, **given: Any) -> Any:
        if method.density == 1.0:
            raise NotImplementedError("no kernel\n  - for this")
        return stock(target, method, **given)

    monkeypatch.setattr(rounds, "apply", refusing)
    monkeypatch.setattr(rounds, "write_video", touched)
    found = compare(pipe, tmp_path, exact_floor(), subject())
    assert found.floor is None
    assert any(line.startswith("No floor: no kernel - for this.") for line in tables.sentences(found))
    monkeypatch.setattr(rounds, "clip_of", lambda *_: pytest.fail("nothing is generated before the refusal"))
    with pytest.raises(NotImplementedError, match="no kernel"):
        compare(pipe, tmp_path / "other", exact_floor(), subject(density=1.0))


def test_prompts_of_the_embedded_pipeline_are_mixed() -> None:
    found = [parse(text) for text in report.prompts_of(None, [], None)]
    assert all(scene in held_out() for scene in found)
    assert Counter(scene.color for scene in found) == dict.fromkeys(COLORS, 1)
    assert Counter(scene.shape for scene in found) == dict.fromkeys(SHAPES, 2)
    assert Counter(scene.background for scene in found) == dict.fromkeys(BACKGROUNDS, 3)
    assert {scene.direction for scene in found} == set(DIRECTIONS)
    assert report.prompts_of("x", ["a cat"], None) == ["a cat"]
    with pytest.raises(ValueError, match="not both"):
        report.prompts_of(None, ["a"], Path("b"))
    with pytest.raises(ValueError, match="give --prompt TEXT"):
        report.prompts_of("x", [], None)


def test_a_profile_is_compared_under_its_name(tmp_path: Path) -> None:
    method = ByLayer(parts={"0": get_method("vsa")().replace(**SPARSE)})
    model = Model(name="WanTransformer3DModel", layers=2, heads=2, head_dim=32)
    size = Size(height=32, width=32, frames=5, steps=2)
    path = Profile(method=method, model=model, size=size, about="for a test", name="own").write(tmp_path / "own.toml")
    (chosen,) = options.methods([str(path)], [])
    assert isinstance(chosen, Profile)
    subject = Subject(name=chosen.name, method=chosen, schedule=options.schedule(chosen, None, None, None))
    assert subject.chooses == method
    assert subject.words.startswith("own: for a test; ByLayer(")


def test_options_of_all_methods_and_of_one() -> None:
    vsa, adaspa = options.methods(["vsa", "adaspa"], ["density=0.5", "vsa.tile=1x4x4", "vsa.density=0.25"])
    assert vsa == get_method("vsa")().replace(density=0.25, tile=(1, 4, 4))
    assert adaspa == get_method("adaspa")().replace(density=0.5)
    with pytest.raises(ValueError, match="'dsv' is none of the methods vsa"):
        options.methods(["vsa"], ["dsv.density=0.5"])
    with pytest.raises(ValueError, match="'vsa' twice"):
        options.methods(["vsa", "vsa"], [])


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_folders_are_paired_by_name_and_nothing_is_dropped(tmp_path: Path) -> None:
    pytest.importorskip("decord", reason="decord has no wheel for this machine")
    dense, sparse, floor = (tmp_path / name for name in ("dense", "sparse", "floor"))
    for folder in (dense, sparse, floor):
        for name in ("same-0", "cut", "other"):
            clip_files.write_numbered(folder / f"{name}.mp4", 25)
    clip_files.write_numbered(dense / "alone.mp4", 3)
    clip_files.write_numbered(sparse / "stray.mp4", 3)
    clip_files.damage(dense / "cut.mp4", dense / "cut.mp4")
    (sparse / "other.mp4").write_text("no video at all")
    clip_files.write_numbered(dense / "long.mp4", 4)
    clip_files.write_numbered(sparse / "long.mp4", 3)
    (dense / "notes.txt").write_text("not looked at")
    found = folders.compared(dense, sparse, floor=floor)
    assert [clip.name for clip in found.clips] == ["same-0.mp4"]
    assert found.clips[0].prompt == "same"
    assert {Path(path).relative_to(tmp_path).as_posix(): why.partition(":")[0] for path, why in found.lost.items()} == {
        "dense/alone.mp4": "no sparse video of this name",
        "sparse/stray.mp4": f"no video of this name in {dense}",
        "dense/cut.mp4": "it cannot be decoded to its end",
        "sparse/cut.mp4": "its dense twin cannot be decoded",
        "floor/cut.mp4": "its dense twin cannot be decoded",
        "sparse/other.mp4": "decord cannot open it",
        "sparse/long.mp4": "video (3, 16, 16, 3) and reference (4, 16, 16, 3) must have one shape",
    }
    run = next(run for run in found.runs if run.kind == "sparse")
    assert found.spread(run, "psnr").endless == 1, "the same file twice"
    assert found.floor is not None
    assert "latents, last step: not measured: videos on disk have no latents." in tables.missing(found)
    assert len(tables.left_out(found)) == 7
    assert [row[2:6] for row in tables.ran_rows(found)] == [["\u2013"] * 4] * 3, "nobody knows what ran"
    text = page(found)
    assert "In no figure: 7 files" in text
    assert "decord cannot open it" in text


def test_folders_that_cannot_be_compared_say_why(tmp_path: Path) -> None:
    pytest.importorskip("decord", reason="decord has no wheel for this machine")
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    dense.mkdir()
    with pytest.raises(ValueError, match="holds no video"):
        folders.compared(dense, sparse)
    clip_files.write_numbered(dense / "a.mp4", 3)
    with pytest.raises(ValueError, match="is no folder"):
        folders.compared(dense, sparse)
    clip_files.write_numbered(sparse / "b.mp4", 3)
    with pytest.raises(ValueError, match=r"can be compared .*a\.mp4: no sparse video of this name"):
        folders.compared(dense, sparse)


def test_a_known_difference_survives_the_codec(tmp_path: Path) -> None:
    """Two greys, a step of 32 of 255 apart: what decord gives back lies within a level of that."""
    pytest.importorskip("decord", reason="decord has no wheel for this machine")
    for name, level in (("dense", 96), ("sparse", 128)):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "a.mp4", torch.full((3, 16, 16, 3), level / 255))
    found = folders.compared(tmp_path / "dense", tmp_path / "sparse")
    (psnr,) = found.values(found.runs[1], "psnr").values()
    assert 34 >= 255 * 10 ** (-psnr / 20) >= 30
    assert found.values(found.runs[1], "temporal") == {"a.mp4": 1.0}
    assert "No floor: none was given." in " ".join(tables.sentences(found))


# ---- the page --------------------------------------------------------------------------------------------------------


def test_page_says_what_was_measured_and_needs_nothing_else(tmp_path: Path) -> None:
    found = known()
    written = report.write(tmp_path, found)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    text = (tmp_path / "report.html").read_text()
    for row in (*tables.ran_rows(found), *tables.figure_rows(found), *tables.clip_rows(found)):
        cells = "".join(f"<td>{html.escape(x)}</td>" for x in row[1:])
        assert f"{html.escape(row[0].strip())}</td>{cells}" in text
    for line in (*tables.sentences(found), *tables.missing(found)):
        assert html.escape(line) in text
    assert "<b>bird" not in text
    assert "http://" not in text
    assert "https://" not in text
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', text)
    assert set(sources) == {"data:image/png;base64,"}
    for name in ("clips", "latents", "densities-vsa"):
        assert f'<figure id="{name}">' in text
    assert json.loads((tmp_path / "report.json").read_text())["source"] == "abacus"


def test_the_clips_to_look_at_are_the_worst_and_the_middle_one() -> None:
    found = known()
    assert {why: clip.name for why, clip in telling(found).items()} == {
        "furthest": "a cat-0",
        "middle": "a dog-0",
    }
    assert list(telling(only(found, found.clips[1]))) == ["only"]


NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
LOOK = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  document.title = JSON.stringify({
    images: images.length,
    drawn: images.filter(x => x.complete && x.naturalWidth > 100).length,
    fits: document.documentElement.scrollWidth <= innerWidth,
    verdict: document.getElementById("verdict").innerText,
  });
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is on the path")
@pytest.mark.parametrize("width", [1200, 500])
def test_chromium_shows_every_picture_and_nothing_sticks_out(width: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    text = page(known()).replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", LOOK))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *options, f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    facts = json.loads(html.unescape(title))
    assert facts == {"images": 4, "drawn": 4, "fits": True, "verdict": tables.sentences(known())[0]}


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def said(result: Any) -> str:
    return " ".join("".join(" " if letter in "│┃┌┐└┘─━" else letter for letter in result.output).split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "wan"
    tiny_pipelines.wan()[0].save_pretrained(path)
    return path


def test_command_makes_a_report_and_folders_that_it_compares_in_turn(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    size = [x for name, value in SIZE.items() for x in (f"--{name}", value)]
    chosen = ["-m", "vsa", "-s", "density=0.5", "-s", "block=16", "-s", "vsa.tile=1x4x4"]
    old = out / "videos" / "adaspa" / "a dog-0.mp4"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of another run")
    result = run("quality", folder, *chosen, "-p", "a cat", "--seeds", 2, *size, "-o", out)
    assert result.exit_code == 0, result.output
    told = json.loads((out / "report.json").read_text())
    assert [one["name"] for one in told["runs"]] == ["dense", "floor", "vsa"]
    assert list(told["lost"]) == ["videos/adaspa/a dog-0.mp4"]
    assert old.read_bytes() == b"of another run"
    assert [(one["name"], one["seed"]) for one in told["clips"]] == [("a cat-0", 0), ("a cat-1", 1)]
    assert "Against the dense clip of the same prompt and seed" in said(result)
    for line in ("vsa at density", "Floor: exact attention by another kernel"):
        assert line in said(result)
    assert {"report.html", "report.json", "furthest.png", "middle.png"} <= {path.name for path in out.iterdir()}
    assert '<figure id="sheet-furthest">' in (out / "report.html").read_text()
    pytest.importorskip("decord", reason="decord has no wheel for this machine")
    videos = out / "videos"
    assert read_video(videos / "vsa" / "a cat-1.mp4").shape == (5, 32, 32, 3)
    result = run("quality", "--videos", videos / "dense", videos / "vsa", "--floor", videos / "floor", "-o", out / "b")
    assert result.exit_code == 0, result.output
    told = json.loads((out / "b" / "report.json").read_text())
    assert [one["kind"] for one in told["runs"]] == ["dense", "sparse", "floor"]
    assert len(told["clips"]) == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--videos", "a", "b", "-m", "vsa", "--steps", "3"], "leave out --method, --steps"),
        (["--floor", "a"], "--floor goes with --videos"),
        (["--videos", "a", "b"], "'a' is no folder of videos"),
        (["x", "-m", "vsa"], "give --prompt TEXT"),
        (["-m", "nope"], "unknown method 'nope'"),
        (["--dtype", "float16"], "go with a MODEL"),
    ],
)
def test_command_refuses_in_words(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    result = run("quality", *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert complaint in said(result)
