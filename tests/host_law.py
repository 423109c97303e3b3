"""The numerics law through a whole host: is a patched host as exact as the host itself?

Truth is the stock host with only its self-attention in float64. The reference is the stock host in the working dtype.
How far rounding carries through a network is chance: the same exact attention in another order of the keys, or merged
from two parts, moves a small gradient several times as far. So the reference is a handful of such runs, and its error
is the worst of theirs. Outputs and gradients of inputs obey the law one by one; the gradients of the parameters, dozens
of tensors with as few as one number in which an error can show, obey it together: each error in units of the
reference's, root mean square over the parameters.
"""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from oracle import ulp_floor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

REORDERED = 4
MERGED = 3

Run = Mapping[str, Tensor]


class SelfAttention(TorchFunctionMode):
    """Exchanges the attention of ``tokens`` queries over as many keys; cross-attention and text stay stock."""

    def __init__(self, tokens: int, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.tokens, self.attend, self.calls = tokens, attend, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs.update(zip(("query", "key", "value"), args, strict=False))
            if kwargs["query"].shape[-2] == kwargs["key"].shape[-2] == self.tokens:
                self.calls += 1
                return self.attend(func, **kwargs)
            args = ()
        return func(*args, **kwargs)


def in_float64(attend: Any, *, query: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
    """The same call with float64 inputs, and its output in the dtype that the host expects."""
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in rest.items()}
    return attend(query=query.double(), attn_mask=attn_mask, **wide).to(query.dtype)


def reordered(seed: int) -> Callable[..., Tensor]:
    """The same attention with the keys in another order: exact on paper, rounded differently."""
    generator = torch.Generator().manual_seed(seed)

    def run(attend: Any, *, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        order = torch.randperm(key.shape[-2], generator=generator)
        mask = None if attn_mask is None else attn_mask[..., order]
        return attend(key=key[..., order, :], value=value[..., order, :], attn_mask=mask, **rest)

    return run


def merged(seed: int) -> Callable[..., Tensor]:
    """The same attention over two disjoint sets of keys, each in the working dtype, merged by their LSE."""
    generator = torch.Generator().manual_seed(seed)

    def run(
        _: Any, *, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any
    ) -> Tensor:
        assert not any(rest.values()), rest
        scores = (query.float() @ key.float().transpose(-1, -2)) * query.shape[-1] ** -0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        first = torch.rand(key.shape[-2], generator=generator) < 0.5
        parts = [scores.masked_fill(~mine, -torch.inf) for mine in (first, ~first)]
        lse = torch.stack([part.logsumexp(-1) for part in parts])
        weights = (lse - lse.logsumexp(0)).exp()[..., None]
        outs = [
            ((part - x[..., None]).exp() @ value.float()).to(query.dtype) for part, x in zip(parts, lse, strict=True)
        ]
        return (weights[0] * outs[0].float() + weights[1] * outs[1].float()).to(query.dtype)

    return run


def trained(model: nn.Module, run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """What ``run(*inputs)`` gives, and every gradient of a fixed random combination of it; none of ours."""
    for parameter in model.parameters():
        parameter.grad = None
    hidden = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = run(*hidden)
    generator = torch.Generator().manual_seed(5)
    torch.stack([(y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() for y in outputs]).sum().backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(hidden) if x.grad is not None}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".vsparse." not in name}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def stock_runs(run: Callable[[], Any], tokens: int) -> list[Any]:
    """What ``run`` gives with the stock attention, and with ways to compute it that are as good."""
    found = [run()]
    for attend in (*map(reordered, range(REORDERED)), *map(merged, range(MERGED))):
        with SelfAttention(tokens, attend):
            found.append(run())
    return found


@dc.dataclass(frozen=True)
class Standard:
    """Truth and reference of one host and set of inputs."""

    truth: Run
    references: tuple[Run, ...]

    @classmethod
    def of(cls, run: Callable[[], dict[str, Tensor]], tokens: int) -> Standard:
        """Run the stock host in float64 attention, as it is, and with reordered keys."""
        with SelfAttention(tokens, in_float64) as exact:
            truth = run()
        assert exact.calls, "no attention was exchanged: the truth would be the reference"
        return cls(truth, tuple(stock_runs(run, tokens)))

    @functools.cached_property
    def units(self) -> dict[str, float]:
        """The error of the reference in each tensor, with the floor; many candidates are held to one standard."""
        return {
            name: max(_error(reference[name], exact) for reference in self.references) + ulp_floor(exact) / 2
            for name, exact in self.truth.items()
        }

    def ratios(self, candidate: Run) -> dict[str, float]:
        """Error of each tensor in units of the reference's, at most 2 by the law of `oracle`."""
        assert candidate.keys() == self.truth.keys(), candidate.keys() ^ self.truth.keys()
        found = {}
        for name, exact in self.truth.items():
            x = candidate[name]
            assert x.shape == exact.shape, (name, x.shape, exact.shape)
            assert x.dtype == exact.dtype, (name, x.dtype, exact.dtype)
            unit, mine = self.units[name], _error(x, exact)
            found[name] = mine / unit if unit else float("inf") if mine else 0.0
        return found

    def check(self, candidate: Run) -> None:
        """Assert the law.

        Raises:
            AssertionError: names what is worst.
        """
        ratios = self.ratios(candidate)
        alone = {name: ratio for name, ratio in ratios.items() if name.startswith(("output", "gradient of"))}
        broken = {name: ratio for name, ratio in alone.items() if not ratio <= 2}
        assert not broken, f"error in units of the reference's, at most 2: {broken}"
        together = torch.tensor([ratio for name, ratio in ratios.items() if name not in alone], dtype=torch.float64)
        mean = float(together.square().mean().sqrt())
        worst = sorted(ratios.items(), key=lambda row: -row[1])[:3]
        assert mean <= 2, (
            f"gradients of the parameters are off by {mean:.2f} times the reference's error, worst {worst}"
        )


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).abs().max())
