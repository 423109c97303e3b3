"""Trained parts on disk: safetensors and a JSON description, written whole or not at all."""

from __future__ import annotations

import dataclasses as dc
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vsparse.methods import Method, get_method
from vsparse.optional import require
from vsparse.schedule import Schedule
from vsparse.wrapping import copy_whole, whole

__all__ = ["Stored", "assign", "read", "save"]

_CONFIG, _WEIGHTS, _FORMAT = "vsparse.json", "vsparse.safetensors", 1
_FASTWAN = re.compile(
    r"^(?:(?P<root>transformer\w*)\.)?(?P<block>blocks\.\d+)\.(?:attn1\.)?to_gate_compress\.(?P<part>weight|bias)$"
)


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """What an adapter holds: the method and schedule to apply, and tensors by ``root.site.parameter``."""

    method: Method
    schedule: Schedule | None
    tensors: Mapping[str, Tensor]
    path: Path


def save(
    directory: str | os.PathLike[str],
    method: Method,
    schedule: Schedule,
    hosts: Sequence[str],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write an adapter folder under a temporary name, then rename it. A density ramp belongs to the training run: the
    adapter holds the schedule without it. Sharded tensors are gathered on every process and written by the first.

    Raises:
        ValueError: the target exists and is no adapter.
    """
    target = Path(directory)
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / _CONFIG).exists())):
        raise ValueError(f"save: {target} exists and is not a vsparse adapter; choose another folder")
    config = {
        "format": _FORMAT,
        "method": method.key,
        "options": method.options(),
        # A method's default of another kind says what fields do not: it is found again by not being there.
        "schedule": _fields(schedule) if type(schedule) is Schedule else None,
        "hosts": list(hosts),
    }
    save_file = require("safetensors.torch", "diffusers").save_file
    values, mine = whole(tensors)
    if not mine:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (scratch / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(values, scratch / _WEIGHTS)
        for name in (_CONFIG, _WEIGHTS):
            with open(scratch / name, "rb") as file:
                os.fsync(file.fileno())
        scratch.chmod(0o755)
        if target.exists():
            backup = scratch.with_name(scratch.name + ".old")
            target.rename(backup)
            scratch.rename(target)
            shutil.rmtree(backup)
        else:
            scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _fields(schedule: Schedule) -> dict[str, Any]:
    return {name: value for name, value in dc.asdict(schedule).items() if name != "ramp"}


def read(directory: str | os.PathLike[str]) -> Stored:
    """Read an adapter, or the ``to_gate_compress`` weights of a FastWan checkpoint.

    Raises:
        FileNotFoundError: nothing there. ValueError: damaged, of a newer format, or neither of the two.
    """
    path = Path(directory)
    if not path.exists():
        raise FileNotFoundError(f"load: {path} does not exist")
    if (path / _CONFIG).exists():
        return _read_adapter(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name in _names(file):
            found = _FASTWAN.match(name)
            if found:
                root = found["root"] or "transformer"
                tensors[f"{root}.{found['block']}.attn1.to_gate_compress.{found['part']}"] = _tensor(file, name)
    if not tensors:
        raise ValueError(
            f"load: {path} is neither a vsparse adapter (no {_CONFIG}) nor a checkpoint with to_gate_compress weights"
        )
    return Stored(method=get_method("vsa")(), schedule=None, tensors=tensors, path=path)


def _read_adapter(path: Path) -> Stored:
    try:
        config = json.loads((path / _CONFIG).read_text())
        if config["format"] != _FORMAT:
            raise ValueError(f"format {config['format']!r}; this version reads format {_FORMAT}")
        method = get_method(config["method"])().replace(**_tuples(config["options"]))
        schedule = None if config["schedule"] is None else Schedule(**_tuples(config["schedule"]))
        tensors = {name: _tensor(path / _WEIGHTS, name) for name in _names(path / _WEIGHTS)}
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"load: {path} is not a readable vsparse adapter: {error}") from error
    return Stored(method=method, schedule=schedule, tensors=tensors, path=path)


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _names(file: Path) -> list[str]:
    safe_open = require("safetensors", "diffusers").safe_open
    try:
        with safe_open(file, "pt") as content:
            return list(content.keys())
    except Exception as error:  # safetensors raises its own, unexported type
        raise ValueError(f"load: {file} is not a readable safetensors file: {error}") from error


def _tensor(file: Path, name: str) -> Tensor:
    with require("safetensors", "diffusers").safe_open(file, "pt") as content:
        return content.get_tensor(name)  # type: ignore[no-any-return]


def assign(stored: Stored, parameters: Mapping[str, Tensor], method: Method, roots: Sequence[str]) -> None:
    """Copy stored tensors into a patch's parameters; all names and shapes must fit, or nothing is copied.

    Raises:
        ValueError: another method, names or shapes that differ, values that are no finite numbers; the message lists
            them.
    """
    if stored.method.key != method.key:
        raise ValueError(f"load: {stored.path} holds {stored.method.key!r}, the target is patched with {method.key!r}")
    tensors = dict(stored.tensors)
    names = {name.split(".", 1)[0] for name in tensors}
    if len(names) == 1 and len(roots) == 1 and names != set(roots):
        tensors = {f"{roots[0]}.{name.split('.', 1)[1]}": x for name, x in tensors.items()}
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, the model wants {tuple(parameters[name].shape)}"
        for name in sorted(parameters.keys() & tensors.keys())
        if tensors[name].shape != parameters[name].shape
    ]
    values = [
        f"{name} holds values that are not finite" if x.is_floating_point() else f"{name} is {x.dtype}, not floating"
        for name, x in sorted(tensors.items())
        if not x.is_floating_point() or not bool(x.isfinite().all())
    ]
    problems = shapes + values + [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in extra]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"load: {stored.path} does not fit this model: " + "; ".join(problems[:6]) + more)
    for name, parameter in parameters.items():
        copy_whole(parameter, tensors[name])
