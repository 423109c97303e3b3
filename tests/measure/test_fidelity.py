"""Quality: known clips and known values in, every derived figure out; what has no figure says why."""

from __future__ import annotations

import dataclasses as dc
import json
import math
import sys
import types
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from fidelity_cases import NO_LPIPS, far, known, only
from torch import Tensor

from vsparse.geometry import Grid
from vsparse.measure.fidelity import distance as distances
from vsparse.measure.fidelity import perceptual, tables
from vsparse.measure.fidelity.caught import MOST_TOKENS, recall_of, too_long
from vsparse.measure.fidelity.distance import FIGURES, Distance, consistency, distance, seen_in
from vsparse.measure.fidelity.result import SEEN, Outcome
from vsparse.measure.fidelity.spread import quantile, spread_of
from vsparse.measure.fidelity.vbench import prompt_of, read_prompts, video, wanted_clips, write_prompts
from vsparse.measure.paired import Clip
from vsparse.measure.shapes import draw, scenes
from vsparse.methods import get_method
from vsparse.methods.by_layer import ByLayer
from vsparse.methods.samples import Sample

# ---- spread ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_quantiles_are_those_of_the_printed_table(freedom: int, t: float) -> None:
    assert round(quantile(freedom), 3) == t


def test_quantile_agrees_with_the_area_under_the_density() -> None:
    """Simpson's rule over Student's density, which the closed form never sees."""
    for freedom in (1, 2, 5, 8):
        t, pieces = quantile(freedom), 2000
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        xs = [-t + 2 * t * i / pieces for i in range(pieces + 1)]
        ys = [scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in xs]
        area = (ys[0] + ys[-1] + 4 * sum(ys[1:-1:2]) + 2 * sum(ys[2:-1:2])) * 2 * t / pieces / 3
        assert area == pytest.approx(0.95, abs=1e-6)


def test_spread_of_known_values() -> None:
    found = spread_of([1.0, 2.0, 3.0, 6.0])
    assert (found.mean, found.low, found.high, found.count, found.endless) == (3.0, 1.0, 6.0, 4, 0)
    assert found.sd == pytest.approx(stdev([1, 2, 3, 6]))
    assert found.interval == pytest.approx((3 - 3.18244630 * found.sd / 2, 3 + 3.18244630 * found.sd / 2))


def test_one_clip_has_no_interval_and_says_so() -> None:
    found = spread_of([4.0])
    assert (found.mean, found.sd, found.interval) == (4.0, None, None)
    assert found.why_no_interval == "one clip: no interval"


def test_infinite_values_are_counted_apart() -> None:
    found = spread_of([math.inf, 40.0, 42.0])
    assert (found.mean, found.low, found.high, found.count, found.endless) == (41.0, 40.0, math.inf, 3, 1)
    assert found.sd == pytest.approx(math.sqrt(2))
    both = spread_of([math.inf, math.inf])
    assert (both.mean, both.sd, both.why_no_interval) == (math.inf, None, "2 of 2 clips equal: no interval")
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError, match="one number or more"):
            spread_of(bad)


# ---- one clip against another ----------------------------------------------------------------------------------------


def grey(*levels: float) -> Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 16, 16, 3).clone()


def test_consistency_of_known_changes() -> None:
    reference = grey(0.2, 0.4, 0.4)
    assert consistency(grey(0.5, 0.7, 0.7), reference) == pytest.approx((1.0, 1.0)), "another level, the same changes"
    assert consistency(grey(0.2, 0.3, 0.3), reference) == pytest.approx((2 * 0.5 / 1.25, 0.5))
    assert consistency(grey(0.4, 0.2, 0.2), reference) == pytest.approx((-1.0, 1.0))
    assert consistency(grey(0.2, 0.2, 0.4), reference) == pytest.approx((0.0, 1.0)), "the change comes too late"


def test_a_constant_video_is_defined_or_refused_in_words() -> None:
    still, moving = grey(0.3, 0.3), grey(0.3, 0.5)
    same = distance(Clip(frames=still), Clip(frames=still))
    assert (same.psnr, same.temporal, same.motion) == (math.inf, 1.0, None)
    assert same.ssim == pytest.approx(1.0)
    assert same.without["motion"] == "the dense clip never changes from frame to frame"
    assert distance(Clip(frames=moving), Clip(frames=still)).temporal == 0.0
    frozen = distance(Clip(frames=still), Clip(frames=moving))
    assert (frozen.temporal, frozen.motion) == (0.0, 0.0)
    one = distance(Clip(frames=still[:1]), Clip(frames=still[:1]))
    assert (one.temporal, one.motion) == (None, None)
    assert one.without["temporal"] == "one frame: nothing changes from frame to frame"


def test_no_frames_are_refused() -> None:
    empty = Clip(frames=torch.zeros(0, 16, 16, 3))
    with pytest.raises(ValueError, match=r"float frames \[F, H, W, 3\], got .* \(0, 16"):
        distance(empty, empty)
    with pytest.raises(ValueError, match="one shape"):
        consistency(grey(0.1, 0.2), grey(0.1))


def test_latents_come_step_by_step_or_with_the_reason() -> None:
    frames = grey(0.1, 0.2)
    reference = Clip(frames=frames, latents=(torch.tensor([3.0, 4.0]), torch.tensor([2.0])))
    clip = Clip(frames=frames, latents=(torch.tensor([3.0, 4.0]), torch.tensor([3.0])))
    found = distance(clip, reference)
    assert found.steps == (0.0, 0.5)
    assert found.latents == 0.5
    silent = distance(Clip(frames=frames, without_latents="it keeps them"), reference)
    assert silent.latents is None
    assert silent.without["latents"] == "it keeps them"


def test_outcomes_survive_their_file() -> None:
    frames = draw([scenes()[0]], seed=0)[0].movedim(0, -1) * 0.5 + 0.5
    seen = seen_in(frames, scenes()[0].prompt)
    assert seen is not None
    assert seen_in(frames, "a fox in the snow") is None
    assert seen_in(frames[:1], scenes()[0].prompt) is None
    one = Outcome(distance=far(math.inf, temporal=None), seen=seen, ran=known().runs[1].outcomes["a cat-0"].ran)
    told = json.loads(json.dumps(one.as_json(), allow_nan=False))
    assert Outcome.from_json(told) == one
    assert Outcome.from_json(Outcome().as_json()) == Outcome()


# ---- LPIPS -----------------------------------------------------------------------------------------------------------


def test_lpips_is_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    large = torch.zeros(1, 64, 64, 3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in perceptual.missing(large)
    url = "https://example.org/models/alexnet-0123.pth"
    default = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url=url))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", types.SimpleNamespace(AlexNet_Weights=default))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "nothing is downloaded" in perceptual.missing(large)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-0123.pth").touch()
    assert perceptual.missing(large) == ""
    assert "got 16 x 16" in perceptual.missing(grey(0.1))


def test_lpips_is_the_mean_over_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many frames at once, the last part smaller; the metric itself is torchmetrics'."""
    import torchmetrics.functional.image as image

    def metric(ours: Tensor, theirs: Tensor, *, net_type: str, reduction: str, normalize: bool) -> Tensor:
        assert (net_type, reduction, normalize, ours.shape[1:]) == ("alex", "sum", True, (3, 16, 16))
        return (ours - theirs).abs().mean((1, 2, 3)).sum()

    monkeypatch.setattr(image, "learned_perceptual_image_patch_similarity", metric)
    levels = [i / 16 for i in range(11)]
    assert perceptual.lpips(grey(*levels), grey(*[0.0] * 11)) == pytest.approx(mean(levels))
    monkeypatch.setattr(distances, "missing", lambda frames: "")
    assert distance(Clip(frames=grey(0.25, 0.25)), Clip(frames=grey(0.5, 0.5))).lpips == pytest.approx(0.25)


# ---- attention recall ------------------------------------------------------------------------------------------------


def test_recall_of_a_method_on_recorded_calls() -> None:
    torch.manual_seed(0)
    grid = Grid(t=1, h=4, w=4)
    flat = Sample(grid=grid, q=torch.zeros(1, 16, 1, 4), k=torch.zeros(1, 16, 1, 4), v=torch.zeros(1, 16, 1, 4))
    method = get_method("vsa")().replace(density=0.25, tile=(1, 2, 2), block=4)
    value, why = recall_of(method, {("transformer", 0): [flat, flat]})
    assert value == pytest.approx(0.25), "attention is spread evenly: recall is the density"
    assert why == ""
    mixed = ByLayer(parts={"0": method})
    assert recall_of(mixed, {("t", 0): [flat], ("t", 1): [flat]}) == (pytest.approx((0.25 + 1) / 2), "")
    assert recall_of(method, {}) == (None, "no attention call was recorded")
    trained, why = recall_of(get_method("dsv")().replace(tile=(1, 2, 2), block=4, stage="sparse"), {("t", 0): [flat]})
    assert trained is None
    assert "attention input" in why
    padded = dc.replace(flat, grid=dc.replace(grid, h=3, text_after=4), text_length=torch.tensor([2]))
    assert recall_of(method, {("t", 0): [padded]}) == (None, "the text of the recorded calls is padded")
    assert too_long(MOST_TOKENS) == ""
    assert str(MOST_TOKENS) in too_long(MOST_TOKENS + 1)


# ---- what all clips tell ---------------------------------------------------------------------------------------------


def test_every_derived_figure() -> None:
    found = known()
    vsa, dsv = found.runs[1], found.runs[2]
    assert [run.name for run in found.others] == ["floor", "vsa", "dsv"]
    spread = found.spread(vsa, "psnr")
    assert spread is not None
    assert (spread.mean, spread.low, spread.high, spread.count) == (28.0, 20.0, 34.0, 3)
    assert spread.sd == pytest.approx(stdev([20, 30, 34]))
    assert spread.interval is not None
    half = 4.30265273 * spread.sd / math.sqrt(3)
    assert spread.interval == pytest.approx((28 - half, 28 + half))
    assert list(found.values(vsa, "worst_psnr").values()) == [18.0, 28.0, 32.0]
    assert list(found.values(vsa, SEEN).values()) == [5.0, 4.0, 3.0]
    assert found.density(vsa) == pytest.approx(0.3)
    assert found.heads(vsa) == [[[1.0, 1.0]], [[pytest.approx(0.3), 0.0]]]
    assert [x.mean for x in found.latents(vsa)] == [0.0, pytest.approx(mean([1 / 20, 1 / 30, 1 / 34]))]
    assert found.adherence(vsa) == {
        "color": 3, "shape": 3, "direction": 3, "background": 2, "coherent": 1, "follows": 2, "clips": 3,
    }  # fmt: skip
    assert found.beyond_floor(vsa) == [40.0, math.inf, 30.0]
    assert found.beyond_floor(dsv) == [-1.0, math.inf, 1.0]
    assert found.spread(vsa, "lpips") is None
    assert found.why("lpips") == [NO_LPIPS]


def test_an_interval_ends_where_the_figure_can_go_no_further() -> None:
    spread = known().spread(known().runs[1], SEEN)
    assert spread is not None
    assert spread.mean == 4.0
    assert spread.interval == (pytest.approx(4 - 4.30265273 / math.sqrt(3)), 5.0)


def test_tables_say_what_ran_and_the_spread_next_to_the_floor() -> None:
    found = known()
    assert tables.ran_rows(found) == [
        ["dense", "3", "1", "all", "all", "1", "5.00"],
        ["floor", "3", "0.300", "1 to 2 of 2", "0 of 1", "\u2013", "4.00"],
        ["vsa", "3", "0.300", "1 to 2 of 2", "0 of 1", "0.900", "4.00"],
        ["dsv", "3", "0.300", "1 to 2 of 2", "0 of 1", "\u2013", "4.00"],
    ]
    rows = tables.figure_rows(found)
    assert all(len(row) == len(tables.FIGURE_HEAD) for row in rows)
    first = [row[0].strip() for row in rows].index("PSNR, dB")
    assert rows[first + 1] == ["  floor", "62.0", "36.6 to 87.4", "2.8", "60.0", "equal", "3, 1 equal"]
    assert rows[first + 2] == ["  vsa", "28.0", "10.1 to 45.9", "7.2", "20.0", "34.0", "3"]
    assert ["LPIPS: not measured", *[""] * 6] in rows
    assert tables.missing(found) == [f"LPIPS: not measured: {NO_LPIPS}."]
    clips = tables.clip_rows(found)
    assert clips[1] == ["  dense", *["\u2013"] * 7, "5", "\u2013"]
    assert clips[3] == ["  vsa", "20.0", "18.0", "0.7500", "0.5000", "1.000", "\u2013", "0.05", "5", "0.200"]
    assert tables.ran_table(found).row_count == 4
    assert tables.figures_table(found).row_count == len(rows)


def test_sentences_compare_with_the_floor_clip_by_clip() -> None:
    vsa, dsv, floor, recall = tables.sentences(known())
    assert vsa == (
        "vsa at density 0.300 (1 to 2 of 2 steps and 0 of 1 layers dense): 28.0 dB PSNR against dense, 95% interval of "
        "the mean 10.1 to 45.9, worst clip 20.0 dB; further away than the floor in 3 of 3 clips, some of them equal to "
        "dense."
    )
    assert "further away than the floor in 2 of 3 clips" in dsv
    assert floor.startswith("Floor: exact attention by another kernel lies 62.0 dB PSNR, 1 of 3 clips equal to the bit")
    assert recall == "dsv: no attention recall: it is not told."


@pytest.mark.parametrize(
    ("beyond", "words"),
    [
        ([], ""),
        ([30.0, 31.0, 32.0], "clip by clip 31.0 dB further away than the floor in the mean (28.5 to 33.5)"),
        ([30.0], "; 30.0 dB further away than the floor"),
        ([-1.0], "; not beyond the floor"),
        ([math.inf, math.inf], "further away than the floor in 2 of 2 clips, some of them equal to dense"),
        ([3.0, -math.inf], "further away than the floor in 1 of 2 clips, some of them equal to dense"),
        ([0.0, 0.0], "no difference from the floor can be told (0.0 to 0.0 dB further away)"),
        ([-5.0, 6.0], "no difference from the floor can be told"),
    ],
)
def test_how_a_method_is_told_from_the_floor(beyond: list[float], words: str) -> None:
    assert words in tables._against(beyond)


def test_one_clip_and_no_floor_are_said() -> None:
    found = known()
    said = tables.sentences(only(found, found.clips[0]))
    assert said[0].endswith("20.0 dB PSNR against dense, one clip: no interval; 40.0 dB further away than the floor.")
    assert "One clip: no interval, and no spread from clip to clip is known." in said
    said = tables.sentences(known(floor=False))
    assert "No floor: none was given. How far exact attention alone would lie from dense is not known." in said
    refused = dc.replace(found.runs[3], outcomes={}, without={"run": "no kernel here"})
    said = tables.sentences(dc.replace(found, runs=[*found.runs[:3], refused]))
    assert "No floor: no kernel here. How far exact attention alone would lie from dense is not known." in said


def test_json_holds_everything() -> None:
    told = json.loads(json.dumps(known().as_json(), allow_nan=False))
    assert [run["name"] for run in told["runs"]] == ["dense", "vsa", "dsv", "floor"]
    vsa, floor = told["runs"][1], told["runs"][3]
    assert vsa["dense_steps"] == [1, 2]
    assert vsa["figures"]["psnr"]["mean"] == 28.0
    assert vsa["beyond_floor_db"] == [40.0, "+inf", 30.0]
    assert floor["figures"]["psnr"]["endless"] == 1
    assert floor["figures"]["psnr"]["high"] == "inf"
    assert told["clips"][0]["runs"]["vsa"]["ran"]["density"] == 0.2
    assert set(vsa["figures"]) == {*FIGURES, SEEN}
    assert set(FIGURES) <= {*(field.name for field in dc.fields(Distance)), "latents"}


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_clips_are_named_as_vbench_reads_them(tmp_path: Path) -> None:
    long = "x" * 300
    found = wanted_clips(["a cat", "a/b", "a\\b", long, long + "y"], seeds=2, first=7)
    assert [(one.name, one.seed) for one in found[:2]] == [("a cat-0", 7), ("a cat-1", 8)]
    assert [one.name for one in found[2:6:2]] == ["a b-0", "a b 2-0"]
    assert len({one.name for one in found}) == len(found)
    assert max(len(one.name.encode()) for one in found) < 200
    assert prompt_of("a cat-1") == prompt_of("a cat") == "a cat"
    told = json.loads(write_prompts(tmp_path, found).read_text())
    assert told["a cat-1.mp4"] == "a cat"
    assert told[f"{found[-1].name}.mp4"] == long + "y"
    assert video(tmp_path, "vsa", "a cat-0") == tmp_path / "videos" / "vsa" / "a cat-0.mp4"
    for bad, words in (([], "one sentence or more"), ([" "], "none of them empty"), (["a", "a"], "given twice: 'a'")):
        with pytest.raises(ValueError, match=words):
            wanted_clips(bad)
    with pytest.raises(ValueError, match="at least 1"):
        wanted_clips(["a"], seeds=0)


def test_prompts_are_read_from_lines_and_from_vbench(tmp_path: Path) -> None:
    lines, listed = tmp_path / "a.txt", tmp_path / "b.json"
    lines.write_text("a cat\n\n a dog \na cat\n")
    assert read_prompts(lines) == ["a cat", "a dog"]
    listed.write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["color"]}, "a dog"]))
    assert read_prompts(listed) == ["a cat", "a dog"]
    for text, words in (("{}", "JSON list"), ("[1]", "prompt_en"), ("[", "cannot be read"), ("[]", "no prompt")):
        listed.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_prompts(listed)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompts(tmp_path / "none.txt")
