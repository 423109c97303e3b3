"""Trained parts on disk: safetensors and a TOML description, written whole or not at all."""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vsparse.descriptions import from_toml, schedule_fields, to_toml, with_none
from vsparse.fingerprint import Fingerprint, differences, unchecked
from vsparse.methods import Method, get_method
from vsparse.optional import require
from vsparse.schedule import Schedule
from vsparse.wrapping import copy_whole

__all__ = ["Stored", "assign", "check_models", "read", "save"]

_WEIGHTS = "vsparse.safetensors"
_FORMATS = {"vsparse.toml": 2, "vsparse.json": 1}  # the first is written; both are read
_CONFIG = "vsparse.toml"
_HOST = "host/"  # before the names of tensors that are samples of the host's weights
_FASTWAN = re.compile(
    r"^(?:(?P<root>transformer\w*)\.)?(?P<block>blocks\.\d+)\.(?:attn1\.)?to_gate_compress\.(?P<part>weight|bias)$"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """What an adapter holds: the method and schedule to apply, tensors by ``root.site.parameter``, and fingerprints of
    the models by root; None where the file's form has none.
    """

    method: Method
    schedule: Schedule | None
    tensors: Mapping[str, Tensor]
    path: Path
    models: Mapping[str, Fingerprint] | None = None


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(
    directory: str | os.PathLike[str],
    method: Method,
    schedule: Schedule,
    hosts: Sequence[str],
    tensors: Mapping[str, Tensor],
    models: Mapping[str, Fingerprint],
    *,
    write: bool = True,
) -> None:
    """Write an adapter folder under a temporary name, then rename it. A density ramp belongs to the training run: the
    adapter holds the schedule without it.

    Args:
        tensors: By ``root.site.parameter``, whole, on the CPU. models: by root. write: False: only check, in a process
            for which another one writes.

    Raises:
        ValueError: the target exists and is no adapter, or an option has no form in TOML.
    """
    target = Path(directory)
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or _is_adapter(target))):
        raise ValueError(f"save: {target} exists and is not a vsparse adapter; choose another folder")
    config = {
        "format": _FORMATS[_CONFIG],
        "method": method.key,
        "hosts": tuple(hosts),
        "options": method.options(),
        "schedule": schedule_fields(schedule),
        "models": {
            name: {"class": model.model, "unread": model.unread, "config": dict(model.config)}
            for name, model in models.items()
        },
    }
    text = to_toml(config, f"save: method {method.key!r}")
    samples = {f"{_HOST}{name}.{site}": x for name, model in models.items() for site, x in model.weights.items()}
    save_file = require("safetensors.torch", "diffusers").save_file
    if not write:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (scratch / _CONFIG).write_text(text, encoding="utf-8")
        save_file({**tensors, **samples}, scratch / _WEIGHTS, metadata={_CONFIG: _digest(text)})
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


def _is_adapter(path: Path) -> bool:
    return any((path / name).exists() for name in _FORMATS)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(directory: str | os.PathLike[str]) -> Stored:
    """Read an adapter, or the ``to_gate_compress`` weights of a FastWan checkpoint.

    Raises:
        FileNotFoundError: nothing there. ValueError: damaged, of a newer format, or neither of the two.
    """
    path = Path(directory)
    if not path.exists():
        raise FileNotFoundError(f"load: {path} does not exist")
    if _is_adapter(path):
        return _read_adapter(path)
    tensors: dict[str, Tensor] = {}
    for folder, file in _checkpoint(path):
        for name, x in _tensors(file, _FASTWAN).items():
            found = _FASTWAN.match(name)
            assert found is not None
            mine = f"{found['root'] or folder}.{found['block']}.attn1.to_gate_compress.{found['part']}"
            if mine in tensors:
                raise ValueError(f"load: {path} holds {name} more than once; name one file")
            tensors[mine] = x
    if not tensors:
        raise ValueError(
            f"load: {path} is neither a vsparse adapter (no {_CONFIG}) nor a checkpoint with to_gate_compress weights"
        )
    return Stored(method=get_method("vsa")(), schedule=None, tensors=tensors, path=path)


def _read_adapter(path: Path) -> Stored:
    try:
        name = next(name for name in _FORMATS if (path / name).exists())
        text = (path / name).read_text(encoding="utf-8")
        config = from_toml(text) if name == _CONFIG else with_none(json.loads(text))
        if config["format"] != _FORMATS[name]:
            raise ValueError(f"format {config['format']!r}; this version reads format {_FORMATS[name]} in {name}")
        method = get_method(config["method"])().replace(**config["options"])
        schedule = None if config["schedule"] is None else Schedule(**config["schedule"])
        tensors = _tensors(path / _WEIGHTS)
        models = _models(config["models"], tensors) if name == _CONFIG else None
        if _digest_with(path / _WEIGHTS) not in (None, _digest(text)):
            raise ValueError(f"{name} is not the one that was saved with its weights: cut off, or changed since")
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"load: {path} is not a readable vsparse adapter: {error}") from error
    mine = {name: x for name, x in tensors.items() if not name.startswith(_HOST)}
    return Stored(method=method, schedule=schedule, tensors=mine, path=path, models=models)


def _digest(text: str) -> str:
    """What the weights keep of the description: a text that was cut off may still be read as one."""
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_with(file: Path) -> str | None:
    """That of the description which was saved with some weights; None: before there was any."""
    with require("safetensors", "diffusers").safe_open(file, "pt") as content:
        found: str | None = (content.metadata() or {}).get(_CONFIG)
        return found


def _models(tables: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Fingerprint]:
    found = {}
    for name, table in tables.items():
        start = f"{_HOST}{name}."
        weights = {key.removeprefix(start): x for key, x in tensors.items() if key.startswith(start)}
        if not all(x.is_floating_point() for x in weights.values()):
            raise ValueError(f"the samples of {name} are not floating")
        found[name] = Fingerprint(
            model=table["class"], config=dict(table["config"]), weights=weights, unread=table["unread"]
        )
    return found


def _checkpoint(path: Path) -> list[tuple[str, Path]]:
    """Files of a checkpoint, each with its model's name: one file, the folder of a model, or that of a pipeline."""
    if path.is_file():
        files = [("transformer", path)]
    else:
        folders = [("transformer", path), *((folder.name, folder) for folder in sorted(path.glob("transformer*/")))]
        files = [(name, file) for name, folder in folders for file in sorted(folder.iterdir())]
    pickles = [file.name for _, file in files if file.suffix in _PICKLES]
    safe = [(name, file) for name, file in files if file.suffix == ".safetensors"]
    if pickles and not safe:
        raise ValueError(
            f"load: {path} is stored as a pickle ({', '.join(pickles[:3])}), which runs code when it is read; convert "
            "it to safetensors"
        )
    for _, file in files:
        if file.name.endswith(".safetensors.index.json"):
            _check_index(file)
    return safe or [(name, file) for name, file in files if file == path]


def _check_index(index: Path) -> None:
    """Refuse a sharded checkpoint without the shards that hold gates."""
    try:
        shards = {shard for name, shard in json.loads(index.read_text())["weight_map"].items() if _FASTWAN.match(name)}
        gone = sorted(shard for shard in shards if not (index.parent / shard).exists())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {index} is not a readable index of shards: {error!r}") from error
    if gone:
        raise ValueError(f"load: {index} names {', '.join(gone[:3])}, which is not there; the checkpoint is incomplete")


def _tensors(file: Path, wanted: re.Pattern[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a file by name, those that match ``wanted``."""
    safe_open = require("safetensors", "diffusers").safe_open
    try:
        with safe_open(file, "pt") as content:
            names = [name for name in content.keys() if wanted is None or wanted.match(name)]  # noqa: SIM118
            return {name: content.get_tensor(name) for name in names}
    except Exception as error:  # safetensors raises its own, unexported type
        raise ValueError(f"load: {file} is not a readable safetensors file: {error}") from error


# ---- checking and copying --------------------------------------------------------------------------------------------


def check_models(
    path: Path, kept: Mapping[str, Fingerprint], found: Mapping[str, Fingerprint], *, strict: bool
) -> None:
    """Are these the models that an adapter was saved from, or ones that were made from them?

    Warns, once, where that cannot be told and, if not ``strict``, where they are others.

    Raises:
        ValueError: strict, and another architecture or other weights; the message says in what.
    """
    if len(kept) == len(found) == 1:  # a single model has whatever name it has in its target
        kept = dict(zip(found, kept.values(), strict=True))
    both = [(root, kept[root], model) for root, model in found.items() if root in kept]
    others = [f"{root}: {words}" for root, mine, model in both for words in differences(mine, model)]
    told = [f"{path} was saved from another model: {'; '.join(others)}"] if others else []
    if told and strict:
        raise ValueError(f"load: {told[0]}. strict=False loads it all the same")
    unread = [f"{root}: {words}" for root, mine, model in both if (words := unchecked(mine, model))]
    unread += [f"{root}: the adapter was saved without it" for root in found if root not in kept]
    if unread:
        told.append(f"whether {path} was saved from this model was not checked: {'; '.join(unread)}")
    if told:
        warnings.warn(f"vsparse.load: {'. '.join(told)}", stacklevel=3)


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
