"""With everything kept, a patched host equals the host: outputs and all gradients, by the law."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import rows
import torch
from host_law import Standard, trained
from torch import nn

import vsparse

# Options beside those of the rows, under a name of their own.
VARIANTS = {
    "vsa, tiles of two blocks": ("vsa", {"density": 1.0, "tile": (2, 4, 4), "block": 16}),
    "adaspa, even heads": ("adaspa", {"density": 1.0, "block": 32, "head_adaptive": False}),
}
KINDS = {key: (key, row.everything) for key, row in rows.METHODS.items() if row.everything is not None} | VARIANTS
CASES = [(kind, phase) for kind, (method, options) in KINDS.items() for phase in rows.sparse_phases(method, options)]
MODES = ("one", "batched", "separate")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRODUCT = rows.product(case=CASES, host=rows.HOSTS, grid=rows.GRIDS, mode=MODES, dtype=DTYPES)
USUAL = set(rows.pairwise(PRODUCT, setting=slice(1, None)))
# Texts of different length within one batch meet every method on every host that pads them.
USUAL |= {row for row in PRODUCT if rows.HOSTS[row[1]].padded and row[2:] == (rows.GRIDS[0], "batched", "fp32")}


def _name(row: tuple[Any, ...]) -> str:
    (kind, phase), host, grid, mode, dtype = row
    return f"{kind}-{phase}-{host}-{'x'.join(map(str, grid))}-{mode}-{dtype}"


def _marks(row: tuple[Any, ...]) -> list[pytest.MarkDecorator]:
    """Rows that share a host and its inputs run in one worker, where what is measured of it is measured once."""
    together = pytest.mark.xdist_group(f"density one, {row[1:]}")
    return [together] if row in USUAL else [together, pytest.mark.full]


PARAMETERS = [
    pytest.param(*row, id=_name(row), marks=_marks(row)) for row in sorted(PRODUCT, key=lambda row: (row[1:], row[0]))
]


def passes(host: str, inputs: Any, grid: Any, mode: str) -> list[tuple[str, dict[str, Any]]]:
    """Branch and inputs of each call of a step: guidance in one batch of two prompts, or in two calls."""
    if mode == "separate":
        return [(name, rows.prompt(host, inputs, grid, seed=seed)) for seed, name in enumerate(("cond", "uncond"))]
    return [("cond", rows.prompt(host, inputs, grid, batch=1 if mode == "one" else 2))]


@functools.lru_cache(maxsize=4)
def standard(host: str, grid: Any, mode: str, dtype: str) -> tuple[nn.Module, list[Any], Standard]:
    """A stock host, what it is called with, and how exact it is."""
    model, inputs = rows.build(host, dtype=DTYPES[dtype])
    calls = passes(host, inputs, grid, mode)
    tokens = rows.tokens(model, calls[0][1])

    def run(*hidden: torch.Tensor) -> list[torch.Tensor]:
        return [_call(model, values, x) for (_, values), x in zip(calls, hidden, strict=True)]

    given = [values["hidden_states"] for _, values in calls]
    return model, calls, Standard.of(functools.partial(trained, model, run, given), tokens)


def _call(model: nn.Module, values: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    return model(**{**values, "hidden_states": hidden})[0]


@pytest.mark.parametrize(("case", "host", "grid", "mode", "dtype"), PARAMETERS)
def test_equals_the_host(case: tuple[str, str], host: str, grid: Any, mode: str, dtype: str) -> None:
    model, calls, law = standard(host, grid, mode, dtype)
    (kind, phase), by_branch = case, dict(calls)
    method, options = KINDS[kind]
    with vsparse.apply(model, method, **options) as patch:

        def run(*hidden: torch.Tensor) -> list[torch.Tensor]:
            given = dict(zip(by_branch, hidden, strict=True))
            return rows.walk(patch, phase, lambda branch, _: _call(model, by_branch[branch], given[branch]), by_branch)

        found = trained(model, run, [values["hidden_states"] for values in by_branch.values()])
        stats = patch.stats()
        dense = sum(patch.plan.schedule.dense_layer(site.site.layer) for site in patch.sites) if phase != "dense" else 0
        assert stats["calls"][phase] == (len(patch.sites) - dense) * len(calls)
        assert stats["density"] == 1.0
    law.check(found)
