"""Clips that are asked for, and folders of videos as VBench and other judges read them.

videos/dense/a red circle moving right-0.mp4     one folder for each run, "<prompt>-<index>.mp4" in it
videos/adaspa/a red circle moving right-0.mp4
videos/prompts.json                              file name -> whole prompt, for VBench's ``--prompt_file``
"""

from __future__ import annotations

import dataclasses as dc
import json
import re
from collections.abc import Sequence
from pathlib import Path

from vsparse.measure.recall_report import as_json, write_text

__all__ = [
    "PROMPTS",
    "VIDEOS",
    "Wanted",
    "prompt_of",
    "read_prompts",
    "strays",
    "video",
    "wanted_clips",
    "write_prompts",
]

VIDEOS, PROMPTS = "videos", "prompts.json"
_LONGEST = 180  # bytes of a prompt in a file name; file systems allow 255 for all of it
_UNSAFE = re.compile(r"[/\\\x00-\x1f]")


@dc.dataclass(frozen=True, kw_only=True)
class Wanted:
    """One clip: ``name`` is the name of its files, without ".mp4"; no ``seed`` where it is not known."""

    name: str
    prompt: str
    seed: int | None = None


def wanted_clips(prompts: Sequence[str], *, seeds: int = 1, first: int = 0) -> list[Wanted]:
    """Each prompt with each seed.

    Args:
        prompts: Sentences, all different. seeds: how many for each prompt, at least 1. first: the first of them.

    Raises:
        ValueError: no prompts, an empty one, one twice, or fewer than one seed.
    """
    if not prompts or not all(text.strip() for text in prompts):
        raise ValueError(f"prompts must be one sentence or more, none of them empty, got {list(prompts)}")
    if len(set(prompts)) < len(prompts):
        twice = next(text for text in prompts if prompts.count(text) > 1)
        raise ValueError(f"prompts must differ, as the names of files come from them; given twice: {twice!r}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    found: list[Wanted] = []
    stems: set[str] = set()
    for text in prompts:
        cut = _UNSAFE.sub(" ", text).encode()[:_LONGEST].decode(errors="ignore").strip(" .")
        stem, number = cut or "prompt", 2
        while stem in stems:
            stem, number = f"{cut or 'prompt'} {number}", number + 1
        stems.add(stem)
        found += [Wanted(name=f"{stem}-{i}", prompt=text, seed=first + i) for i in range(seeds)]
    return found


def prompt_of(name: str) -> str:
    """The prompt in a file name without its suffix: all but "-<index>" at its end."""
    return re.sub(r"-\d+$", "", name)


def video(folder: Path, run: str, name: str) -> Path:
    """Where a clip of a run lies."""
    return folder / VIDEOS / run / f"{name}.mp4"


def strays(folder: Path, runs: Sequence[str], names: Sequence[str]) -> list[str]:
    """Videos in the folder that are of none of some runs and clips: whoever judges the folder would judge them, too."""
    mine = {video(folder, run, name) for run in runs for name in names}
    return [str(path.relative_to(folder)) for path in sorted((folder / VIDEOS).rglob("*.mp4")) if path not in mine]


def write_prompts(folder: Path, wanted: Sequence[Wanted]) -> Path:
    """Write which file shows which prompt."""
    path = folder / VIDEOS / PROMPTS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, as_json({f"{one.name}.mp4": one.prompt for one in wanted}))
    return path


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: one in each line, or a JSON list of them or of objects with "prompt_en", as VBench ships it.

    Raises:
        ValueError: the file does not hold prompts. FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file of prompts: {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
        told = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read as prompts: {error}") from error
    if not isinstance(told, list):
        raise ValueError(f"{str(path)!r} must hold a JSON list of prompts, got {type(told).__name__}")
    found: dict[str, None] = {}
    for one in told:
        line = one.get("prompt_en") if isinstance(one, dict) else one
        if not isinstance(line, str):
            raise ValueError(f'{str(path)!r} must hold sentences or objects with "prompt_en", got {one!r}')
        if line.strip():
            found[line.strip()] = None
    if not found:
        raise ValueError(f"{str(path)!r} holds no prompt")
    return list(found)
