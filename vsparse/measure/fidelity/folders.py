"""Two folders of videos, paired by file name and compared without any model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vsparse.measure.demo import environment
from vsparse.measure.fidelity.distance import distance, seen_in
from vsparse.measure.fidelity.result import Fidelity, Kind, Outcome, Run
from vsparse.measure.fidelity.vbench import Wanted, prompt_of
from vsparse.measure.paired import Clip
from vsparse.training.data.decode import ClipError, read_all

__all__ = ["compared"]

_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi"})
_NO_LATENTS = "videos on disk have no latents"


def compared(
    dense: str | os.PathLike[str],
    sparse: str | os.PathLike[str],
    *,
    floor: str | os.PathLike[str] | None = None,
    told: Callable[[str, int, int], None] = lambda *_: None,
) -> Fidelity:
    """Compare videos of the same names.

    Args:
        dense, sparse: Folders. floor: a third one, made dense by another exact kernel; None: there is no floor.
        told: which file is read, how many are over, how many there are.

    Returns:
        Whatever is in the figures, and by file why others are not: without a twin, not to be decoded, of another size.

    Raises:
        ValueError: a folder that is none, or one without videos, or no pair that can be compared. ImportError: decord
            is missing.
    """
    folders: list[tuple[Kind, Path]] = [("dense", Path(dense)), ("sparse", Path(sparse))]
    if floor is not None:
        folders.append(("floor", Path(floor)))
    held = {kind: _videos(path) for kind, path in folders}
    names = sorted({name for one in held.values() for name in one})
    lost: dict[str, str] = {}
    outcomes: dict[Kind, dict[str, Outcome]] = {kind: {} for kind in held}
    for i, name in enumerate(names):
        told(name, i, len(names))
        if name not in held["dense"]:
            for kind in held:
                if name in held[kind]:
                    lost[str(held[kind][name])] = f"no video of this name in {dense}"
            continue
        _pair(name, held, outcomes, lost)
    told("", len(names), len(names))
    kept = [name for name in names if name in outcomes["sparse"]]
    if not kept:
        reasons = "; ".join(f"{path}: {why}" for path, why in lost.items())
        raise ValueError(f"no video of {sparse} can be compared with one of {dense}: {reasons}")
    # A dense video without a sparse twin is in no figure, the floor's among them: all are of the same clips.
    runs = [
        Run(
            name=kind,
            kind=kind,
            words=str(path),
            outcomes={name: one for name, one in outcomes[kind].items() if name in kept},
            videos={name: held[kind][name] for name in outcomes[kind] if name in kept},
        )
        for kind, path in folders
    ]
    clips = [Wanted(name=name, prompt=prompt_of(Path(name).stem)) for name in kept]
    notes = ["Frames are those of the files, after their codec; densities and latents are not known."]
    return Fidelity(
        source=f"{sparse} against {dense}",
        asked={},
        clips=clips,
        runs=runs,
        lost=lost,
        notes=notes,
        environment=environment(),
    )


def _videos(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder of videos")
    found = {path.name: path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES}
    if not found:
        raise ValueError(f"{str(folder)!r} holds no video ({', '.join(sorted(_SUFFIXES))})")
    return found


def _pair(
    name: str, held: dict[Kind, dict[str, Path]], outcomes: dict[Kind, dict[str, Outcome]], lost: dict[str, str]
) -> None:
    """Measure what has this name against the dense one; note what cannot be."""
    others = [kind for kind in held if kind != "dense" and name in held[kind]]
    if "sparse" not in others:
        lost[str(held["dense"][name])] = "no sparse video of this name"
    reference = _read(held["dense"][name], lost)
    if reference is None:
        lost.update({str(held[kind][name]): "its dense twin cannot be decoded" for kind in others})
        return
    prompt = prompt_of(Path(name).stem)
    outcomes["dense"][name] = Outcome(seen=seen_in(reference.frames, prompt))
    for kind in others:
        clip = _read(held[kind][name], lost)
        if clip is None:
            continue
        try:
            found = distance(clip, reference)
        except ValueError as error:
            lost[str(held[kind][name])] = str(error)
            continue
        outcomes[kind][name] = Outcome(distance=found, seen=seen_in(clip.frames, prompt))


def _read(path: Path, lost: dict[str, str]) -> Clip | None:
    try:
        return Clip(frames=read_all(path).float() / 255, without_latents=_NO_LATENTS)
    except ClipError as error:
        lost[str(path)] = error.reason
        return None
