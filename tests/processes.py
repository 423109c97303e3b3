"""A few processes that talk over gloo: started when a test first asks, then used by every test of the session."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from vsparse.parallel.collectives import Group

LIMIT = 240.0  # seconds that a task may take before its processes are ended

Task = Callable[..., Any]


class Pool:
    """Processes that run module-level functions of the test folder, each the same one at the same time."""

    def __init__(self, count: int) -> None:
        context = torch.multiprocessing.get_context("forkserver")
        # Most of the start, once for all of them: the first call of an op, and the first model of diffusers.
        context.set_forkserver_preload(["torch._dynamo", "diffusers.models.transformers.transformer_wan"])
        self._folder = tempfile.mkdtemp()
        pairs = [context.Pipe() for _ in range(count)]
        self._pipes = [mine for mine, _ in pairs]
        store = os.path.join(self._folder, "store")
        self._processes = [
            context.Process(target=_serve, args=(rank, count, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def run(self, task: Task, *args: Any) -> list[Any]:
        """What the processes return, by rank; ``task`` and ``args`` are pickled, results hold no tensors.

        Raises:
            AssertionError: with the traceback of the first process that failed; the pool is closed then.
        """
        for pipe in self._pipes:
            pipe.send((task, args))
        results: dict[int, Any] = {}
        while len(results) < len(self._pipes):
            ready = wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in results], LIMIT)
            if not ready:
                self.close()
                raise AssertionError(f"no answer within {LIMIT:.0f} seconds")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                failed, value = self._receive(rank)
                if failed:
                    self.close()
                    raise AssertionError(f"process {rank}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(self._pipes))]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._pipes[rank].recv()
        except EOFError:
            return True, f"ended with code {self._processes[rank].exitcode}"

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
            process.join()


Get = Callable[[], Pool]
"""Starts the pool where it does not run, and returns it."""


@functools.cache
def group(size: int) -> Group:
    """In a process of a pool: the neighbours, so many, among whom it is; every process must ask."""
    handle, _ = torch.distributed.new_subgroups(size)
    return Group(size=size, rank=torch.distributed.get_rank(handle), handle=handle, name=f"group of {size}")


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded; every process must ask."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=LIMIT)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=limit
    )
    with contextlib.suppress(EOFError):
        while True:
            task, args = pipe.recv()
            try:
                answer = (False, task(*args))
            except Exception:  # noqa: BLE001 - whatever it is, the test that asked must see it
                answer = (True, traceback.format_exc())
            pipe.send(answer)


@contextlib.contextmanager
def pool(count: int = 2) -> Iterator[Get]:
    """A function that starts the pool at its first call, and again where a failure has closed it."""
    made: list[Pool] = []

    def get() -> Pool:
        if not made or not all(process.is_alive() for process in made[-1]._processes):
            made.append(Pool(count))
        return made[-1]

    try:
        yield get
    finally:
        for one in made:
            one.close()
