"""The cache: latents of clips and embeddings of captions, encoded once and read back in any order."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsparse.measure.video import check_folder
from vsparse.optional import require
from vsparse.training.data.buckets import Bucket, check_buckets, fit_frames
from vsparse.training.data.clips import Clip, Problem
from vsparse.training.data.decode import ClipError, bucket_for, read_clip
from vsparse.training.files import PARTIAL, clear_partial, whole_file

__all__ = ["LatentCache", "Sample", "build_cache"]

FORMAT = 1
_SETUP, _INDEX = "cache.json", "index.json"  # what it was made with, from the start; what it holds, at the end
_LATENTS, _TEXT, _SUFFIX = "latents", "text", ".safetensors"

EncodeVideo = Callable[[Tensor], Tensor]
EncodeText = Callable[[list[str]], Mapping[str, Tensor]]
Progress = Callable[[str, int, int], None]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One clip of a cache.

    Args:
        latents: As ``encode_video`` gave them, without the batch axis. text: as ``encode_text`` gave it, by name,
            without the batch axis. caption: what ``text`` encodes.
    """

    latents: Tensor
    text: Mapping[str, Tensor]
    caption: str

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the latents; samples of equal grids fit into one batch."""
        return tuple(self.latents.shape)


def build_cache(
    folder: str | os.PathLike[str],
    clips: Sequence[Clip],
    buckets: Sequence[Bucket],
    *,
    encode_video: EncodeVideo,
    encode_text: EncodeText,
    identity: Mapping[str, Any],
    progress: Progress | None = None,
) -> LatentCache:
    """Encode what the folder does not hold yet, then write its index.

    Every clip starts at its first frame. Clips and captions are encoded one at a time: nothing depends on what came
    before, so a run that was killed and started again leaves the same bytes as one that was not. All clips come before
    all captions, so that two large encoders need not share the memory. One process at a time may build a folder.

    Args:
        folder: Made if need be. clips: what to encode; a file counts as known while its name, size and time of change
            are the same. buckets: sizes to choose from.
        encode_video: float32 ``[1, 3, F, H, W]`` in [-1, 1], on the CPU, to latents ``[1, ...]``.
        encode_text: ``[caption]`` to tensors by name, first axis 1; names, shapes and dtypes equal for all captions
            (padded to a fixed length, with a mask).
        identity: What the encoders are, as JSON holds it: repository, revision, dtype, length of the text, ...
        progress: Told after each file: "clips" or "captions", how many of them are done, how many there are.

    Returns:
        The cache. Clips that are missing, damaged, too short, or whose latents are not finite are its ``problems``.

    Raises:
        ValueError: no clip is usable; the folder holds something else, or a cache made with other encoders or buckets,
            which is left as it is; an encoder breaks its contract. OSError: the disk is full; what was encoded stays.
        ImportError: decord or safetensors is missing.
    """
    buckets = check_buckets(buckets)
    if not clips:
        raise ValueError("cache: there are no clips to encode")
    setup = {"format": FORMAT, "identity": _as_json(identity), "buckets": [dc.asdict(bucket) for bucket in buckets]}
    root = _claim(check_folder(folder), setup)
    encoded, problems = _encode_clips(root, clips, buckets, encode_video, progress)
    if not encoded:
        listed = "; ".join(f"{problem.name}: {problem.reason}" for problem in problems[:4])
        raise ValueError(f"cache: none of {len(clips)} clips is usable ({listed})")
    _encode_captions(root, list(dict.fromkeys(clip.caption for clip, _ in encoded)), encode_text, progress)
    rows = [_row(root, clip, latents) for clip, latents in encoded]
    _write_json(root / _INDEX, {**setup, "clips": rows, "problems": [dc.asdict(problem) for problem in problems]})
    return LatentCache(root)


class LatentCache:
    """A finished cache, read from its folder.

    Attributes:
        groups: For each sample a number that samples with latents of one shape share. captions, names: of each sample.
        problems: clips that were left out. buckets: what clips were brought to. identity: of the encoders.

    Args:
        folder: What `build_cache` has filled.

    Raises:
        ValueError: no cache, not finished, of another format, or with files missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._root = Path(folder)
        if not (self._root / _INDEX).is_file():
            state = "not finished; build it again" if (self._root / _SETUP).is_file() else "no cache"
            raise ValueError(f"cache: {folder} is {state}")
        index = _read_json(self._root / _INDEX)
        if index.get("format") != FORMAT:
            raise ValueError(f"cache: {folder} has format {index.get('format')!r}, this version reads {FORMAT}")
        self._rows: list[dict[str, Any]] = index["clips"]
        for part in (_LATENTS, _TEXT):
            missing = {row[part] for row in self._rows} - set(os.listdir(self._root / part))
            if missing:
                raise ValueError(f"cache: {folder} lacks {len(missing)} files such as {part}/{min(missing)}")
        numbers: dict[tuple[int, ...], int] = {}
        self.groups = tuple(numbers.setdefault(tuple(row["shape"]), len(numbers)) for row in self._rows)
        self.captions = tuple(str(row["caption"]) for row in self._rows)
        self.names = tuple(str(row["name"]) for row in self._rows)
        self.problems = tuple(Problem(**row) for row in index["problems"])
        self.buckets = tuple(Bucket(**row) for row in index["buckets"])
        self.identity: Mapping[str, Any] = index["identity"]

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            IndexError: there is no such sample. ValueError: a file is damaged.
        """
        row = self._rows[index]
        latents = _load(self._root / _LATENTS / row["latents"])["latents"]
        return Sample(latents=latents, text=_load(self._root / _TEXT / row["text"]), caption=row["caption"])


def _claim(root: Path, setup: Mapping[str, Any]) -> Path:
    """Make an empty folder a cache, or check that it is one of the same setup; clear what a killed run has left."""
    if (root / _SETUP).is_file():
        held = _read_json(root / _SETUP)
        differing = [name for name in setup if held.get(name) != setup[name]]
        if differing:
            listed = "; ".join(f"{name} {held.get(name)} there, {setup[name]} asked for" for name in differing)
            raise ValueError(f"cache: {root} was made differently ({listed}); choose another folder or remove this one")
    elif any(not path.name.startswith(PARTIAL) for path in root.iterdir()):
        raise ValueError(f"cache: {root} is not empty and holds no cache; choose another folder")
    else:
        clear_partial(root)
        _write_json(root / _SETUP, setup)
    for folder in (root, root / _LATENTS, root / _TEXT):
        folder.mkdir(exist_ok=True)
        clear_partial(folder)
    return root


def _encode_clips(
    root: Path, clips: Sequence[Clip], buckets: Sequence[Bucket], encode: EncodeVideo, progress: Progress | None
) -> tuple[list[tuple[Clip, str]], list[Problem]]:
    """Usable clips with the names of their files, and what went wrong with the others."""
    held = {name.partition("-")[0]: name for name in sorted(os.listdir(root / _LATENTS))}
    encoded: list[tuple[Clip, str]] = []
    problems: list[Problem] = []
    for done, clip in enumerate(clips, 1):
        try:
            key = _clip_key(clip)
            if key not in held:
                bucket, latents = _encode_clip(clip, buckets, encode)
                name = f"{key}-{buckets.index(bucket)}{_SUFFIX}"
                _save(root / _LATENTS / name, {"latents": latents})
                held[key] = name
            encoded.append((clip, held[key]))
        except ClipError as error:
            problems.append(Problem(name=clip.name, reason=error.reason))
        if progress is not None:
            progress("clips", done, len(clips))
    return encoded, problems


def _clip_key(clip: Clip) -> str:
    try:
        status = clip.path.stat()
    except OSError as error:
        raise ClipError(clip.path, "no such file") from error
    return _digest([clip.name, status.st_size, status.st_mtime_ns])


def _encode_clip(clip: Clip, buckets: Sequence[Bucket], encode: EncodeVideo) -> tuple[Bucket, Tensor]:
    bucket, _ = bucket_for(clip.path, buckets)
    video = fit_frames(read_clip(clip.path, bucket, start=0), bucket)
    with torch.no_grad():
        latents = encode(video[None])
    if not isinstance(latents, Tensor) or latents.dim() < 2 or latents.shape[0] != 1:
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"cache: encode_video must give a tensor [1, ...] for one video, got {shape}")
    if not bool(latents.isfinite().all()):
        raise ClipError(clip.path, "its latents are not finite")
    return bucket, latents[0]


def _encode_captions(root: Path, captions: Sequence[str], encode: EncodeText, progress: Progress | None) -> None:
    """Encode what is missing. What is there fits together already, so one file of it stands for all."""
    held = set(os.listdir(root / _TEXT))
    expected = _signature(_load(root / _TEXT / min(held))) if held else None
    for done, caption in enumerate(captions, 1):
        name = _text_name(caption)
        if name not in held:
            text = _encode_caption(caption, encode)
            found = _signature(text)
            if found != (expected := expected or found):
                raise ValueError(
                    f"cache: encode_text gave {found} for {caption!r} and {expected} before; every caption needs the "
                    "same names, dtypes and shapes: pad to a fixed length, and return a mask"
                )
            _save(root / _TEXT / name, text)
        if progress is not None:
            progress("captions", done, len(captions))


def _encode_caption(caption: str, encode: EncodeText) -> dict[str, Tensor]:
    with torch.no_grad():
        text = encode([caption])
    for name, x in text.items():
        if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[0] != 1:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"cache: encode_text must give tensors [1, ...] for one caption, got {name!r}: {shape}")
    return {name: x[0] for name, x in text.items()}


def _signature(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(x.dtype), tuple(x.shape)) for name, x in sorted(tensors.items())}


def _row(root: Path, clip: Clip, latents: str) -> dict[str, Any]:
    """What the index says of one clip."""
    path = root / _LATENTS / latents
    with _damage_in_words(path), require("safetensors", "diffusers").safe_open(path, "pt") as file:
        shape = file.get_slice("latents").get_shape()
    bucket = int(latents.removesuffix(_SUFFIX).partition("-")[2])
    row = {"name": clip.name, "caption": clip.caption, "bucket": bucket, "shape": shape}
    return {**row, _LATENTS: latents, _TEXT: _text_name(clip.caption)}


def _text_name(caption: str) -> str:
    return f"{_digest(caption)}{_SUFFIX}"


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _as_json(identity: Mapping[str, Any]) -> Any:
    """The identity as JSON gives it back."""
    try:
        return json.loads(json.dumps(dict(identity), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ValueError(f"cache: identity must be what JSON can hold, got {identity!r}: {error}") from error


def _write_json(path: Path, content: Any) -> None:
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"cache: {path} is damaged: {error}") from error


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Not its save_file: that writes under a temporary name of its own, which a killed run would leave behind.
    serialised = require("safetensors.torch", "diffusers").save
    # Copies: tensors that share their memory are refused.
    whole = {name: x.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    with whole_file(path) as scratch:
        scratch.write_bytes(serialised(whole))


def _load(path: Path) -> dict[str, Tensor]:
    with _damage_in_words(path):
        return dict(require("safetensors.torch", "diffusers").load_file(path))


@contextlib.contextmanager
def _damage_in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except (require("safetensors", "diffusers").SafetensorError, OSError) as error:
        raise ValueError(f"cache: {path} is damaged ({error}); remove it and build the cache again") from error
