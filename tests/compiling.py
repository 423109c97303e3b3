"""Compiling a host as users do, and counting the graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

WAYS = ("blocks", "model")


class Counted:
    """A backend that runs the traced graph as it is and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def blocks(model: nn.Module) -> list[nn.Module]:
    return [block for name, stack in model.named_children() if name.endswith("blocks") for block in stack.children()]


def compile_blocks(model: nn.Module, backend: Any, *, fullgraph: bool = False) -> None:
    """What ``compile_repeated_blocks`` does; CogVideoX names no blocks of its own to it."""
    torch.compiler.reset()
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=fullgraph, backend=backend)
    else:
        for block in blocks(model):
            block.compile(fullgraph=fullgraph, backend=backend)


def compiled(model: nn.Module, way: str, backend: Any) -> Any:
    """What to call: the model with its "blocks" compiled, or with a compiler around the whole "model"."""
    if way == "blocks":
        compile_blocks(model, backend)
        return model
    torch.compiler.reset()
    return torch.compile(model, backend=backend)
