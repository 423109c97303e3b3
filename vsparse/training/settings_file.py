"""A fine-tuning run's settings as a TOML or YAML file: reading one, and an example with every key explained."""

from __future__ import annotations

import dataclasses as dc
import inspect
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vsparse.optional import require
from vsparse.training.data.buckets import Bucket
from vsparse.training.settings import DataSettings, Settings

__all__ = ["example", "meanings", "read"]


def read(path: Path) -> Settings:
    """Settings from a ``.toml``, ``.yaml`` or ``.yml`` file.

    Raises:
        FileNotFoundError: no such file. ValueError: no such kind of file, not readable, an unknown or missing key, or a
            value that does not fit; the message names the key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"settings: {path} does not exist")
    try:
        if path.suffix == ".toml":
            values: Any = tomllib.loads(path.read_text())
        elif path.suffix in (".yaml", ".yml"):
            values = require("yaml", "train").safe_load(path.read_text())
        else:
            raise ValueError("it must end in .toml, .yaml or .yml")
        return typing.cast(Settings, _build(Settings, values, ""))
    except Exception as error:  # yaml raises its own types
        raise ValueError(f"settings {path}: {error}") from error


def _build(kind: type, values: Any, where: str) -> Any:
    """A settings class from a table; keys and kinds of values are checked."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the file'} must be a table of settings, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dc.fields(kind)}
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown key {prefix}{name}; there are: {', '.join(fields)}")
    for name, f in fields.items():
        if name not in values and f.default is dc.MISSING and f.default_factory is dc.MISSING:
            raise ValueError(f"{prefix}{name} is missing")
    return kind(**{name: _value(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value as its annotation wants it."""
    if dc.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for kind in inner:
            try:
                return _value(kind, value, where)
            except ValueError:
                continue
    elif origin is Literal:
        if value in inner:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_value(inner[0], x, f"{where}[{i}]") for i, x in enumerate(value))
    elif origin is not None:
        if isinstance(value, Mapping):
            return {name: tuple(x) if isinstance(x, list) else x for name, x in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is type(None):
        if value is None:
            return None
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    words = str(hint) if origin else getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where} must be {words.replace('typing.', '')}, got {value!r}")


# ---- words ----------------------------------------------------------------------------------------------------------


def example() -> str:
    """A TOML file with every setting, its meaning and its default; what must be given is marked."""
    parts = ["# Every setting of a fine-tuning run. Lines that begin with '#' show defaults.\n"]
    parts.append(_section(Settings, ""))
    hints = typing.get_type_hints(Settings)
    for f in dc.fields(Settings):
        if dc.is_dataclass(hints[f.name]):
            kind = typing.cast(type, hints[f.name])
            parts.append(f"[{f.name}]\n{_section(kind, f.name)}")
            if kind is DataSettings:
                parts.append(f"[[data.buckets]]\n{_section(Bucket, 'data.buckets')}")
    return "\n".join(parts)


_EXAMPLES: Mapping[str, str] = {
    "output": '"runs/vsa"',
    "model.path": '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"',
    "data.source": '"my-videos"',
    "data.buckets.frames": "81",
    "data.buckets.height": "480",
    "data.buckets.width": "832",
    "train.steps": "2000",
}


def _section(kind: type, where: str) -> str:
    meaning = meanings(kind)
    hints = typing.get_type_hints(kind)
    lines = textwrap.wrap(meaning[""], 100, initial_indent="# ", subsequent_indent="# ")
    for f in dc.fields(kind):
        name = f"{where}.{f.name}" if where else f.name
        if dc.is_dataclass(hints[f.name]) or name == "data.buckets":
            continue
        words = meaning[f.name]
        lines += ["", *textwrap.wrap(words, 100, initial_indent="# ", subsequent_indent="# ")]
        if name in _EXAMPLES:
            lines.append(f"{f.name} = {_EXAMPLES[name]}")
        else:
            default = f.default if f.default is not dc.MISSING else typing.cast(Any, f.default_factory)()
            lines.append(f"#{f.name} = {_toml(default)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A default in TOML; None has no form there."""
    if value is None:
        return "(left out)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(x) for x in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name} = {_toml(x)}' for name, x in value.items())}}}"
    return repr(value)


def meanings(kind: type) -> dict[str, str]:
    """What the docstring of a settings class says about each field; under "" its first sentence."""
    text = (inspect.getdoc(kind) or "").replace("``", "`")
    head, _, rest = text.partition("Args:")
    body = " ".join(rest.partition("Raises:")[0].split())
    names = "|".join(f.name for f in dc.fields(kind))
    marks = list(re.finditer(rf"(?:^|(?<=[.;] ))((?:{names})(?:, (?:{names}))*): ", body))
    found = {"": " ".join(head.split())}
    for i, mark in enumerate(marks):
        words = body[mark.end() : marks[i + 1].start() if i + 1 < len(marks) else None].strip()
        for name in mark[1].split(", "):
            found[name] = words[:1].upper() + words[1:]
    return found
