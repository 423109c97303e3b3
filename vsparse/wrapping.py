"""What others have put around a model: DDP and FSDP2, what they overlook, whole values of what is sharded; a compiler.

Wrappers average and shard the parameters that they find when they wrap. Those that `apply` adds later would train on
each process by themselves, without an error; so the order is `apply`, then the wrapper, and the other one is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copy_whole", "is_sharded", "refuse_fullgraph", "unreduced", "whole", "writes"]


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


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole values on the CPU. Sharded tensors are gathered, so every process must call this."""
    values: dict[str, Any] = {name: tensor.detach() for name, tensor in tensors.items()}
    return {name: (x.full_tensor() if is_sharded(x) else x).to("cpu").contiguous() for name, x in values.items()}


def writes(tensors: Iterable[Tensor]) -> bool:
    """Is this process the one to write, which is the first of a mesh? Where nothing is sharded, each one is."""
    found: Iterable[Any] = tensors
    return not any(is_sharded(x) and any(x.device_mesh.get_coordinate()) for x in found)


def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor that may be sharded; then every process must call this with the same value."""
    into: Any = target
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements)
    with torch.no_grad():
        into.copy_(value)


def refuse_fullgraph(module: nn.Module) -> None:
    """Refuse parts of a divided model that were compiled into one graph; where torch hides it, its own error follows.

    Raises:
        ValueError: naming the parts.
    """
    names = [name or type(part).__name__ for name, part in module.named_modules() if _is_fullgraph(part)]
    if names:
        raise ValueError(
            "context parallel: fullgraph must be False (as torch.compile and compile_repeated_blocks have it) where "
            f"processes share a video, got True for {', '.join(names)}; they exchange tensors inside the attention "
            "modules, which no graph holds"
        )


def _is_fullgraph(part: nn.Module) -> bool:
    """Of ``part.compile()`` and ``torch.compile(part)``: torch keeps the argument with the compiled function alone."""
    cells = getattr(part._compiled_call_impl, "__closure__", None) or ()
    contexts = [getattr(part, "dynamo_ctx", None), *(cell.cell_contents for cell in cells)]
    return any(getattr(x, "fullgraph", None) is True for x in contexts)
