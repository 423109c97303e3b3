"""The profiles that come along: read, planned, explained, and in line with what their sources say."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import vsparse
from vsparse import cli
from vsparse.measure import profiles
from vsparse.measure.checkpoints import CHECKPOINTS
from vsparse.measure.embedded import embedded_path
from vsparse.measure.options import asked
from vsparse.measure.profiles import UNMEASURED, Entry, entries, entry, page, profiles_table, schedule_words, usage
from vsparse.methods.base import with_text
from vsparse.profile import Profile, shipped

NAMES = tuple(shipped())
PUBLISHED = tuple(name for name in NAMES if not Profile.read(f"{name}.toml").measured)
TABLES = ("options", "schedule", "model", "size", "provenance")
STATED = tuple(name for name in NAMES if "density" in Profile.read(f"{name}.toml").provenance)
OWN = """
format = 1
about = "a try"
measured = true
method = "sta"
options = {tile = [1, 4, 4], block = 16, window = [1, 1, 1]}
schedule = {dense_layers = [0]}
[[layers]]
at = "2-"
window = [3, 3, 3]
[model]
class = "HunyuanVideoTransformer3DModel"
layers = 4
heads = 2
head_dim = 128
[size]
height = 128
width = 128
frames = 9
steps = 4
[provenance]
source = "nobody"
psnr = {mean = 30.5, seeds = [0, 1]}
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Entry]:
    return {one.name: one for one in entries()}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no sentence is broken."""
    monkeypatch.setattr(cli.console, "_width", 400)
    monkeypatch.setattr(cli.errors, "_width", 400)


def printed(shown: object) -> str:
    with cli.console.capture() as caught:
        cli.console.print(shown, highlight=False)
    return caught.get()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_the_models_that_must_have_one_do() -> None:
    starts = ("wan2.1-1.3b-480p", "wan2.1-14b-480p", "wan2.1-14b-720p", "wan2.2-a14b", "wan2.2-ti2v-5b")
    starts += ("hunyuanvideo-720p", "hunyuanvideo-1.5", "cogvideox-2b", "cogvideox-5b")
    assert [start for start in starts if not any(name.startswith(start) for name in NAMES)] == []


@pytest.mark.parametrize("name", NAMES)
def test_each_is_planned_on_its_model_at_its_size(name: str, found: dict[str, Entry]) -> None:
    one = found[name]
    profile, made = one.profile, one.plan
    assert not made.skipped
    assert made.profile == profile
    assert made.method == profile.method
    assert made.density is not None
    assert made.cost is not None
    assert 0 < made.density <= made.cost.density < 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_say_what_is_in_the_files(name: str, found: dict[str, Entry]) -> None:
    one = found[name]
    assert name.endswith(f"-{one.profile.size.height}p-{one.plan.method.key}")
    assert one.plan.method.chooses
    assert set(one.models) <= set(CHECKPOINTS)
    assert one.models


@pytest.mark.parametrize("name", STATED)
def test_the_density_is_the_one_of_the_source(name: str, found: dict[str, Entry]) -> None:
    """At least what the source says, to the digits it gives; at most a block in each row more, frames that are always
    seen, and all text. A temporal band cuts two blocks in every frame."""
    made = found[name].plan
    said = found[name].profile.provenance["density"]
    assert made.grid is not None
    assert made.cost is not None
    tiles = made.method.layout(made.grid, made.sites[0]).video_tiles
    sinks = getattr(made.method, "sink_frames", 0) / made.grid.t
    cut = 1 + 2 * made.grid.t if made.method.key == "svg" else 1
    digits = len(str(said).partition(".")[2])
    most = with_text(made.grid, 1 - (1 - said) * (1 - sinks) + cut / tiles)
    assert said - 0.5 / 10**digits <= made.cost.sparse_density <= most


def test_the_density_of_chosen_chunks_is_that_of_the_table(found: dict[str, Entry]) -> None:
    """VMoBA, table 4: 2 of 7, 6 of 24 and 18 of 72 chunks in every third layer."""
    made = found["wan2.1-1.3b-480p-vmoba"].plan
    assert made.cost is not None
    assert made.cost.sparse_density == pytest.approx((2 / 7 + 6 / 24 + 18 / 72) / 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hunyuanvideo-720p-svg", ["layer 0: full attention in every step", "layers 1-59: steps 1-5 full attention; "]),
        ("hunyuanvideo-720p-radial", ["layers 0-59: steps 1-12 full attention; steps 13-50 sparse"]),
        ("wan2.2-a14b-720p-radial", ["layer 0: full", "layers 1-39: steps 1-11 full attention; steps 12-40 sparse"]),
        ("wan2.1-1.3b-480p-draft", ["layer 0: full attention in every step", "layers 1-29: steps 1-50 sparse"]),
        (
            "hunyuanvideo-720p-adaspa",
            [
                "layers 0-59: steps 1-9 full attention; step 10 full attention, and the map is searched; "
                "steps 11-29 the last map is used again; step 30 the map is searched again; "
                "steps 31-50 the last map is used again"
            ],
        ),
    ],
)
def test_schedules_are_told_in_steps(name: str, words: list[str], found: dict[str, Entry]) -> None:
    lines = schedule_words(found[name].plan, found[name].profile.size.steps)
    assert len(lines) == len(words)
    assert [line for line, start in zip(lines, words, strict=True) if not line.startswith(start)] == []


def test_timesteps_of_the_source_are_these_steps(found: dict[str, Entry]) -> None:
    """draft keeps timesteps above 925 dense; a schedule counts steps."""
    from diffusers import UniPCMultistepScheduler

    one = found["wan2.1-14b-768p-draft"]
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(one.profile.size.steps)
    count = int((scheduler.timesteps > 925).sum())
    assert f"steps 1-{count} full attention" in schedule_words(one.plan, one.profile.size.steps)[1]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_explained(name: str, found: dict[str, Entry]) -> None:
    one = found[name]
    text = " ".join(printed(page(one)).replace("│", " ").split())
    profile = one.profile
    words = [profile.about, str(profile.model), str(profile.size), one.figures]
    words.append(profile.provenance["source"] if name in PUBLISHED else "")
    words += [*one.models, *usage(one), *schedule_words(one.plan, profile.size.steps)]
    words += [profile.provenance.get("note", ""), "Another model is refused"]
    assert [x for x in words if " ".join(x.split()) not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_lines_that_use_it_hold(name: str, found: dict[str, Entry]) -> None:
    python, command = usage(found[name])
    given = json.loads(python.removeprefix("vsparse.apply(pipe, ").removesuffix(")"))
    assert Profile.read(given) == found[name].profile
    typed = shlex.split(command)
    options = dict(zip(typed[3::2], typed[4::2], strict=True))
    assert typed[:3] == ["vsparse", "generate", found[name].models[0]]
    assert asked(options["--method"], []) == found[name].profile
    size = found[name].profile.size
    assert [int(options[f"--{x}"]) for x in ("height", "width", "frames", "steps")] == [
        size.height,
        size.width,
        size.frames,
        size.steps,
    ]


def test_the_list(found: dict[str, Entry]) -> None:
    lines = printed(profiles_table(list(found.values()))).splitlines()
    for name, one in found.items():
        (line,) = [x for x in lines if f"{name} " in x]
        assert len(line) <= 80
        cost, size = one.plan.cost, one.profile.size
        assert cost is not None
        assert line.split() == [
            name,
            f"{size.height}x{size.width}x{size.frames}",
            ", ".join(sorted({one.plan.method.of(site).key for site in one.plan.sites})),
            f"{cost.sparse_density:.3f}",
            f"{cost.density:.3f}",
            "published" if name in PUBLISHED else "measured",
        ]


def test_one_of_your_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    one = entry(str(path))
    assert one.figures == "measured"
    assert one.models == ()
    assert [site.heads for site in one.plan.sites] == [2] * 4
    assert schedule_words(one.plan, 4) == [
        "layer 0: full attention in every step",
        "layer 1: steps 1-4 sparse",
        "layers 2-3: steps 1-4 sparse",
    ]
    text = printed(page(one))
    for words in (
        "layers 0-1: sta",
        "window = (3, 3, 3) *",
        "psnr, mean: 30.5",
        "psnr, seeds: 0; 1",
        f'vsparse generate ./my-model --prompt "..." --method {path}',
    ):
        assert words in text, words
    assert "sta" in printed(profiles_table([one]))


def test_one_for_the_embedded_model_is_planned_on_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    shape = OWN.replace("HunyuanVideoTransformer3DModel", "WanTransformer3DModel").replace("layers = 4", "layers = 6")
    path.write_text(shape.replace("head_dim = 128", "head_dim = 64"))
    one = entry(str(path))
    assert one.models == (str(embedded_path()),)
    assert one.plan.grid == vsparse.Grid(t=5, h=16, w=16)


def test_the_file_that_the_readme_explains(tmp_path: Path) -> None:
    """With every key that a profile can have."""
    readme = (Path(__file__).parents[2] / "profiles" / "README.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    path = tmp_path / "example.toml"
    path.write_text(example)
    one = entry(str(path))
    assert "layers 0-3: sta" in printed(page(one))
    assert one.profile.schedule == vsparse.Schedule(dense_steps=0.3, dense_layers=1, search_at=(0.3, 0.6))
    assert one.profile.model.weights == "..."
    assert set(tomllib.loads(example)) == {"format", "about", "measured", "method", "layers", *TABLES}


def test_a_model_of_another_shape_than_the_profile_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace('source = "nobody"', 'models = ["zai-org/CogVideoX-2b"]'))
    with pytest.raises(ValueError, match=r"is for HunyuanVideoTransformer3DModel with 4 .* is a CogVideoX"):
        entry(str(path))
    path.write_text(OWN.replace("HunyuanVideoTransformer3DModel", "UNet"))
    with pytest.raises(ValueError, match="'UNet' is not a known transformer; known: WanTransformer3DModel"):
        entry(str(path))


def test_the_command(monkeypatch: pytest.MonkeyPatch, found: dict[str, Entry]) -> None:
    monkeypatch.setattr(profiles, "entries", lambda: list(found.values()))
    result = run("profiles")
    assert result.exit_code == 0, result.output
    assert [name for name in NAMES if name not in result.output] == []
    result = run("profiles", "cogvideox-2b-480p-adaspa")
    assert result.exit_code == 0, result.output
    assert UNMEASURED in result.output
    result = run("profiles", "wan-3")
    assert result.exit_code == 2
    assert "no profile 'wan-3', and none of that name is shipped: cogvideox-2b-480p-adaspa, " in result.output


def test_a_plan_on_the_command_line_takes_model_and_size_from_the_profile() -> None:
    result = run("plan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "-m", "profiles/wan2.1-1.3b-480p-draft.toml")
    assert result.exit_code == 0, result.output
    for words in ("21 × 30 × 52 = 32,760", "0.2500 in a sparse call", "step, draft"):
        assert words in result.output, words
    result = run("plan", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "-m", "profiles/wan2.1-1.3b-480p-draft.toml")
    assert result.exit_code == 2
    assert "is for WanTransformer3DModel with 30 attention layers of 12 heads of 128" in result.output


def test_a_shipped_one_is_applied_as_its_name_says() -> None:
    with pytest.raises(ValueError, match="profile 'hunyuanvideo-720p-svg' is for Hunyuan"):
        vsparse.plan(profiles.skeleton("zai-org/CogVideoX-2b"), "hunyuanvideo-720p-svg.toml")
