"""How many processes share one video, and in which roles: the setting, its groups, and what they must agree on."""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vsparse.parallel.collectives import ALONE, Board, Group, board_of

__all__ = ["ContextParallel", "Groups", "agree", "open_groups", "parse"]

HEADS, ROWS = "ulysses", "ring"  # names of the two axes of a mesh, those that diffusers gives them


@dc.dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """One video over several processes: ``ulysses`` times ``ring`` (or ``gather``) of them.

    Args:
        ulysses: Processes that share the heads: tokens are exchanged for heads before attention, and back after it
            (DeepSpeed-Ulysses, arXiv 2309.14509). At most as many as heads; they need not divide.
        ring: Processes that share the tokens. Keys of others come in as many exchanges, only the blocks that are kept
            somewhere, while attention to those that came before is computed.
        gather: The same in one exchange (DSV, arXiv 2502.07590): fewer messages, more memory. Not together with
            ``ring``.
        mesh: Whose axes ``"ring"`` and ``"ulysses"`` are used; others hold replicas. None: one over all processes of
            the default group, in whose inner dimension heads are shared.
        balance: Heads are given to other processes when the slowest has more than this times the mean. None: never.
        gradients: Each process holds a part of every parameter's gradient. "sum": you add them up over the context
            group. "mean": whatever wraps the model averages them over it (DDP, `fully_shard` over all processes), so
            they are scaled beforehand.

    Raises:
        ValueError: a number below 1, both ``ring`` and ``gather``.
    """

    ulysses: int = 1
    ring: int = 1
    gather: int = 1
    mesh: DeviceMesh | None = dc.field(default=None, compare=False)
    balance: float | None = 1.1
    gradients: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        for name in ("ulysses", "ring", "gather"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"context parallel: {name} must be an integer >= 1, got {value!r}")
        if self.ring > 1 and self.gather > 1:
            raise ValueError(
                f"context parallel: ring={self.ring} and gather={self.gather} are two ways to share the same tokens; "
                "choose one"
            )
        if self.balance is not None and not self.balance >= 1.0:
            raise ValueError(f"context parallel: balance must be at least 1, or None, got {self.balance!r}")
        if self.gradients not in ("sum", "mean"):
            raise ValueError(f'context parallel: gradients must be "sum" or "mean", got {self.gradients!r}')

    @property
    def rows(self) -> int:
        """Processes that share the tokens, either way."""
        return max(self.ring, self.gather)

    @property
    def size(self) -> int:
        """Processes of one video."""
        return self.ulysses * self.rows

    @property
    def how(self) -> Literal["ring", "gather"]:
        """How keys of other processes come."""
        return "gather" if self.gather > 1 else "ring"

    @property
    def told(self) -> dict[str, object]:
        """Everything that processes must have alike, for `agree`; each has a mesh of its own."""
        return {"the setting": str(self), "balance": self.balance, "gradients": self.gradients}

    def __str__(self) -> str:
        said = [f"{name}={value}" for name in ("ulysses", "ring", "gather") if (value := getattr(self, name)) > 1]
        return ",".join(said) or "ulysses=1"


def parse(text: str) -> ContextParallel:
    """``"ulysses=2,ring=2"`` as a setting.

    Raises:
        ValueError: a name that is none of ulysses, ring, gather, a name given twice, or no whole number.
    """
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (x.strip() for x in part.partition("="))
        if name not in ("ulysses", "ring", "gather") or name in given or not value.isdecimal():
            raise ValueError(
                f"context parallel: {text!r} is not understood at {part!r}; write ulysses=2, ring=2 or "
                "ulysses=2,ring=2 (gather in the place of ring)"
            )
        given[name] = int(value)
    return dc.replace(ContextParallel(), **given)  # type: ignore[arg-type]


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Groups:
    """The groups of this process: who shares its tokens' heads, who shares its heads' tokens, and both together."""

    heads: Group = ALONE
    rows: Group = ALONE
    all: Group = ALONE
    how: Literal["ring", "gather"] = "ring"
    scale: float = 1.0

    @property
    def alone(self) -> bool:
        """Whether there is nobody else."""
        return self.all.size == 1

    def __deepcopy__(self, memo: dict[int, object]) -> Groups:
        """Processes cannot be copied."""
        return self


_OPENED: dict[tuple[object, ...], Groups] = {}


def open_groups(setting: ContextParallel, device: torch.device) -> Groups:
    """The groups of a setting; every process of the default group must ask, in the same order.

    Args:
        setting: Of this process. device: where its model is.

    Raises:
        RuntimeError: torch.distributed is not set up.
        ValueError: a number of processes that the setting does not fit, another setting on another process, or a
            backend that cannot send from the device, or a mesh of another form.
    """
    if setting.size == 1:
        return Groups()
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"context parallel: {setting} needs {setting.size} processes, and torch.distributed is not initialised; "
            "start with torchrun or accelerate, then call torch.distributed.init_process_group (or Accelerator())"
        )
    world, backend = dist.get_world_size(), str(dist.get_backend())
    if device.type == "cpu" and "gloo" not in backend and "cpu" not in str(dist.get_backend_config()):
        raise ValueError(f"context parallel: the model is on the CPU, which {backend} cannot send from; use gloo")
    mesh = setting.mesh
    if mesh is None:
        everyone = Group(size=world, rank=dist.get_rank(), handle=None, name="default", board=board_of("all"))
        agree(everyone, "context parallel", setting.told)
        if world % setting.size:
            fitting = ", ".join(f"ulysses={n}" for n in range(2, world + 1) if world % n == 0) or "one process"
            raise ValueError(
                f"context parallel: {setting} takes groups of {setting.size} processes, and there are {world}; "
                f"fitting would be {fitting}, or any product that divides {world}"
            )
        key = (setting.rows, setting.ulysses, device.type, id(dist.group.WORLD))
        if key not in _OPENED:
            shape = (world // setting.size, setting.rows, setting.ulysses)
            kind = device.type if device.type != "meta" else "cpu"
            _OPENED[key] = _of_mesh(init_device_mesh(kind, shape, mesh_dim_names=("replicas", ROWS, HEADS)))
        found = _OPENED[key]
    else:
        names = mesh.mesh_dim_names or ()
        sizes = {name: mesh.size(i) for i, name in enumerate(names)}
        if sizes.get(ROWS, 1) != setting.rows or sizes.get(HEADS, 1) != setting.ulysses:
            raise ValueError(
                f"context parallel: {setting} needs a mesh with {ROWS!r} of {setting.rows} and {HEADS!r} of "
                f"{setting.ulysses} processes, got {dict(sizes)}"
            )
        found = _of_mesh(mesh)
    assert found.all.board is not None
    found.all.board.begin()  # what stopped somebody before is past
    scale = float(setting.size) if setting.gradients == "mean" else 1.0
    return dc.replace(found, how=setting.how, scale=scale)


def _of_mesh(mesh: DeviceMesh) -> Groups:
    names = mesh.mesh_dim_names or ()
    both = tuple(name for name in (ROWS, HEADS) if name in names)
    everyone = mesh[both]._flatten() if len(both) > 1 else mesh[both[0]]
    board = board_of("-".join(map(str, everyone.mesh.flatten().tolist())))
    return Groups(
        heads=_group(mesh[HEADS], "heads", board) if HEADS in names else ALONE,
        rows=_group(mesh[ROWS], "rows", board) if ROWS in names else ALONE,
        all=_group(everyone, "context", board),
    )


def _group(mesh: DeviceMesh, name: str, board: Board) -> Group:
    handle = mesh.get_group()
    return Group(size=dist.get_world_size(handle), rank=dist.get_rank(handle), handle=handle, name=name, board=board)


def agree(group: Group, what: str, values: Mapping[str, Any]) -> None:
    """Refuse, on every process, what not all processes of a group were given alike.

    It is told through the store: on a GPU nothing is waited for but the other processes.

    Args:
        group: Who must agree; all must ask. what: they are about to do. values: by name, compared as text.

    Raises:
        ValueError: naming what differs, and what each process was given.
    """
    if group.size == 1:
        return
    assert group.board is not None
    mine = {name: repr(value) for name, value in values.items()}
    with group.sending(what):
        told = [json.loads(said) for said in group.board.exchange(group.rank, group.size, json.dumps(mine))]
    for name in dict.fromkeys(name for one in told for name in one):
        given = [one.get(name, "nothing") for one in told]
        if len(set(given)) > 1:
            rows = "\n  - ".join(f"process {i}: {value}" for i, value in enumerate(given))
            raise ValueError(f"{what}: {name} differs between the processes of one video:\n  - {rows}")
