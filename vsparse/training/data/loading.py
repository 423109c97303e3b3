"""Batches in the order of a plan, read or decoded by worker processes."""

from __future__ import annotations

import concurrent.futures
import dataclasses as dc
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vsparse.training.data.batches import BatchPlan, Place
from vsparse.training.data.buckets import Bucket, check_buckets, fit_frames, source_frames
from vsparse.training.data.cache import LatentCache
from vsparse.training.data.clips import Clip, Problem
from vsparse.training.data.decode import ClipError, Probe, bucket_for, read_clip
from vsparse.training.draws import Draws

__all__ = ["Batch", "Stream", "loader"]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Samples of equal size. From a cache ``latents`` and ``text``, from a stream ``pixels``; the others are None.

    Args:
        latents: ``[B, ...]`` in the dtype of the cache. pixels: float32 ``[B, 3, F, H, W]`` in [-1, 1].
        text: Tensors by name, first axis B. captions, indices: of each sample; ``indices`` count in the data set.
        problems: Clips that broke while the batch was made; others stand in their place.
    """

    latents: Tensor | None
    pixels: Tensor | None
    text: Mapping[str, Tensor] | None
    captions: tuple[str, ...]
    indices: tuple[int, ...]
    problems: tuple[Problem, ...] = ()


class Stream:
    """Clips that are decoded when they are needed, from a random first frame in each epoch.

    To know sizes, and that every clip is sound, all are decoded once here, in threads. That is minutes for thousands of
    clips, at every start; for more, or for many epochs, use a cache.

    Attributes:
        clips: Those that can be used. groups: for each of them the number of its bucket. problems: the others.

    Args:
        clips: What to choose from. buckets: sizes to bring them to. seed: of the first frames.

    Raises:
        ValueError: no clip is usable, or a seed below 0. ImportError: decord is missing.
    """

    def __init__(self, clips: Sequence[Clip], buckets: Sequence[Bucket], *, seed: int) -> None:
        self.buckets, self.seed = check_buckets(buckets), seed
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"stream: seed must be an integer >= 0, got {seed!r}")
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(self._look, clips))
        both = list(zip(clips, found, strict=True))
        usable = [(clip, *x) for clip, x in both if not isinstance(x, ClipError)]
        self.problems = tuple(Problem(name=clip.name, reason=x.reason) for clip, x in both if isinstance(x, ClipError))
        if not usable:
            listed = "; ".join(f"{problem.name}: {problem.reason}" for problem in self.problems[:4])
            raise ValueError(f"stream: none of {len(clips)} clips is usable ({listed})")
        self.clips = tuple(clip for clip, _, _ in usable)
        self.groups = tuple(self.buckets.index(bucket) for _, bucket, _ in usable)
        self._last_starts = tuple(
            probe.frames - 1 - source_frames(bucket, fps=probe.fps)[-1] for _, bucket, probe in usable
        )

    def __len__(self) -> int:
        return len(self.clips)

    def _look(self, clip: Clip) -> tuple[Bucket, Probe] | ClipError:
        try:
            return bucket_for(clip.path, self.buckets)
        except ClipError as error:
            return error

    def read(self, index: int, *, epoch: int) -> Tensor:
        """Decode one clip, float32 ``[3, F, H, W]`` in [-1, 1]; the first frame follows from seed, clip and epoch.

        Raises:
            ClipError: the clip cannot be read any more.
        """
        draws = Draws((self.seed, "start", index, epoch)).generator()
        start = int(torch.randint(self._last_starts[index] + 1, (), generator=draws))
        bucket = self.buckets[self.groups[index]]
        return fit_frames(read_clip(self.clips[index].path, bucket, start=start), bucket)


def loader(
    dataset: LatentCache | Stream, plan: BatchPlan, *, first_step: int = 0, steps: int, rank: int = 0, workers: int = 0
) -> DataLoader[Batch]:
    """Batches of one rank from ``first_step`` to before ``first_step + steps``, ``plan.accumulate`` for each step.

    What comes does not depend on ``workers``, and the global random generators are neither read nor moved. In a stream,
    a clip that broke since it was opened is replaced by the next of its group in the plan's order, and reported in the
    batch.

    Args:
        dataset: A cache or a stream. plan: made for its ``groups``. first_step, steps: counted from 0. rank: of this
            process. workers: processes that read ahead; 0: none, read when asked.

    Raises:
        ValueError: the plan was made for other groups, or a number is out of range. While it runs: a file of the cache
            is damaged, texts of one batch do not fit together, or every clip of a group is broken.
    """
    if tuple(plan.groups) != dataset.groups:
        raise ValueError("loader: the plan was made for other samples; make it with groups=dataset.groups")
    for name, value, low in (("first_step", first_step, 0), ("steps", steps, 1), ("workers", workers, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"loader: {name} must be an integer >= {low}, got {value!r}")
    plan.place(first_step, 0, rank)  # refuses a rank out of range
    numbers = range(first_step * plan.accumulate, (first_step + steps) * plan.accumulate)
    return DataLoader(
        _Batches(dataset, plan, rank),
        batch_size=None,  # an item is a batch
        sampler=numbers,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # its own, or each pass would draw from the global one
    )


def _as_it_is(batch: Any) -> Any:
    return batch


class _Batches(Dataset[Batch]):
    """The micro-batches of one rank, numbered through all steps."""

    def __init__(self, dataset: LatentCache | Stream, plan: BatchPlan, rank: int) -> None:
        self._dataset, self._plan, self._rank = dataset, plan, rank

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self._plan.accumulate)
        if isinstance(self._dataset, Stream):
            return _streamed(self._dataset, self._plan, self._plan.place(step, micro, self._rank))
        return _cached(self._dataset, self._plan.indices(step, micro, self._rank))


def _cached(cache: LatentCache, indices: tuple[int, ...]) -> Batch:
    samples = [cache.sample(i) for i in indices]
    text = {}
    for name, x in samples[0].text.items():
        for index, sample in zip(indices, samples, strict=True):
            shape = tuple(sample.text[name].shape) if name in sample.text else None
            if shape != x.shape:
                raise ValueError(
                    f"loader: text {name!r} is {tuple(x.shape)} in sample {indices[0]} and {shape} in sample {index}; "
                    "nothing is padded by guess: encode to a fixed length, with a mask"
                )
        text[name] = torch.stack([sample.text[name] for sample in samples])
    return Batch(
        latents=torch.stack([sample.latents for sample in samples]),
        pixels=None,
        text=text,
        captions=tuple(sample.caption for sample in samples),
        indices=indices,
    )


def _streamed(stream: Stream, plan: BatchPlan, place: Place) -> Batch:
    videos: list[Tensor] = []
    indices: list[int] = []
    problems: dict[int, Problem] = {}
    for offset in itertools.count():
        if len(videos) == plan.batch_size:
            break
        index = plan.sample(place, offset)
        if index in problems:
            continue
        try:
            videos.append(stream.read(index, epoch=place.epoch))
            indices.append(index)
        except ClipError as error:
            problems[index] = Problem(name=stream.clips[index].name, reason=error.reason)
            if len(problems) == plan.size(place.group):
                listed = "; ".join(f"{x.name}: {x.reason}" for x in list(problems.values())[:4])
                raise ValueError(f"loader: every clip of {stream.buckets[place.group]} is broken ({listed})") from error
    return Batch(
        latents=None,
        pixels=torch.stack(videos),
        text=None,
        captions=tuple(stream.clips[i].caption for i in indices),
        indices=tuple(indices),
        problems=tuple(problems.values()),
    )
