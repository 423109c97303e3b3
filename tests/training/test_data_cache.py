"""The cache holds what the encoders gave, whole, once, and the same bytes whatever happened on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import damage, write_numbered
from torch import Tensor

import vsparse
from vsparse.training import files
from vsparse.training.data.buckets import Bucket, fit_frames
from vsparse.training.data.cache import LatentCache, build_cache
from vsparse.training.data.clips import Clip, find_clips
from vsparse.training.data.decode import read_clip

pytest.importorskip("decord", reason="decord has no wheel for this machine")

WIDE, TALL = Bucket(frames=5, height=8, width=16), Bucket(frames=3, height=16, width=8)
BUCKETS = (WIDE, TALL)
IDENTITY = {"vae": "tiny", "text": {"length": 4}}


class Encoders:
    """Encoders that remember what they were given."""

    def __init__(self) -> None:
        self.videos = 0
        self.captions: list[str] = []

    def video(self, video: Tensor) -> Tensor:
        self.videos += 1
        return video[:, :, ::2, ::4, ::4].to(torch.bfloat16)

    def text(self, captions: list[str]) -> dict[str, Tensor]:
        self.captions += captions
        codes = torch.tensor([[float(ord(c)) for c in caption.ljust(4)[:4]] for caption in captions])
        return {"embeds": codes[..., None], "mask": codes != ord(" ")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three wide clips, two tall ones, and three that cannot be used; two clips share a caption."""
    folder = tmp_path_factory.mktemp("clips")
    wide = write_numbered(folder / "a.mp4", 9, height=8, width=16)
    tall = write_numbered(folder / "in" / "t.mp4", 5, height=32, width=16)
    for name in ("b.mp4", "c.mp4"):
        shutil.copy(wide, folder / name)
    shutil.copy(tall, folder / "u.mp4")
    write_numbered(folder / "short.mp4", 2)
    damage(write_numbered(folder / "v.mp4", 25), folder / "damaged.mp4")
    (folder / "v.mp4").unlink()
    (folder / "text.mp4").write_text("no video")
    captions = {"a": "one", "b": "two", "c": "one", "in/t": "four", "u": "five"}
    for name in ("a", "b", "c", "in/t", "u", "short", "damaged", "text"):
        (folder / f"{name}.txt").write_text(captions.get(name, name))
    return folder


def _build(folder: Path, source: Path, **changes: Any) -> tuple[LatentCache, Encoders]:
    encoders = Encoders()
    given = {"encode_video": encoders.video, "encode_text": encoders.text, "identity": IDENTITY} | changes
    buckets = given.pop("buckets", BUCKETS)
    return build_cache(folder, given.pop("clips", find_clips(source).clips), buckets, **given), encoders


def _content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that was built in one go."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    _build(folder, source)
    return folder


def test_what_was_encoded_comes_back(source: Path, whole: Path) -> None:
    cache, clips = LatentCache(whole), {clip.name: clip for clip in find_clips(source).clips}
    assert cache.names == ("a.mp4", "b.mp4", "c.mp4", "in/t.mp4", "u.mp4")
    assert cache.groups == (0, 0, 0, 1, 1)
    assert (cache.buckets, cache.identity) == (BUCKETS, IDENTITY)
    assert len(cache) == 5
    for i, name in enumerate(cache.names):
        sample, bucket = cache.sample(i), BUCKETS[cache.groups[i]]
        video = fit_frames(read_clip(clips[name].path, bucket, start=0), bucket)
        assert torch.equal(sample.latents, Encoders().video(video[None])[0])
        text = Encoders().text([clips[name].caption])
        assert sample.text.keys() == text.keys()
        assert all(torch.equal(sample.text[key], text[key][0]) for key in text)
        assert (sample.caption, cache.captions[i]) == (clips[name].caption,) * 2
        assert sample.grid == tuple(sample.latents.shape)
    with pytest.raises(IndexError):
        cache.sample(5)


def test_unusable_clips_are_listed_with_their_reasons(whole: Path) -> None:
    reasons = {problem.name: problem.reason for problem in LatentCache(whole).problems}
    assert list(reasons) == ["damaged.mp4", "short.mp4", "text.mp4"]
    assert reasons["damaged.mp4"] == "it cannot be decoded to its end: damaged"
    assert reasons["short.mp4"] == "too short: 2 frames, the shortest bucket needs 3"
    assert reasons["text.mp4"].startswith("decord cannot open it")


def test_latents_that_are_not_finite_and_missing_files_are_listed(source: Path, tmp_path: Path) -> None:
    clips = [*find_clips(source).clips[:1], Clip(path=source / "gone.mp4", name="gone.mp4", caption="x")]
    clips += [clip for clip in find_clips(source).clips if clip.name == "in/t.mp4"]
    cache, _ = _build(tmp_path, source, clips=clips, encode_video=lambda x: x / (x.shape[-1] - 8))
    assert [(x.name, x.reason) for x in cache.problems] == [
        ("gone.mp4", "no such file"),
        ("in/t.mp4", "its latents are not finite"),
    ]
    assert cache.names == ("a.mp4",)


def test_a_second_run_encodes_what_is_missing(source: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    _, encoders = _build(tmp_path / "cache", source)
    assert (encoders.videos, encoders.captions) == (0, [])
    index = json.loads((whole / "index.json").read_text())
    for part in ("latents", "text"):
        (tmp_path / "cache" / part / index["clips"][1][part]).unlink()
        (tmp_path / "cache" / part / f"{files.PARTIAL}left").write_bytes(b"half")
    (tmp_path / "cache" / f"{files.PARTIAL}left").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"lacks 1 files such as latents/"):
        LatentCache(tmp_path / "cache")
    _, encoders = _build(tmp_path / "cache", source)
    assert (encoders.videos, encoders.captions) == (1, ["two"])
    assert _content(tmp_path / "cache") == _content(whole)


def test_a_clip_that_changed_is_encoded_again(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "a.mp4", tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("one")
    assert _build(tmp_path / "cache", tmp_path)[1].videos == 1
    os.utime(tmp_path / "a.mp4", ns=(1, 1))
    assert _build(tmp_path / "cache", tmp_path)[1].videos == 1
    assert _build(tmp_path / "cache", tmp_path)[1].videos == 0


def test_progress_is_told(source: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    _build(tmp_path, source, progress=lambda *what: told.append(what))
    assert told == [("clips", i + 1, 8) for i in range(8)] + [("captions", i + 1, 4) for i in range(4)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identity": IDENTITY | {"vae": "other"}}, r"made differently \(identity .*'tiny'.*'other'"),
        ({"buckets": (WIDE,)}, r"made differently \(buckets"),
        ({"identity": {"dtype": torch.float32}}, "identity must be what JSON can hold"),
        ({"buckets": ()}, "at least one"),
        ({"clips": []}, "no clips to encode"),
    ],
)
def test_another_cache_is_refused_and_left_alone(
    source: Path, whole: Path, change: Mapping[str, Any], words: str
) -> None:
    before = _content(whole)
    with pytest.raises(ValueError, match=words):
        _build(whole, source, **change)
    assert _content(whole) == before


def test_a_folder_of_something_else_is_refused_and_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("draft")
    (tmp_path / f"{files.PARTIAL}mine").write_text("?")
    with pytest.raises(ValueError, match="is not empty and holds no cache"):
        _build(tmp_path, source)
    assert _content(tmp_path) == {"thesis.tex": b"draft", f"{files.PARTIAL}mine": b"?"}


def test_no_usable_clip_is_an_error(source: Path, tmp_path: Path) -> None:
    clips = [clip for clip in find_clips(source).clips if clip.name in ("text.mp4", "short.mp4")]
    with pytest.raises(ValueError, match=r"none of 2 clips is usable \(short.mp4: too short.*text.mp4: decord cannot"):
        _build(tmp_path, source, clips=clips)
    with pytest.raises(ValueError, match="not finished; build it again"):
        LatentCache(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"encode_video": lambda x: x[0]},
            r"must give a tensor \[1, ...\] for one video, got \(3, 5, 8, 16\)",
        ),
        ({"encode_video": lambda x: None}, "got NoneType"),
        ({"encode_text": lambda c: {"embeds": torch.zeros(2)}}, r"must give tensors \[1, ...\].*'embeds': \(2,\)"),
        ({"encode_text": lambda c: {"embeds": torch.zeros(1, len(c[0]))}}, "pad to a fixed length, and return a mask"),
        ({"encode_text": lambda c: {c[0]: torch.zeros(1)}}, "the same names, dtypes and shapes"),
    ],
)
def test_encoders_that_break_their_contract_are_refused(
    source: Path, tmp_path: Path, change: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        _build(tmp_path, source, **change)


def test_texts_of_another_length_are_refused_after_a_restart_too(source: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    index = json.loads((whole / "index.json").read_text())
    (tmp_path / "cache" / "text" / index["clips"][0]["text"]).unlink()
    with pytest.raises(ValueError, match="pad to a fixed length"):
        _build(tmp_path / "cache", source, encode_text=lambda c: {"embeds": torch.zeros(1, 9)})
    _build(tmp_path / "cache", source)
    assert _content(tmp_path / "cache") == _content(whole)


def test_tensors_that_share_their_memory_are_stored(source: Path, tmp_path: Path) -> None:
    def text(captions: list[str]) -> dict[str, Tensor]:
        both = torch.arange(6.0).reshape(1, 6)
        return {"all": both, "same": both, "half": both[:, ::2]}

    sample = _build(tmp_path, source, encode_text=text)[0].sample(0)
    assert sample.text["all"].tolist() == sample.text["same"].tolist() == [0, 1, 2, 3, 4, 5]
    assert sample.text["half"].tolist() == [0, 2, 4]


@pytest.mark.parametrize("turn", range(3))
def test_a_full_disk_leaves_no_half_file(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """The disk is full when the first, the fourth, or the last file is written."""
    room = [0, 3, len(_content(whole)) - 1][turn]
    sync, calls = os.fsync, iter(range(100))

    def full(handle: int) -> None:
        if next(calls) >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="the disk is full") as caught:
            _build(tmp_path / "cache", source)
    assert caught.value.errno == errno.ENOSPC
    kept = _content(tmp_path / "cache")
    assert len(kept) == room
    assert kept.items() <= _content(whole).items()
    _build(tmp_path / "cache", source)
    assert _content(tmp_path / "cache") == _content(whole)


def test_damage_of_the_cache_is_named(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no cache"):
        LatentCache(tmp_path)
    shutil.copytree(whole, tmp_path / "cache")
    index = json.loads((whole / "index.json").read_text())
    file = tmp_path / "cache" / "latents" / index["clips"][0]["latents"]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        LatentCache(tmp_path / "cache").sample(0)
    (tmp_path / "cache" / "index.json").write_text(json.dumps(index | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        LatentCache(tmp_path / "cache")
    (tmp_path / "cache" / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        LatentCache(tmp_path / "cache")


KILLED = """
import os, random, signal, sys, time
from pathlib import Path

import decord, safetensors.torch, torch

sys.path.insert(0, sys.argv[1])
from test_data_cache import BUCKETS, IDENTITY, Encoders, find_clips, build_cache

source, folder = Path(sys.argv[2]), Path(sys.argv[3])
kills, clock = 0, random.Random(0)
while True:
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        encoders, sync = Encoders(), os.fsync
        def slow(encode):
            return lambda given: (time.sleep(0.02), encode(given))[1]
        def slow_sync(handle):
            time.sleep(0.02)
            sync(handle)
        os.fsync = slow_sync
        clips = find_clips(source).clips
        given = {"encode_video": slow(encoders.video), "encode_text": slow(encoders.text), "identity": IDENTITY}
        build_cache(folder, clips, BUCKETS, **given)
        os._exit(0)
    time.sleep(clock.uniform(0.01, 0.15) * 1.1**kills)  # longer and longer, so that a slow machine ends, too
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0
        break
    kills += 1
print(kills)
"""


def test_a_run_that_is_killed_and_resumed_leaves_the_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    paths = [str(Path(vsparse.__file__).parents[1]), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(source), str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    assert _content(tmp_path / "cache") == _content(whole)
