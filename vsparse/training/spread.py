"""One model over several processes: a copy in each (DDP), or a part in each (FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["spread"]

Held = Callable[[], contextlib.AbstractContextManager[None]]


def spread(model: nn.Module, accelerator: Any, *, shard: bool) -> tuple[nn.Module, Held]:
    """Put a model on its device, and wrap or shard it where there are several processes; optimisers come after it.

    Args:
        model: Patched, with whatever learns marked. accelerator: of accelerate.
        shard: FSDP2, one unit for each of the model's blocks (``_no_split_modules``, as diffusers names them) and one
            for the rest; weights are gathered in the dtype that they are kept in.

    Returns:
        The model to call, and a context in which gradients are not exchanged yet (accumulation).

    Raises:
        ValueError: FSDP of version 1 was asked for; ``shard`` for a model that names no blocks.
    """
    asked = accelerator.distributed_type.value == "FSDP"
    if asked and not accelerator.is_fsdp2:
        raise ValueError("accelerate is configured for FSDP of version 1; set fsdp_version: 2")
    model.to(accelerator.device)
    if accelerator.num_processes == 1:
        return model, contextlib.nullcontext
    if not (shard or asked):
        wrapped = _replicated(model, accelerator)
        return wrapped, wrapped.no_sync
    from torch.distributed.fsdp import fully_shard

    kinds = frozenset(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise ValueError(f"shard: {type(model).__name__} names no blocks (_no_split_modules) to shard by")
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    sharded: Any = model

    @contextlib.contextmanager
    def held() -> Iterator[None]:
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    return model, held


def _replicated(model: nn.Module, accelerator: Any) -> Any:
    """DDP. Which parameters get a gradient is learnt from the first step and stays: a method's own losses do not pass
    the output, where DDP would look for them.
    """
    devices = None if accelerator.device.type == "cpu" else [accelerator.local_process_index]
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, static_graph=True)
