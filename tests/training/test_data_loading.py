"""Batches come in the plan's order, whoever reads them and whatever breaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from clip_files import damage, numbers, write_numbered
from torch import Tensor

from vsparse.training.data.batches import BatchPlan
from vsparse.training.data.buckets import Bucket
from vsparse.training.data.cache import LatentCache, build_cache
from vsparse.training.data.clips import Clip, Found, find_clips
from vsparse.training.data.loading import Batch, Stream, loader

pytest.importorskip("decord", reason="decord has no wheel for this machine")

BUCKETS = (Bucket(frames=5, height=8, width=16), Bucket(frames=3, height=16, width=8))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Five wide clips and three tall ones; captions are their names."""
    folder = tmp_path_factory.mktemp("clips")
    wide = write_numbered(folder / "w0.mp4", 25, height=8, width=16)
    tall = write_numbered(folder / "t0.mp4", 25, height=32, width=16)
    for i in range(1, 5):
        shutil.copy(wide, folder / f"w{i}.mp4")
    for i in range(1, 3):
        shutil.copy(tall, folder / f"t{i}.mp4")
    for path in folder.glob("*.mp4"):
        path.with_suffix(".txt").write_text(path.stem)
    return find_clips(folder)


@pytest.fixture(scope="module")
def cache(found: Found, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    def text(captions: list[str]) -> dict[str, Tensor]:
        return {"embeds": torch.tensor([[float(ord(c)) for c in caption] for caption in captions])}

    folder = tmp_path_factory.mktemp("cache")
    names = {"encode_video": lambda x: x[:, :, ::2, ::4, ::4].clone(), "encode_text": text, "identity": {}}
    return build_cache(folder, found.clips, BUCKETS, **names)


def _fields(batch: Batch) -> tuple[object, ...]:
    """What can be compared: tensors as their bytes."""
    tensors = [batch.latents, batch.pixels, *(batch.text or {}).values()]
    content = [None if x is None else (tuple(x.shape), x.contiguous().numpy().tobytes()) for x in tensors]
    return (*content, batch.captions, batch.indices, batch.problems)


def _all(*arguments: object, **options: object) -> list[tuple[object, ...]]:
    return [_fields(batch) for batch in loader(*arguments, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["cache", "stream"])
def test_batches_are_those_of_the_plan_whoever_reads_them(found: Found, cache: LatentCache, kind: str) -> None:
    """The stream was opened in this process, and the workers are forked from it: decord must not mind."""
    dataset = cache if kind == "cache" else Stream(found.clips, BUCKETS, seed=3)
    plan = BatchPlan(groups=dataset.groups, batch_size=2, world_size=2, accumulate=2, seed=1)
    for rank in range(2):
        state = torch.random.get_rng_state()
        alone = _all(dataset, plan, steps=3, rank=rank)
        assert torch.equal(torch.random.get_rng_state(), state)
        slots = [(step, micro) for step in range(3) for micro in range(2)]
        assert [batch[-2] for batch in alone] == [plan.indices(*slot, rank) for slot in slots]
        resumed = loader(dataset, plan, first_step=1, steps=2, rank=rank, workers=2)
        assert [_fields(batch) for batch in resumed] == alone[2:]
        assert [_fields(batch) for batch in resumed] == alone[2:], "a second pass begins where the first did"


def test_a_batch_of_a_cache_holds_its_samples(cache: LatentCache) -> None:
    plan = BatchPlan(groups=cache.groups, batch_size=4)
    for batch in loader(cache, plan, steps=4):
        samples = [cache.sample(i) for i in batch.indices]
        assert torch.equal(batch.latents, torch.stack([sample.latents for sample in samples]))
        assert torch.equal(batch.text["embeds"], torch.stack([sample.text["embeds"] for sample in samples]))
        assert batch.captions == tuple(sample.caption for sample in samples)
        assert batch.pixels is None


def test_a_stream_starts_elsewhere_in_each_epoch_and_stays_inside(found: Found) -> None:
    stream = Stream(found.clips, BUCKETS, seed=3)
    assert stream.groups == (1, 1, 1, 0, 0, 0, 0, 0)
    plan = BatchPlan(groups=stream.groups, batch_size=1)
    starts = set()
    for step, batch in enumerate(loader(stream, plan, steps=6 * plan.batches)):
        (index,) = batch.indices
        bucket = BUCKETS[stream.groups[index]]
        assert batch.pixels.shape == (1, 3, bucket.frames, bucket.height, bucket.width)
        assert (batch.latents, batch.text, batch.captions) == (None, None, (stream.clips[index].caption,))
        shown = numbers(batch.pixels[0])
        assert shown == list(range(shown[0], shown[0] + bucket.frames))
        assert torch.equal(batch.pixels[0], stream.read(index, epoch=plan.place(step, 0, 0).epoch))
        starts.add((index, shown[0]))
    assert len(starts) > 4 * len(stream)
    exact = Stream(found.clips[:3], [Bucket(frames=25, height=16, width=8)], seed=0)
    assert numbers(exact.read(0, epoch=5)) == list(range(25))
    assert not torch.equal(stream.read(0, epoch=0), Stream(found.clips, BUCKETS, seed=4).read(0, epoch=0))


def test_unusable_clips_are_found_when_a_stream_is_opened(found: Found, tmp_path: Path) -> None:
    bad = [Clip(path=tmp_path / name, name=name, caption=name) for name in ("gone.mp4", "damaged.mp4")]
    damage(found.clips[0].path, tmp_path / "damaged.mp4")
    stream = Stream([*bad, *found.clips], BUCKETS, seed=0)
    assert stream.clips == found.clips
    assert [problem.name for problem in stream.problems] == ["gone.mp4", "damaged.mp4"]
    with pytest.raises(ValueError, match=r"none of 2 clips is usable \(gone.mp4: no such file; damaged.mp4: it cannot"):
        Stream(bad, BUCKETS, seed=0)
    for seed in (-1, 1.5):
        with pytest.raises(ValueError, match="seed must be an integer >= 0"):
            Stream(found.clips, BUCKETS, seed=seed)  # type: ignore[arg-type]


def test_a_clip_that_breaks_is_replaced_by_the_next_of_its_group_and_reported(found: Found, tmp_path: Path) -> None:
    clips = [Clip(path=tmp_path / clip.name, name=clip.name, caption=clip.caption) for clip in found.clips]
    for clip, original in zip(clips, found.clips, strict=True):
        shutil.copy(original.path, clip.path)
    stream = Stream(clips, BUCKETS, seed=0)
    plan = BatchPlan(groups=stream.groups, batch_size=2)
    sound = list(loader(stream, plan, steps=2 * plan.batches))
    broken = {0, 4}
    for i in broken:
        clips[i].path.write_text("broken since")
    batches = list(loader(stream, plan, steps=2 * plan.batches))
    assert [_fields(batch) for batch in loader(stream, plan, steps=2 * plan.batches, workers=2)] == [
        _fields(batch) for batch in batches
    ]
    for step, (before, batch) in enumerate(zip(sound, batches, strict=True)):
        place = plan.place(step, 0, 0)
        following = [plan.sample(place, i) for i in range(20)]
        assert list(batch.indices) == [i for i in following if i not in broken][:2]
        met = broken & set(before.indices)
        assert {problem.name for problem in batch.problems} >= {clips[i].name for i in met}
        assert {problem.name for problem in batch.problems} <= {clips[i].name for i in broken}
        if not met:
            assert _fields(batch) == _fields(before)
    for i in range(3):
        clips[i].path.unlink(missing_ok=True)
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"every clip of Bucket\(frames=3.*no such file"):
            list(loader(stream, plan, steps=plan.batches, workers=workers))


def test_texts_that_do_not_fit_together_are_refused(cache: LatentCache, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(cache._root, tmp_path / "cache")
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    save_file({"embeds": torch.zeros(9)}, tmp_path / "cache" / "text" / index["clips"][0]["text"])
    plan = BatchPlan(groups=cache.groups, batch_size=3)
    with pytest.raises(ValueError, match="nothing is padded by guess: encode to a fixed length, with a mask"):
        list(loader(LatentCache(tmp_path / "cache"), plan, steps=plan.batches))


def test_what_does_not_fit_is_refused_at_once(cache: LatentCache) -> None:
    plan = BatchPlan(groups=cache.groups, batch_size=2)
    for change in ({"steps": 0}, {"steps": 1, "first_step": -1}, {"steps": 1, "workers": True}):
        with pytest.raises(ValueError, match=r"loader: .* must be an integer >="):
            loader(cache, plan, **change)
    with pytest.raises(ValueError, match=r"rank in \[0, 1\)"):
        loader(cache, plan, steps=1, rank=1)
    with pytest.raises(ValueError, match="made for other samples"):
        loader(cache, BatchPlan(groups=[0], batch_size=2), steps=1)
