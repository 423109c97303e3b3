"""Which parameters learn, at which rate, with which optimiser; rates are a function of the step."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn

__all__ = ["OptimiserSettings", "make_optimisers", "set_rates"]


@dc.dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """How parameters move.

    Args:
        name: "adamw", or "muon": Muon (torch.optim.Muon, its rate scaled to AdamW's) for the matrices of the model's
            blocks and AdamW for everything else. Muon needs whole matrices and does not run on sharded ones.
        learning_rate: Of the model's own parameters, or of LoRA. method_learning_rate: of what the method has added
            (gates, predictors); None: the same.
        weight_decay: On matrices; vectors (norms, biases, modulations) have none.
        beta1, beta2, eps: Of AdamW. momentum: of Muon.
        schedule: Shape of the rate after the warm-up: "constant", or "linear" or "cosine" downwards.
        final: Share of the rate that is left at the last step.
        warmup: Steps in which the rate rises to its full value.

    Raises:
        ValueError: a value out of range.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-5
    method_learning_rate: float | None = None
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        for name, words in (("name", ("adamw", "muon")), ("schedule", ("constant", "linear", "cosine"))):
            if getattr(self, name) not in words:
                raise ValueError(f"optimiser: {name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "method_learning_rate", "weight_decay", "eps"):
            value = getattr(self, name)
            if not (value is None or value >= 0.0) or (name in ("learning_rate", "eps") and value == 0.0):
                raise ValueError(f"optimiser: {name} must be positive, got {value!r}")
        for name in ("beta1", "beta2", "momentum", "final"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"optimiser: {name} must lie in [0, 1], got {getattr(self, name)!r}")
        if self.warmup < 0:
            raise ValueError(f"optimiser: warmup must be a number of steps >= 0, got {self.warmup!r}")

    def factor(self, step: int, steps: int) -> float:
        """Share of the full rate at a 0-based step of ``steps``."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, steps - 1 - self.warmup)
        shape = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return self.final + (1.0 - self.final) * shape


def make_optimisers(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimiserSettings, *, added: Sequence[str] = ()
) -> list[torch.optim.Optimizer]:
    """Optimisers for named parameters, frozen ones left out.

    Args:
        parameters: Names and parameters of the model. added: names of those that the method has added.

    Raises:
        ValueError: nothing learns.
    """
    mine = frozenset(added)
    learning = [(name, x) for name, x in parameters if x.requires_grad]
    if not learning:
        raise ValueError("nothing learns: every parameter is frozen, and the method has added none")
    muon = [(name, x) for name, x in learning if settings.name == "muon" and x.ndim == 2 and "blocks." in name]
    chosen = {id(x) for _, x in muon}
    rest = [(name, x) for name, x in learning if id(x) not in chosen]
    found: list[torch.optim.Optimizer] = []
    if rest:
        groups = _groups(rest, mine, settings)
        betas = (settings.beta1, settings.beta2)
        found.append(torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps))
    if muon:
        found.append(
            torch.optim.Muon(
                _groups(muon, mine, settings),
                lr=settings.learning_rate,
                momentum=settings.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return found


def _groups(
    named: Sequence[tuple[str, nn.Parameter]], added: frozenset[str], settings: OptimiserSettings
) -> list[dict[str, object]]:
    """Parameters by rate and decay; ``full_rate`` is what the schedule scales."""
    faster = settings.method_learning_rate
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, x in named:
        rate = faster if faster is not None and name in added else settings.learning_rate
        found.setdefault((rate, settings.weight_decay if x.ndim > 1 else 0.0), []).append(x)
    return [
        {"params": group, "lr": rate, "weight_decay": decay, "full_rate": rate}
        for (rate, decay), group in found.items()
    ]


def set_rates(optimisers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Give every group its share of its full rate."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["full_rate"] * factor
