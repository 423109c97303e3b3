"""Where a step went wrong: the first module whose output is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NotFiniteError", "first_not_finite"]


class NotFiniteError(RuntimeError):
    """Loss or gradient was NaN or infinite; weights and checkpoints are those before the step."""


def first_not_finite(model: nn.Module, again: Callable[[], object]) -> str | None:
    """Name the first module that turns finite inputs into NaN or infinity, or that already gets them.

    Args:
        model: Whose modules are watched. again: repeats the forward.
    """
    found: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not found and not _finite(output):
            origin = "its output, from finite inputs" if _finite(inputs) else "already its inputs"
            found.append(f"{names[module] or type(module).__name__} ({origin})")

    # Children finish before their parents, so the first to complain is the innermost.
    handles = [module.register_forward_hook(watch) for module in names]
    try:
        with torch.no_grad():
            again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _finite(values: Any) -> bool:
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(values.isfinite().all())
    if isinstance(values, tuple | list):
        return all(_finite(x) for x in values)
    if isinstance(values, dict):
        return all(_finite(x) for x in values.values())
    return True
