"""What processes that share one video send to each other: collectives with exact gradients, counted in bytes.

Every collective here is an all-to-all of bytes: uneven parts and several tensors of several dtypes travel in one call,
gloo and NCCL offer it alike, and sums are formed on arrival in the order of the ranks, so that two runs are equal.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "ALONE",
    "Adjoint",
    "Board",
    "Group",
    "all_to_all",
    "board_of",
    "counted_traffic",
    "gather",
    "note_traffic",
    "total",
]

Adjoint = Literal["each", "once"]
"""Of a result that every process gets: "each" process goes on with it in its own way, and what they want of it adds up;
or all go on in the same way, to one loss, which counts "once"."""


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Some processes, numbered.

    Args:
        size: How many. rank: the number of this one. handle: of torch.distributed; None for a process alone.
        name: For messages and for the count of bytes. board: where one that fails says why.
    """

    size: int
    rank: int
    handle: dist.ProcessGroup | None
    name: str = "group"
    board: Board | None = None

    @contextlib.contextmanager
    def sending(self, what: str) -> Iterator[None]:
        """Around what waits for the others: if they are gone, the error says which of them failed, and why.

        Raises:
            RuntimeError: torch.distributed's, with that cause.
        """
        try:
            yield
        except RuntimeError as error:
            cause = None if self.board is None else self.board.read()
            told = f"another process has failed: {cause}" if cause else "a process is gone, or later than the timeout"
            raise RuntimeError(f"context parallel: {what} of the {self.name} group did not come: {told}") from error


class Board:
    """The store of the default group, where processes say what they are about to do, and why they had to stop.

    Args:
        name: Of the processes that share a video; the same on each of them, and only there. There is one for each name,
            so that no two of them write to the same place.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._loop = self._round = self._talks = 0
        self._said = ""

    def begin(self) -> None:
        """A forward begins, or an `apply`: here as on the others, whatever they have not come to in the one before."""
        self._round, self._talks = self._round + 1, 0

    def leave(self) -> None:
        """A loop of forwards ends: here as on the others, in whichever of them."""
        self._loop, self._round, self._talks = self._loop + 1, 0, 0

    def _key(self, ahead: int = 0) -> str:
        return f"vsparse/{self.name}/{self._loop}/{self._round + ahead}"

    def write(self, cause: str, *, ahead: int = 0) -> None:
        """Say why this process stops, in this round and some that others may have begun; the first one is heard."""
        with contextlib.suppress(RuntimeError, ValueError):
            store = _store()
            for key in map(self._key, range(ahead + 1)):
                if not store.check([key]):
                    store.set(key, cause)

    def read(self) -> str | None:
        """What was said in this round, None: nothing, or the store is gone as well."""
        with contextlib.suppress(RuntimeError, ValueError):
            store = _store()
            if store.check([self._key()]):
                return str(store.get(self._key()).decode())
        return None

    def exchange(self, rank: int, size: int, said: str) -> list[str]:
        """What each process says when all have come here; no tensor moves, and no device is waited for.

        Args:
            rank: Of this process, of ``size``. said: by it.

        Raises:
            RuntimeError: one of them has failed in this round, or does not come within the timeout.
        """
        store, began = _store(), time.monotonic()
        limit = store.timeout.total_seconds()
        self._talks += 1
        keys = [f"{self._key()}/said/{self._talks}/{process}" for process in range(size)]
        store.set(keys[rank], said)
        while not store.check(keys):
            waited = time.monotonic() - began
            stopped = self.read() is not None or waited > limit
            if stopped and not store.check(keys):  # who stops after all have spoken is heard nevertheless
                late = [i for i, key in enumerate(keys) if not store.check([key])]
                raise RuntimeError(f"nothing from process {', '.join(map(str, late))} within {waited:.0f} s")
            time.sleep(min(0.05, waited / 10))
        found = [store.get(key).decode() for key in keys]
        # Everyone is past the talk before, and nobody asks for it again.
        if self._said:
            store.delete_key(self._said)
        self._said = keys[rank]
        return found


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


_BOARDS: dict[str, Board] = {}


def board_of(name: str) -> Board:
    """The one board of a name."""
    return _BOARDS.setdefault(name, Board(name))


ALONE = Group(size=1, rank=0, handle=None, name="alone")

_COUNTERS: list[Counter[str]] = []


@contextlib.contextmanager
def counted_traffic() -> Iterator[Counter[str]]:
    """Count the bytes that this process sends to others, by what they were sent for."""
    counter: Counter[str] = Counter()
    _COUNTERS.append(counter)
    try:
        yield counter
    finally:
        _COUNTERS.remove(counter)


def note_traffic(what: str, amount: int) -> None:
    """Add bytes that this process sends to others."""
    for counter in _COUNTERS:
        counter[what] += amount


def all_to_all(
    group: Group, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], *, what: str
) -> tuple[Tensor, ...]:
    """Send tensors to every process of a group, and receive as many; differentiable.

    Args:
        group: Who takes part; all must call.
        tensors: ``size * n`` of them, those for process 0 first. The i-th of each process's n has one dtype everywhere.
        shapes: Of what comes, ``size * n``, those from process 0 first.
        what: It is for; see `counted_traffic`.

    Returns:
        What came, in the order of ``shapes``; on the device of what was sent.
    """
    if group.size == 1:
        return tuple(tensors)
    return tuple(_AllToAll.apply(group, tuple(map(tuple, shapes)), what, *tensors))  # type: ignore[no-untyped-call]


def gather(group: Group, x: Tensor, sizes: Sequence[int], *, dim: int, what: str, adjoint: Adjoint = "each") -> Tensor:
    """The parts of all processes side by side; differentiable.

    Args:
        group: Who takes part. x: the part of this process. sizes: of all parts along ``dim``, by rank.
        what: It is for. adjoint: see `Adjoint`.
    """
    if group.size == 1:
        return x
    return _Gather.apply(group, x, tuple(sizes), dim, what, adjoint)  # type: ignore[no-any-return, no-untyped-call]


def total(group: Group, x: Tensor, *, what: str, adjoint: Adjoint = "each") -> Tensor:
    """The sum of the tensors of all processes, equal to the bit on each; differentiable."""
    if group.size == 1:
        return x
    return gather(group, x[None], (1,) * group.size, dim=0, what=what, adjoint=adjoint).sum(0)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, shapes: tuple[tuple[int, ...], ...], what: str, *tensors: Tensor) -> Any:
        ctx.group, ctx.what, ctx.sent = group, what, tuple(tuple(x.shape) for x in tensors)
        return _send(group, tensors, shapes, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, None, *_send(ctx.group, grads, ctx.sent, ctx.what)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: Group, x: Tensor, sizes: tuple[int, ...], dim: int, what: str, adjoint: Adjoint
    ) -> Tensor:
        ctx.group, ctx.sizes, ctx.dim, ctx.what, ctx.adjoint = group, sizes, dim % x.ndim, what, adjoint
        shapes = [(*x.shape[: ctx.dim], size, *x.shape[ctx.dim + 1 :]) for size in sizes]
        return torch.cat(_send(group, [x] * group.size, shapes, what), ctx.dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts = grad.split(ctx.sizes, ctx.dim)
        mine = parts[ctx.group.rank]
        if ctx.adjoint == "each":
            came = _send(ctx.group, parts, [mine.shape] * ctx.group.size, ctx.what)
            mine = torch.stack(came).sum(0)
        return None, mine.contiguous(), None, None, None, None


def _send(group: Group, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], what: str) -> tuple[Tensor, ...]:
    each = len(tensors) // group.size
    dtypes = [x.dtype for x in tensors[:each]]
    flat = [_as_bytes(x) for x in tensors]
    out_sizes = [sum(map(len, flat[each * i : each * (i + 1)])) for i in range(group.size)]
    lengths = [_padded(_numel(shape) * dtypes[i % each].itemsize) for i, shape in enumerate(shapes)]
    in_sizes = [sum(lengths[each * i : each * (i + 1)]) for i in range(group.size)]
    outgoing = torch.cat(flat)
    incoming = outgoing.new_empty(sum(in_sizes))
    note_traffic(what, sum(out_sizes) - out_sizes[group.rank])
    with group.sending(what):
        dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=group.handle)
    found = []
    for i, (piece, shape) in enumerate(zip(incoming.split(lengths), shapes, strict=True)):
        dtype = dtypes[i % each]
        found.append(piece[: _numel(shape) * dtype.itemsize].view(dtype).view(tuple(shape)))
    return tuple(found)


_ALIGNED = 16  # bytes, so that every piece of a buffer can be seen in its dtype


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _as_bytes(x: Tensor) -> Tensor:
    data = x.detach().contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(data, (0, _padded(len(data)) - len(data)))


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
