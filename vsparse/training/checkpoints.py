"""Checkpoints of a run: safetensors of what each process holds and a manifest, whole or not there at all.

Nothing random is stored: every draw of a run follows from its seed and step (`Draws`), so does the place in the data.
"""

from __future__ import annotations

import dataclasses as dc
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vsparse.optional import require
from vsparse.training.files import PARTIAL, clear_partial, explained, publish
from vsparse.wrapping import is_sharded

__all__ = ["Checkpoint", "State", "checkpoints", "latest", "restore", "rotate", "write"]

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-\d{8}")


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """One complete checkpoint.

    Args:
        path: Its folder. step: optimiser steps that were done. processes: how many wrote it.
        settings: What decides the run's result, to be compared before it goes on.
    """

    path: Path
    step: int
    processes: int
    settings: Mapping[str, Any]


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """What a run carries from step to step.

    Args:
        model: The model under its own names, without wrappers; what learns and what is buffered is kept.
        optimisers: Of its parameters. average: moving averages by parameter name, empty without.
    """

    model: nn.Module
    optimisers: Sequence[torch.optim.Optimizer]
    average: Mapping[str, Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything as this process holds it, by name; under sharding its shard."""
        names = {id(x): name for name, x in self.model.named_parameters()}
        kept = self.model.state_dict(keep_vars=True)
        for name, x in kept.items():
            if x.requires_grad or id(x) not in names:
                yield f"model/{name}", _local(x)
        for name, x in self.average.items():
            yield f"average/{name}", _local(x)
        for i, optimiser in enumerate(self.optimisers):
            for x, values in optimiser.state.items():
                for key, value in values.items():
                    yield f"optimiser/{i}/{names[id(x)]}/{key}", _local(value)


def _local(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file())


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None.

    Raises:
        ValueError: its manifest is not readable, or of a newer format.
    """
    found = checkpoints(folder)
    if not found:
        return None
    try:
        told = json.loads((found[-1] / MANIFEST).read_text())
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']!r}; this version reads format {FORMAT}")
        names = ("step", "processes", "settings")
        return Checkpoint(path=found[-1], **{name: told[name] for name in names})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found[-1]} is not a readable checkpoint: {error}") from error


def write(folder: Path, state: State, *, step: int, settings: Mapping[str, Any], accelerator: Any) -> Path:
    """Write the checkpoint of a step; every process calls it. Under sharding each writes what it holds, else the first.

    Raises:
        OSError: a process could not write; what it had written is gone, older checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    scratch = folder / f"{PARTIAL}{target.name}"
    rank, processes = accelerator.process_index, accelerator.num_processes
    if rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    accelerator.wait_for_everyone()
    problem = ""
    try:
        with explained(target):
            if rank == 0 or _sharded(state.model):
                save_file = require("safetensors.torch", "diffusers").save_file
                tensors = {name: x.to("cpu", copy=True).contiguous() for name, x in state.tensors()}
                save_file(tensors, scratch / _file(rank))
            if rank == 0:
                manifest = {"format": FORMAT, "step": step, "processes": processes, "settings": settings}
                (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        problem = str(error)
    problems = [text for text in _told_by_all(problem, accelerator) if text]
    if rank == 0 and problems:
        shutil.rmtree(scratch, ignore_errors=True)
    elif rank == 0:
        publish(scratch, target)
    accelerator.wait_for_everyone()
    if problems:
        raise OSError("; ".join(problems))
    return target


def _file(rank: int) -> str:
    return f"state-{rank:05d}.safetensors"


def _sharded(model: nn.Module) -> bool:
    return any(map(is_sharded, model.parameters()))


def _told_by_all(text: str, accelerator: Any) -> list[str]:
    if accelerator.num_processes == 1:
        return [text]
    found: list[str] = require("accelerate.utils", "diffusers").gather_object([text])
    return found


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what a killed run left behind."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)
    clear_partial(folder)


def restore(checkpoint: Checkpoint, state: State, *, settings: Mapping[str, Any], accelerator: Any) -> None:
    """Put a checkpoint back into a run that was set up like the one that wrote it.

    Raises:
        ValueError: other settings, another number of processes, another architecture, a damaged file; nothing is
            changed then.
    """
    where = f"cannot resume from {checkpoint.path}"
    differ = _differences(checkpoint.settings, settings)
    if differ:
        raise ValueError(
            f"{where}: it was written with other settings: {'; '.join(differ)}. Give the run its old settings, or "
            "another output folder"
        )
    if checkpoint.processes != accelerator.num_processes:
        raise ValueError(
            f"{where}: {checkpoint.processes} processes wrote it, this run has {accelerator.num_processes}"
        )
    file = checkpoint.path / _file(accelerator.process_index if _sharded(state.model) else 0)
    try:
        stored: dict[str, Tensor] = require("safetensors.torch", "diffusers").load_file(file)
    except Exception as error:  # safetensors raises its own, unexported type
        raise ValueError(f"{where}: {file.name} is not readable: {error}") from error
    names = dict(state.model.named_parameters())
    place = {name: x for name, x in state.tensors() if not name.startswith("optimiser/")}
    moments = {name: x for name, x in stored.items() if name.startswith("optimiser/")}
    problems = [f"missing: {name}" for name in sorted(place.keys() - stored.keys())]
    problems += [f"unexpected: {name}" for name in sorted(stored.keys() - place.keys() - moments.keys())]
    problems += [
        f"{name} is {tuple(stored[name].shape)}, the model wants {tuple(x.shape)}"
        for name, x in sorted(place.items())
        if name in stored and stored[name].shape != x.shape
    ]
    problems += [f"unexpected: {name}" for name in sorted(moments) if name.split("/")[2] not in names]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{where}: it belongs to another architecture: {'; '.join(problems[:6])}{more}")
    with torch.no_grad():
        for name, x in place.items():
            x.copy_(stored[name])
    for name, value in moments.items():
        _, i, parameter, key = name.split("/")
        x = names[parameter]
        state.optimisers[int(i)].state[x][key] = _like(value, x)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """An optimiser's value where the optimiser keeps it: counts on the CPU, moments beside their parameter."""
    if value.ndim == 0:
        return value
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ, by dotted name."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name} was {before!r}, is {now!r}")
    return found
