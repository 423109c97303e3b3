"""Rows of the host contracts: hosts, methods and the phases they run in. A new host or method joins with a row here."""

from __future__ import annotations

import contextlib
import copy
import dataclasses as dc
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import vsparse
from vsparse.integrations.diffusers.hosts import HOSTS as CLAIMED
from vsparse.methods import SparseAttention
from vsparse.patterns import Stride, Window, same_frame

STEPS = 10
SHORT = 5
# AdaSpa's published shares over 5 steps: the first search is the last dense step (step 0), the second is step 2.
ADASPA = ["search", "reuse", "refresh", "reuse", "reuse"]
GRIDS = ((3, 9, 11), (5, 7, 13), (6, 10, 14))
SMALL = (4, 3, 7)


@dc.dataclass(frozen=True, kw_only=True)
class HostRow:
    """A tiny host of `tiny.HOSTS`.

    Args:
        model: Class name of its root. lengths: two text lengths, None when it always takes the whole text.
        padded: Padded text is part of its self-attention.
    """

    model: str
    lengths: tuple[int, int] | None = None
    padded: bool = False


@dc.dataclass(frozen=True, kw_only=True)
class MethodRow:
    """Options of a method on tiny grids.

    Args:
        everything: With them the patched host equals the host; None: the method cannot keep everything.
        sparse: With them some blocks are dropped.
    """

    everything: Mapping[str, Any] | None
    sparse: Mapping[str, Any]


_HOSTS = {
    "wan": HostRow(model="WanTransformer3DModel", lengths=(12, 3)),
    "wan_vace": HostRow(model="WanVACETransformer3DModel", lengths=(12, 3)),
    "hunyuan_video": HostRow(model="HunyuanVideoTransformer3DModel", lengths=(17, 3), padded=True),
    "hunyuan_video15": HostRow(model="HunyuanVideo15Transformer3DModel", lengths=(11, 2), padded=True),
    "cogvideox": HostRow(model="CogVideoXTransformer3DModel"),
}
HOSTS = {key: row for key, row in _HOSTS.items() if any(row.model in host.models for host in CLAIMED)}
# As published, but with their first layer sparse like all others.
_RADIAL = vsparse.Schedule(dense_steps=0.24)
_SVG = vsparse.Schedule(dense_steps=0.2)
_METHODS = {
    "dense": MethodRow(everything={}, sparse={}),
    "vsa": MethodRow(everything={"density": 1.0}, sparse={"density": 0.3, "tile": (2, 4, 4), "block": 16}),
    "adaspa": MethodRow(everything={"density": 1.0, "block": 16}, sparse={"density": 0.3, "block": 16}),
    "vmoba": MethodRow(
        everything={"frames": 2, "patch": (4, 5), "cube": (2, 4, 5), "top_k": (99, 99, 99)},
        sparse={"frames": 1, "patch": (3, 4), "cube": (1, 3, 4), "top_k": (1, 1, 2)},
    ),
    "dsv": MethodRow(
        everything={"density": 1.0, "tile": (2, 4, 4), "block": 16, "rank": 4},
        sparse={"density": 0.3, "adaptive": False, "stage": "sparse", "tile": (2, 2, 4), "block": 8, "rank": 4},
    ),
    "sta": MethodRow(
        everything={"window": (None, 99, 99), "tile": (2, 3, 4), "block": 8},
        sparse={"window": ((1, 1, 3), (1, 3, 1)), "tile": (1, 2, 2), "block": 4},
    ),
    "radial": MethodRow(
        everything={"decay_factor": 1e6, "adjacent": 1.0, "least": 1, "block": 16, "schedule": _RADIAL},
        sparse={"adjacent": 0.0, "least": 1, "sink_frames": 0, "block": 4, "schedule": _RADIAL},
    ),
    "svg": MethodRow(
        everything={"density": 1.0, "block": 16, "schedule": _SVG},
        sparse={"density": 0.4, "rows": 8, "sink_frames": 0, "block": 4, "schedule": _SVG},
    ),
    "svg2": MethodRow(
        everything={"mass": 1.0, "query_clusters": 5, "key_clusters": 9, "first_iterations": 3, "schedule": _SVG},
        sparse={"mass": 0.4, "query_clusters": 6, "key_clusters": 10, "first_iterations": 3, "schedule": _SVG},
    ),
    "attention_tile": MethodRow(everything={"global_frames": 99, "block": 16}, sparse={"global_frames": 1, "block": 4}),
    "sla": MethodRow(everything={"density": 1.0, "block": 16}, sparse={"density": 0.3, "block": 8}),
    "nabla": MethodRow(
        everything={"mass": 1.0, "tile": (1, 2, 3), "block": 4},
        sparse={"mass": 0.3, "window": (1, 1, 1), "tile": (1, 2, 2), "block": 4},
    ),
    "sparge": MethodRow(
        everything={"mass": 1.0, "block": 16},
        sparse={"mass": 0.3, "similarity": 0.12, "block": 8},
    ),
    "xattention": MethodRow(
        everything={"mass": 1.0, "stride": 4, "block": 16},
        sparse={"mass": 0.3, "stride": 4, "block": 16},
    ),
    "draft": MethodRow(
        everything={"density": 1.0, "tile": (1, 2, 3), "block": 4},
        sparse={"density": 0.2, "tile": (1, 2, 2), "block": 4},
    ),
    "jenga": MethodRow(
        everything={"density": 1.0, "block": 16},
        sparse={"density": 0.1, "mass": 0.1, "block": 4},
    ),
    "unicp": MethodRow(
        everything={"rank": 16},
        sparse={"windows": 3, "sliced": (False, False, False, True), "rank": 4, "ends": 0.0},
    ),
    "by_layer": MethodRow(
        everything={"parts": {"0-": ("nabla", {"mass": 1.0, "tile": (1, 2, 3), "block": 4})}},
        sparse={
            "parts": {
                "0": ("vsa", {"density": 0.3, "tile": (2, 4, 4), "block": 16}),
                "1-": ("nabla", {"mass": 0.3, "window": (1, 1, 1), "tile": (1, 2, 2), "block": 4}),
            }
        },
    ),
    "pattern": MethodRow(
        everything={"block": 16},
        sparse={"pattern": (Window(size=(1, 3, 3)), same_frame & Stride(step=2)), "tile": (1, 2, 2), "block": 4},
    ),
}
METHODS = {key: row for key, row in _METHODS.items() if key in vsparse.list_methods()}
SPARSE = tuple(key for key, row in METHODS.items() if row.sparse)

both = [(host, method) for host in HOSTS for method in METHODS]


def _thin() -> list[Any]:
    """Every method on Wan, every other host with one method and HunyuanVideo, whose text is padded, with two."""
    turns = itertools.cycle(key for key, row in METHODS.items() if row.sparse)
    others = [host for host in (*HOSTS, "hunyuan_video") if host != "wan"]
    kept = {("wan", method) for method in METHODS} | {(host, next(turns)) for host in others}
    return [row if row in kept else pytest.param(*row, marks=pytest.mark.full) for row in both]


thin = _thin()


# ---- hosts -------------------------------------------------------------------------------------------------------


@functools.cache
def _stock(host: str, options: tuple[tuple[str, Any], ...]) -> tuple[nn.Module, tiny.Inputs]:
    return tiny.HOSTS[host](**dict(options))


def build(host: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, tiny.Inputs]:
    """A stock host of its own, and what makes inputs for it; small heads unless told otherwise."""
    model, inputs = _stock(host, tuple({"head_dim": 16, **options}.items()))
    return cast(copy.deepcopy(model), dtype), functools.partial(inputs, dtype=dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A host as ``from_pretrained(torch_dtype=...)`` gives it: some parts stay float32 beside a half precision."""
    kept = (getattr(model, "_keep_in_fp32_modules", None) or []) if dtype.itemsize < 4 else []
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    return model


def prompt(
    host: str, inputs: tiny.Inputs, grid: tiny.Size = SMALL, *, batch: int = 1, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Inputs whose samples have text of different length, where the host has lengths."""
    lengths = HOSTS[host].lengths
    chosen = None if lengths is None else [lengths[(i + seed) % 2] for i in range(batch)]
    return inputs(batch, grid, chosen, seed=seed, **options)


def forward(model: nn.Module, values: Mapping[str, Any]) -> Tensor:
    """The prediction of one call without gradient."""
    with torch.no_grad():
        return model(**values)[0]


def tokens(model: nn.Module, values: Mapping[str, Any]) -> int:
    """Length of the sequence that the host attends over."""
    with vsparse.apply(model, "dense") as patch:
        forward(model, values)
        call = patch.sites[0].call
        assert call is not None
        return call.grid.tokens


def cast_inputs(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs in another floating dtype."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}


def randomise(patch: vsparse.Patch, seed: int = 0) -> vsparse.Patch:
    """Trained parts that are not zero, so that they show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return patch


def sparse(model: object, method: str, **more: Any) -> vsparse.Patch:
    """A patch that drops blocks, with trained parts that show."""
    return randomise(vsparse.apply(model, method, **METHODS[method].sparse, **more))


@contextlib.contextmanager
def patched(model: object, method: str, order: str, change: Callable[[], object]) -> Iterator[vsparse.Patch]:
    """A sparse patch, and something else that is done to the model ``order`` = "before" or "after" it."""
    if order == "before":
        change()
    with sparse(model, method) as patch:
        if order == "after":
            change()
        yield patch


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the host's own parameters and of the patch's, by name; they are taken away."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


# ---- phases ------------------------------------------------------------------------------------------------------


@functools.cache
def phases(method: str) -> dict[str, int]:
    """Phase -> first step of a run of `STEPS` steps that has it, with the sparse options of the method's row and its
    published schedule."""
    return first_steps(vsparse.list_methods()[method](**_fields(METHODS[method].sparse)))


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "schedule"}


def first_steps(method: vsparse.Method) -> dict[str, int]:
    """`phases` of a method with any options."""
    first: dict[str, int] = {}
    known: dict[str, Any] = {"steps": STEPS, "layer": 10**6, "filled": False, "stamp": None}
    for step in range(STEPS):
        phase = method.phase(method.default_schedule, step=step, **known)
        if phase in method.state_phases:
            known |= {"filled": True, "stamp": step}
        first.setdefault(phase, step)
    return first


def sparse_phases(method: str, options: Mapping[str, Any] | None = None) -> list[str]:
    """Phases of a method that its own code runs; "dense" for one that has none."""
    first = phases(method) if options is None else first_steps(vsparse.list_methods()[method](**_fields(options)))
    return [phase for phase in first if phase != "dense"] or ["dense"]


def walk(patch: vsparse.Patch, phase: str, call: Callable[[str, int], Any], branches: Iterable[str]) -> list[Any]:
    """Run the steps up to the first one with ``phase``, and hand back what ``call(branch, step)`` gives there.

    Steps before it run without gradient.
    """
    known = first_steps(patch.plan.method)
    last = known[phase]
    results: list[Any] = []
    with patch.generation(STEPS):
        for step in sorted({known[before] for before in known if known[before] <= last}):
            for branch in branches:
                with patch.step(step, branch=branch), torch.set_grad_enabled(step == last and torch.is_grad_enabled()):
                    results.append(call(branch, step))
    return results[-len(list(branches)) :]


@contextlib.contextmanager
def heard(*models: nn.Module) -> Iterator[list[tuple[int, str]]]:
    """Index of the model and phase of its sites, for every forward."""
    found: list[tuple[int, str]] = []

    def listen(index: int, model: nn.Module) -> Any:
        def hook(*_: object) -> None:
            (phase,) = {site.phase for _, site in sites(model)}
            found.append((index, phase))

        return model.register_forward_hook(hook)

    handles = [listen(index, model) for index, model in enumerate(models)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def generation(patch: vsparse.Patch, model: nn.Module, values: Mapping[str, Any], steps: int = STEPS) -> list[Tensor]:
    """A whole custom denoising loop with two branches of the same input; one output for each call."""
    found = []
    with patch.generation(steps):
        for i, branch in itertools.product(range(steps), ("cond", "uncond")):
            with patch.step(i, branch=branch):
                found.append(forward(model, values))
    return found


def tour(patch: vsparse.Patch, model: nn.Module, values: Mapping[str, Any]) -> list[Tensor]:
    """One call of each phase of the method and of each of two branches, of the same input."""
    found = []
    with patch.generation(STEPS):
        for i, branch in itertools.product(sorted(first_steps(patch.plan.method).values()), ("cond", "uncond")):
            with patch.step(i, branch=branch):
                found.append(forward(model, values))
    return found


# ---- footprints --------------------------------------------------------------------------------------------------

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def footprint(root: nn.Module) -> dict[str, Any]:
    """Everything by which two moments of a model differ: objects, attributes, hooks, keys, values."""
    found: dict[str, Any] = {"keys": list(root.state_dict())}
    for name, module in root.named_modules():
        hooks = {table: [(key, id(hook)) for key, hook in getattr(module, table).items()] for table in _HOOKS}
        attributes = {key: id(value) for key, value in module.__dict__.items() if not isinstance(value, dict)}
        children = {key: id(value) for key, value in module._modules.items()}
        own = {
            key: (id(x), x._version, x.requires_grad)
            for key, x in [*module._parameters.items(), *module._buffers.items()]
            if x is not None
        }
        found[name] = (id(module), type(module), attributes, hooks, children, own)
    return found


# ---- products ----------------------------------------------------------------------------------------------------


def product(**axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """All combinations, in the order of the axes."""
    return list(itertools.product(*(list(axis) for axis in axes.values())))


def pairwise(rows: list[tuple[Any, ...]], setting: slice = slice(0)) -> list[tuple[Any, ...]]:
    """A few of the rows that hold every pair of values which any row holds; greedy, always the same choice.

    Args:
        setting: Entries of a row that are expensive to prepare: of rows as good, one that shares them is taken.
    """

    def pairs(row: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
        return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}

    missing = set().union(*map(pairs, rows))
    chosen: list[tuple[Any, ...]] = []
    prepared: set[tuple[Any, ...]] = set()
    while missing:
        best = max(rows, key=lambda row: (len(pairs(row) & missing), row[setting] in prepared))
        chosen.append(best)
        prepared.add(best[setting])
        missing -= pairs(best)
    return chosen


def sites(model: nn.Module) -> Iterator[tuple[str, SparseAttention]]:
    """Our modules in a host, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseAttention))
