"""Joining the processes that torchrun has started."""

from __future__ import annotations

import contextlib
import os
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
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != setting.size:
        raise ValueError(
            f"context parallel: {setting} takes {setting.size} processes, not {world}; start with "
            f"torchrun --nproc-per-node {setting.size} -m vsparse"
        )
    device = None
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if device else "gloo")
    try:
        yield dist.get_rank(), device
    finally:
        if mine:
            dist.destroy_process_group()
