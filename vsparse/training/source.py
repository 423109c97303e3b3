"""From videos and captions to the batches of a run: encoded once into a cache, or in every step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsparse.host import TrainingHost
from vsparse.training.data.batches import BatchPlan
from vsparse.training.data.cache import LatentCache, build_cache
from vsparse.training.data.clips import find_clips
from vsparse.training.data.loading import Batch, Stream, loader
from vsparse.training.loop import video_of
from vsparse.training.settings import Settings
from vsparse.training.student import Student
from vsparse.training.task import Sample
from vsparse.training.validation import encoders_on, place_encoders

__all__ = ["Source", "open_source"]

Told = Callable[[str, int, int], None]


class Source:
    """Batches of a run.

    Attributes:
        problems: Clips that are left out. samples: how many there are.

    Args:
        dataset: A cache, or a stream with ``encode``, which turns pixels and captions into latents and text.
    """

    def __init__(
        self,
        dataset: LatentCache | Stream,
        settings: Settings,
        accelerator: Any,
        encode: Callable[[Batch], Sample] | None = None,
    ) -> None:
        self.problems, self.samples = dataset.problems, len(dataset)
        self._dataset, self._settings, self._encode = dataset, settings, encode or _cached
        self._rank, videos = video_of(accelerator, settings.train)
        self._plan = BatchPlan(
            groups=dataset.groups,
            batch_size=settings.data.batch,
            world_size=videos,
            accumulate=settings.train.accumulate,
            seed=settings.train.seed,
        )

    def __call__(self, first: int, last: int) -> Iterator[Sample]:
        """Micro-batches of this process from one step to before another."""
        if last <= first:
            return
        workers = self._settings.data.workers
        rows: Iterable[Batch] = loader(
            self._dataset, self._plan, first_step=first, steps=last - first, rank=self._rank, workers=workers
        )
        for batch in rows:
            yield self._encode(batch)


def open_source(
    student: Student, side: TrainingHost, settings: Settings, accelerator: Any, told: Told | None = None
) -> Source:
    """Find the clips and encode what is not encoded yet; the first process does it, the others wait.

    Raises:
        ValueError: no usable clip, sizes that the model cannot take, a cache of other encoders.
    """
    data = settings.data
    for bucket in data.buckets:
        side.check_size(bucket.frames, bucket.height, bucket.width)
    found = find_clips(data.source)
    if data.streaming:
        stream = Stream(found.clips, data.buckets, seed=settings.train.seed)
        stream.problems = (*found.problems, *stream.problems)
        return Source(stream, settings, accelerator, _Encoder(student, side, accelerator.device))
    folder = Path(data.cache or Path(settings.output) / "cache")
    if accelerator.is_main_process:
        with encoders_on(student, accelerator.device):
            build_cache(
                folder,
                found.clips,
                data.buckets,
                encode_video=side.encode_video,
                encode_text=side.encode_text,
                identity=_identity(student, settings),
                progress=told,
            )
    accelerator.wait_for_everyone()
    cache = LatentCache(folder)
    cache.problems = (*found.problems, *cache.problems)
    return Source(cache, settings, accelerator)


def _identity(student: Student, settings: Settings) -> dict[str, Any]:
    """What the encoders are: a cache of other ones must not be mixed in."""
    parts = {name: type(part).__name__ for name, part in student.pipe.components.items() if part is not None}
    vae = student.pipe.vae
    return {
        "pipeline": settings.model.path,
        "parts": {name: kind for name, kind in parts.items() if not name.startswith(("transformer", "scheduler"))},
        "vae": {"config": {k: v for k, v in vae.config.items() if not k.startswith("_")}, "dtype": str(vae.dtype)},
    }


def _cached(batch: Batch) -> Sample:
    assert batch.latents is not None
    assert batch.text is not None
    return Sample(latents=batch.latents, text=batch.text, name=_name(batch))


def _name(batch: Batch) -> str:
    rows = zip(batch.indices, batch.captions, strict=True)
    return "; ".join(f"sample {index} ({caption!r})" for index, caption in rows)


class _Encoder:
    """Encodes the batches of a stream; captions are remembered. The encoders stay on the device."""

    def __init__(self, student: Student, side: TrainingHost, device: torch.device) -> None:
        place_encoders(student, device)
        self._side, self._device = side, device
        self._text = functools.lru_cache(maxsize=1024)(self._one)

    def _one(self, caption: str) -> Mapping[str, Tensor]:
        return {name: x.cpu() for name, x in self._side.encode_text([caption]).items()}

    def __call__(self, batch: Batch) -> Sample:
        assert batch.pixels is not None
        latents = self._side.encode_video(batch.pixels.to(self._device))
        rows = [self._text(caption) for caption in batch.captions]
        text = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return Sample(latents=latents, text=text, name=_name(batch))
