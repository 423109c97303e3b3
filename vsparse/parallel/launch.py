"""Joining the processes that torchrun has started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from vsparse.parallel.context import ContextParallel

__all__ = ["joined"]


@contextlib.contextmanager
def joined(setting: ContextParallel) -> Iterator[tuple[int, str | None]]:
    """Be one of the processes of a video until the end of the block.

    Args:
        setting: Of which all processes take part.

    Yields:
        The number of this process, and its device: a GPU of its own where there are any, else None.

    Raises:
        ValueError: started without torchrun, or with another number of processes than the setting has.
    """
    if setting.size == 1:
        yield 0, None
        return
    mine = not dist.is_initialized()
    if mine and not dist.is_torchelastic_launched():
        raise ValueError(_refusal(setting, 1))
    device = None
    if torch.cuda.is_available():
        device = f"cuda:{dist.get_node_local_rank(fallback_rank=0)}"
        torch.cuda.set_device(device)
    if mine:
        dist.init_process_group("nccl" if device else "gloo")
    try:
        if dist.get_world_size() != setting.size:
            raise ValueError(_refusal(setting, dist.get_world_size()))
        yield dist.get_rank(), device
    finally:
        if mine:
            dist.destroy_process_group()


def _refusal(setting: ContextParallel, world: int) -> str:
    return (
        f"context parallel: {setting} takes {setting.size} processes, not {world}; start with "
        f"torchrun --nproc-per-node {setting.size} -m vsparse"
    )
