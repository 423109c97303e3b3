"""Models spread over processes (DDP, FSDP2): what a wrapper has overlooked, and whole values of what is sharded.

Wrappers average and shard the parameters that they find when they wrap. Those that `apply` adds later would train on
each process by themselves, without an error; so the order is `apply`, then the wrapper, and the other one is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copy_whole", "is_sharded", "unreduced", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Is this a DTensor, as `fully_shard` makes of every parameter? Asked by name: the class is slow to import."""
    return any(base.__name__ == "DTensor" for base in type(tensor).__mro__)


def unreduced(parameters: Iterable[nn.Parameter]) -> int:
    """How many trainable parameters are unknown to the DDP wrapper whose forward is running; 0 outside of one."""
    wrapper = getattr(nn.parallel, "DistributedDataParallel", None)
    known = getattr(getattr(wrapper, "_active_ddp_module", None), "_module_parameters", None)
    if known is None:
        return 0
    seen = {id(parameter) for parameter in known}
    return sum(parameter.requires_grad and id(parameter) not in seen for parameter in parameters)


def whole(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Whole values on the CPU, and whether this process is the one to write them.

    Sharded tensors are gathered, so every process must call this; one of them, the first of the mesh, is to write.
    """
    first = True
    found = {}
    for name, tensor in tensors.items():
        value: Any = tensor.detach()
        if is_sharded(value):
            first = first and not any(value.device_mesh.get_coordinate())
            value = value.full_tensor()
        found[name] = value.to("cpu").contiguous()
    return found, first


def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor that may be sharded; then every process must call this with the same value."""
    into: Any = target
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements)
    with torch.no_grad():
        into.copy_(value)
