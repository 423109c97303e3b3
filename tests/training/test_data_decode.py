"""Decoding: the frames that were asked for, of every kind of file; broken ones always in the same words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from clip_files import damage, ffmpeg, numbers, write_numbered

from vsparse.training.data import decode
from vsparse.training.data.buckets import Bucket
from vsparse.training.data.decode import ClipError, Probe, bucket_for, probe, read_clip

decord = pytest.importorskip("decord", reason="decord has no wheel for this machine")


HEVC = "log-level=error:keyint=8:min-keyint=8:bframes=3:b-adapt=0:scenecut=0"  # open groups of pictures


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 frames, 20 x 36 pixels, 8 frames per second."""
    return write_numbered(tmp_path_factory.mktemp("clips") / "clip.mp4", 25, height=20, width=36)


def _taken(path: Path, frames: int, start: int = 0, fps: float | None = None) -> list[int]:
    return numbers(read_clip(path, Bucket(frames=frames, height=8, width=8, fps=fps), start=start))


def test_a_clip_is_probed_and_read_frame_by_frame(clip: Path) -> None:
    assert probe(clip) == Probe(frames=25, fps=8.0, height=20, width=36)
    frames = read_clip(clip, Bucket(frames=5, height=8, width=8), start=3)
    assert (frames.dtype, frames.shape) == (torch.uint8, (5, 20, 36, 3))
    assert numbers(frames) == [3, 4, 5, 6, 7]
    assert _taken(clip, 25) == list(range(25))


def test_frames_are_taken_by_time(clip: Path) -> None:
    assert _taken(clip, 4, start=2, fps=4) == [2, 4, 6, 8]
    assert _taken(clip, 5, start=20, fps=16) == [20, 21, 21, 22, 22]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("few_keys.mkv", ["-c:v", "libx264", "-bf", "8", "-g", "250"]),
        ("many_keys.mp4", ["-c:v", "libx264", "-x264-params", "open-gop=1:keyint=6"]),
        ("no_times.avi", ["-c:v", "mpeg4", "-bf", "2", "-q:v", "2"]),
        ("hevc.mp4", ["-vf", "scale=4*iw:-1", "-c:v", "libx265", "-x265-params", HEVC]),
        ("late.mkv", ["-c", "copy", "-output_ts_offset", "3"]),
    ],
)
def test_every_start_gives_its_frame(clip: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    """decord's own seek gives other frames of the avi and of hevc, without an error."""
    ffmpeg("-i", clip, *options, tmp_path / name)
    assert probe(tmp_path / name).frames == 25
    assert [_taken(tmp_path / name, 1, start=start) for start in range(0, 25, 4)] == [[n] for n in range(0, 25, 4)]


def test_frames_hidden_before_a_cut_are_not_there(clip: Path, tmp_path: Path) -> None:
    """A clip cut without being encoded anew keeps frames up to the last key frame; decord counts them and repeats the
    last one in their place."""
    ffmpeg("-ss", "0.9", "-i", clip, "-c", "copy", tmp_path / "cut.mp4")
    assert len(decord.VideoReader(str(tmp_path / "cut.mp4"))) == 25
    shown = probe(tmp_path / "cut.mp4").frames
    assert shown < 25
    assert _taken(tmp_path / "cut.mp4", shown) == list(range(25 - shown, 25))
    assert _taken(tmp_path / "cut.mp4", 2, start=shown - 2) == [23, 24]


def test_frames_that_decord_repeats_are_an_error(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ffmpeg("-ss", "0.9", "-i", clip, "-c", "copy", tmp_path / "cut.mp4")
    monkeypatch.setattr(decode, "_UNKNOWN_TIME", 0.0)  # count the hidden frames, as decord does
    with pytest.raises(ClipError, match="it cannot be decoded to its end"):
        probe(tmp_path / "cut.mp4")


def test_odd_sizes_and_rotation(clip: Path, tmp_path: Path) -> None:
    ffmpeg("-i", clip, "-vf", "format=yuv444p,crop=35:19", "-c:v", "ffv1", tmp_path / "odd.mkv")
    assert probe(tmp_path / "odd.mkv") == Probe(frames=25, fps=8.0, height=19, width=35)
    assert _taken(tmp_path / "odd.mkv", 25) == list(range(25))
    ffmpeg("-display_rotation", "90", "-i", clip, "-c", "copy", tmp_path / "turned.mp4")
    assert probe(tmp_path / "turned.mp4") == Probe(frames=25, fps=8.0, height=36, width=20)


def _broken(clip: Path, folder: Path) -> dict[str, str]:
    content = clip.read_bytes()
    (folder / "text.mp4").write_text("not a video\n" * 50)
    (folder / "empty.mp4").touch()
    (folder / "cut_off.mp4").write_bytes(content[: len(content) // 2])
    (folder / "folder.mp4").mkdir()
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", folder / "sound.mp4")
    damage(clip, folder / "damaged.mp4")
    unopened, missing = "decord cannot open it: cut off, damaged, no video", "no such file"
    return {
        "text.mp4": unopened,
        "empty.mp4": "the file is empty",
        "cut_off.mp4": unopened,
        "folder.mp4": missing,
        "none.mp4": missing,
        "sound.mp4": unopened,
        "damaged.mp4": "it cannot be decoded to its end: damaged",
    }


def test_broken_files_are_named_with_a_reason(clip: Path, tmp_path: Path) -> None:
    for name, reason in _broken(clip, tmp_path).items():
        with pytest.raises(ClipError) as caught:
            probe(tmp_path / name)
        assert caught.value.reason.startswith(reason)
        assert str(caught.value) == f"{tmp_path / name}: {caught.value.reason}"


def test_damage_behind_the_first_frames_is_always_found(clip: Path, tmp_path: Path) -> None:
    """decord reads ahead in a thread: whoever takes the first frames only, meets the damage by chance."""
    damaged = damage(clip, tmp_path / "damaged.mp4")
    for _ in range(30):
        with pytest.raises(ClipError, match="it cannot be decoded to its end"):
            probe(damaged)


def test_a_clip_too_short_is_refused(clip: Path) -> None:
    with pytest.raises(ClipError, match="too short: frame 25 is needed, it has 25"):
        _taken(clip, 6, start=20)
    with pytest.raises(ValueError, match="start must be >= 0"):
        _taken(clip, 6, start=-1)
    buckets = [Bucket(frames=26, height=8, width=8), Bucket(frames=40, height=8, width=8)]
    with pytest.raises(ClipError, match="too short: 25 frames, the shortest bucket needs 26"):
        bucket_for(clip, buckets)
    fits = Bucket(frames=26, height=8, width=8, fps=16)
    assert bucket_for(clip, [*buckets, fits]) == (fits, probe(clip))


def test_what_decord_hands_out_elsewhere_does_not_matter(clip: Path) -> None:
    with decord.bridge.use_torch():
        assert _taken(clip, 25) == list(range(25))
    assert not isinstance(decord.VideoReader(str(clip)).next(), torch.Tensor)


def test_without_decord_the_extra_is_named(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ImportError, match=r"vsparse\[train\]"):
        probe(clip)
