"""Clips and their captions: what a folder or a table offers, and what is wrong with it."""

from __future__ import annotations

import csv
import dataclasses as dc
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["VIDEO_SUFFIXES", "Clip", "Found", "Problem", "find_clips"]

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
_TABLES = ("metadata.csv", "metadata.jsonl")
_VIDEO, _CAPTION = ("file_name", "video"), ("text", "caption")


@dc.dataclass(frozen=True, kw_only=True)
class Clip:
    """A video file and what it shows.

    Args:
        path: Where the file lies. name: its path relative to the source, with forward slashes; what names the clip
            everywhere. caption: what it shows; not blank.
    """

    path: Path
    name: str
    caption: str


@dc.dataclass(frozen=True, kw_only=True)
class Problem:
    """A clip that is left out, and why. ``name``: the clip's, or its caption's where there is no clip."""

    name: str
    reason: str


@dc.dataclass(frozen=True, kw_only=True)
class Found:
    """Clips that can be tried, in an order that depends on their names or rows alone, and those that cannot."""

    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]


def find_clips(source: str | os.PathLike[str]) -> Found:
    """Find clips with captions; no video is opened.

    Args:
        source: One of

            - a folder with ``metadata.csv`` or ``metadata.jsonl``,
            - a folder, searched to any depth, with a caption ``name.txt`` beside each video ``name.mp4``; names that
              begin with a dot are passed over,
            - a ``.csv`` or ``.jsonl`` file with the columns ``file_name`` (or ``video``) and ``text`` (or ``caption``),
              paths relative to the file.

    Returns:
        Clips sorted by name, or in the order of the rows. Videos without a caption, captions without a video and rows
        whose file is missing are problems, not errors.

    Raises:
        ValueError: no such source, no clip in it, or a table that cannot be read as one: another encoding, a column
            that is unknown, missing or there twice, a row of another length, the same video in two rows.
    """
    path = Path(source)
    if path.is_dir():
        tables = [path / name for name in _TABLES if (path / name).is_file()]
        if len(tables) > 1:
            raise ValueError(f"clips: {path} has both {' and '.join(_TABLES)}; remove one, or name the one to use")
        found = _from_table(tables[0], folder=path) if tables else _from_folder(path)
    elif path.is_file():
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError(f"clips: {path} is no folder and no .csv or .jsonl file")
        found = _from_table(path, folder=None)
    else:
        raise ValueError(f"clips: {path} does not exist")
    if not found.clips:
        listed = "; ".join(f"{problem.name}: {problem.reason}" for problem in found.problems[:4])
        raise ValueError(f"clips: no clip with a caption in {path} ({listed or 'nothing there'})")
    return found


def _videos(folder: Path) -> dict[str, Path]:
    """Video files below a folder by relative name, sorted."""
    return dict(sorted(_files(folder, VIDEO_SUFFIXES)))


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        inner = path.relative_to(folder)
        if path.suffix.lower() in suffixes and path.is_file() and not any(part.startswith(".") for part in inner.parts):
            yield inner.as_posix(), path


def _from_folder(folder: Path) -> Found:
    clips, problems = [], []
    captions = dict(sorted(_files(folder, (".txt",))))
    unused = dict(captions)
    for name, path in _videos(folder).items():
        beside = Path(name).with_suffix(".txt").as_posix()
        unused.pop(beside, None)
        if beside not in captions:
            problems.append(Problem(name=name, reason=f"no caption: there is no {beside}"))
            continue
        caption = _text(captions[beside]).strip()
        if caption:
            clips.append(Clip(path=path, name=name, caption=caption))
        else:
            problems.append(Problem(name=name, reason=f"no caption: {beside} is blank"))
    problems += [Problem(name=name, reason="a caption without a video of the same name") for name in unused]
    return Found(clips=tuple(clips), problems=tuple(problems))


def _from_table(table: Path, *, folder: Path | None) -> Found:
    """Clips of a table; where it describes a folder, videos that no row names are problems."""
    rows = _csv_rows(table) if table.suffix.lower() == ".csv" else _jsonl_rows(table)
    clips, problems, seen = [], [], dict[str, str]()
    for where, row in rows:
        video, caption = (_cell(row, names, where) for names in (_VIDEO, _CAPTION))
        name = Path(os.path.normpath(video)).as_posix()
        if name in seen:
            raise ValueError(f"clips: {where}: {name!r} stands in {seen[name]} already; a video has one row")
        seen[name] = where
        path = table.parent / name
        if not caption:
            problems.append(Problem(name=name, reason="no caption: the cell is blank"))
        elif not path.is_file():
            problems.append(Problem(name=name, reason="no such file"))
        else:
            clips.append(Clip(path=path, name=name, caption=caption))
    if folder is not None:
        unnamed = [name for name in _videos(folder) if name not in seen]
        problems += [Problem(name=name, reason=f"no caption: no row of {table.name} names it") for name in unnamed]
    return Found(clips=tuple(clips), problems=tuple(problems))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"clips: {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _csv_rows(table: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    reader = csv.reader(io.StringIO(_text(table), newline=""), strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(columns, str(table))
        for cells in reader:
            where = f"{table.name}, line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(columns):
                raise ValueError(f"clips: {where}: {len(cells)} cells for the {len(columns)} columns {columns}")
            yield where, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"clips: {table.name}, line {reader.line_num}: not CSV: {error}") from error


def _jsonl_rows(table: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    # Split at newlines alone: str.splitlines would also break inside captions, at characters that JSON leaves bare.
    for number, line in enumerate(_text(table).split("\n"), 1):
        where = f"{table.name}, line {number}"
        if not line.strip():
            continue
        try:
            pairs = json.loads(line, object_pairs_hook=list)
        except ValueError as error:
            raise ValueError(f"clips: {where}: not JSON: {error}") from error
        if not line.lstrip().startswith("{"):
            raise ValueError(f'clips: {where}: a row is an object such as {{"video": ..., "caption": ...}}, got {line}')
        _check_columns([name for name, _ in pairs], where)
        yield where, dict(pairs)


def _check_columns(columns: list[str], where: str) -> None:
    accepted = f"accepted: {' or '.join(_VIDEO)}, and {' or '.join(_CAPTION)}"
    unknown = [name for name in columns if name not in (*_VIDEO, *_CAPTION)]
    if unknown:
        raise ValueError(f"clips: {where}: unknown columns {unknown}; {accepted}")
    for names in (_VIDEO, _CAPTION):
        count = sum(name in names for name in columns)
        if count != 1:
            raise ValueError(f"clips: {where}: {count} columns named {' or '.join(names)}, one is needed; {accepted}")


def _cell(row: Mapping[str, object], names: tuple[str, str], where: str) -> str:
    (name,) = (name for name in names if name in row)
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"clips: {where}: {name} must be text, got {value!r}")
    if name in _VIDEO and not value.strip():
        raise ValueError(f"clips: {where}: {name} is blank")
    return value.strip()
