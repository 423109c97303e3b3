"""plan, apply, Patch: find the attention sites of a model, check everything, only then change it, and undo it exactly."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import functools
import importlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vsparse import adapter, backend
from vsparse.cost import AttentionCost, attention_cost
from vsparse.geometry import Grid
from vsparse.layouts import Layout
from vsparse.methods import Method, Site, SparseAttention, get_method
from vsparse.runtime import Reading, Runtime, StepSource, Tracker, kernel_reasons
from vsparse.schedule import Schedule

__all__ = ["Claim", "HostAdapter", "Patch", "Plan", "Root", "apply", "load", "patch_of", "plan"]

# Host adapters, imported by name on first use: a host that is not installed costs nothing.
_HOSTS = ("vsparse.integrations.diffusers",)
_ATTRIBUTE = "_vsparse"


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Claim:
    """One attention module that a host adapter offers: its site, the module, and why it cannot be patched."""

    site: Site
    module: nn.Module
    reasons: tuple[str, ...] = ()


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Root:
    """One model of a target: its name there, the module, its claims."""

    name: str
    module: nn.Module
    claims: tuple[Claim, ...]


class HostAdapter(Protocol):
    """What `apply` needs from a host library. A host is a module with these functions."""

    def roots(self, target: object) -> list[Root] | None:
        """The models of a target with their claims, or None when the target is none of this host's."""

    def known(self) -> list[str]:
        """Names of the models that this host can patch, for messages."""

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arguments of a root's forward by name."""

    def read(self, module: nn.Module, arguments: Mapping[str, Any]) -> Reading:
        """What a forward's arguments say."""

    def grid(self, target: object, root: Root, height: int, width: int, num_frames: int) -> Grid:
        """The lattice for a size in pixels."""

    def source(self, target: object, roots: Sequence[Root]) -> StepSource:
        """Where denoising steps and branches are heard."""

    def install(self, claim: Claim, sparse: SparseAttention) -> Callable[[], None]:
        """Route a module's attention through ``sparse``; returns the undo."""

    def uninstall(self, module: nn.Module, sparse: SparseAttention) -> None:
        """Undo `install` in a copied root, from what the copy carries."""

    def intact(self, module: nn.Module, sparse: SparseAttention) -> str | None:
        """Why a site of a root no longer runs our code, or None."""

    def listen(self, root: Root, runtime: Runtime) -> Callable[[], None]:
        """Hear steps and saves of one root; returns the undo."""

    def unlisten(self, module: nn.Module) -> None:
        """Undo `listen` in a copied root."""

    def placement(self, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        """Device and compute dtype for parameters that are added to an attention module."""


@dc.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `apply` would do.

    Args:
        method, schedule: What would be applied. sites: claimed sites, all roots. skipped: site name -> reasons.
        new_parameters: Parameters that the method adds. kernel: implementation that would run, or None.
        grid, density, cost, state_bytes: For the given size; None without one.
    """

    method: Method
    schedule: Schedule
    sites: tuple[Site, ...]
    skipped: Mapping[str, tuple[str, ...]]
    new_parameters: int
    kernel: str | None
    grid: Grid | None = None
    density: float | None = None
    cost: AttentionCost | None = None
    state_bytes: int | None = None

    def __str__(self) -> str:
        rows = [
            f"method           {self.method}",
            f"schedule         {self.schedule}",
            f"attention sites  {len(self.sites)}" + (f", {len(self.skipped)} skipped" if self.skipped else ""),
            f"kernel           {self.kernel or 'none'}",
            f"new parameters   {self.new_parameters:,}",
        ]
        if self.grid is not None and self.cost is not None:
            g, cost = self.grid, self.cost
            rows += [
                f"grid             {g.t} x {g.h} x {g.w} = {g.video:,} tokens" + (f" + {g.text} text" if g.text else ""),
                f"density          {self.density:.4f} in a sparse call, {cost.density:.4f} over all calls",
                f"attention FLOPs  {cost.sparse:.3e} of {cost.dense:.3e} dense ({cost.sparse / cost.dense:.1%}), "
                f"search {cost.search:.3e}",
                f"state            {(self.state_bytes or 0) / 2**20:.1f} MiB per branch",
            ]
        rows += [f"skipped          {name}: {'; '.join(why)}" for name, why in self.skipped.items()]
        return "\n".join(rows)


class Patch:
    """A patched target. A context manager: leaving it removes the patch."""

    def __init__(self, plan: Plan, runtimes: list[Runtime], tracker: Tracker, undo: list[Callable[[], None]]) -> None:
        self.plan = plan
        self._runtimes, self._tracker, self._undo, self._removed = runtimes, tracker, undo, False

    def __repr__(self) -> str:
        state = "removed" if self._removed else f"{len(self.plan.sites)} sites"
        return f"<vsparse.Patch {self.plan.method.key}: {state}>"

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def sites(self) -> list[SparseAttention]:
        """The modules of all sites."""
        return [site for runtime in self._runtimes for site in runtime.sites]

    def stats(self) -> dict[str, Any]:
        """What ran since the patch was applied; the only call that reads tensors from the device.

        Returns:
            ``density``: executed share of valid token pairs over all calls, dense ones included; ``sparse_density``:
            over the sparse calls, None without any; ``sites``: site -> its sparse density; ``calls``: phase -> calls of
            sites; ``searches``; ``fallbacks``: reason -> forwards that ran dense because of it; ``kernel``;
            ``state_bytes``.
        """
        computed = possible = dense = 0.0
        sites: dict[str, float] = {}
        calls: dict[str, int] = {}
        fallbacks: dict[str, int] = {}
        for runtime in self._runtimes:
            for name, pairs in runtime.pairs.items():
                done, whole = pairs.tolist()
                computed, possible = computed + done, possible + whole
                sites[f"{runtime.name}.{name}"] = done / whole
            dense += float(runtime.dense_pairs)
            for mine, total in ((runtime.phases, calls), (runtime.fallbacks, fallbacks)):
                for key, count in mine.items():
                    total[key] = total.get(key, 0) + count
        everything = possible + dense
        return {
            "density": (computed + dense) / everything if everything else None,
            "sparse_density": computed / possible if possible else None,
            "sites": sites,
            "calls": calls,
            "searches": calls.get("search", 0) + calls.get("refresh", 0),
            "fallbacks": fallbacks,
            "kernel": self.plan.kernel,
            "state_bytes": sum(runtime.state_bytes() for runtime in self._runtimes),
        }

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that the method added, by root and site."""
        for runtime in self._runtimes:
            for site in runtime.sites:
                for name, parameter in site.named_parameters():
                    yield f"{runtime.name}.{site.site.name}.{name}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that the method added: what to hand to the optimiser beside the host's."""
        return [parameter for _, parameter in self.named_parameters()]

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Losses that a method asks to add to the training loss; none of the present methods has any."""
        return {}

    def generation(self, num_steps: int) -> contextlib.AbstractContextManager[None]:
        """One run of a custom denoising loop; state is dropped when it ends."""
        return self._generation(num_steps)

    @contextlib.contextmanager
    def _generation(self, num_steps: int) -> Iterator[None]:
        with self._tracker.generation(num_steps):
            try:
                yield
            finally:
                self.reset()

    def step(self, i: int, *, branch: str = "cond") -> contextlib.AbstractContextManager[None]:
        """One model call of a custom loop: denoising step ``i``, CFG branch ``branch``."""
        return self._tracker.step(i, branch=branch)

    def training_step(self, i: int) -> None:
        """Tell a schedule with a ramp which training step comes next."""
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise ValueError(f"training_step: i must be an integer >= 0, got {i!r}")
        self._tracker.training_step = i

    def reset(self) -> None:
        """Drop cached maps; the next call starts a generation."""
        for runtime in self._runtimes:
            runtime.reset()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the trained parts and the configuration; ``vsparse.load(target, directory)`` brings them back."""
        hosts = sorted({site.host for site in self.plan.sites})
        adapter.save(directory, self.plan.method, self.plan.schedule, hosts, dict(self.named_parameters()))

    def remove(self) -> None:
        """Give the target back: the host's own objects, keys, hooks and outputs. A second call does nothing."""
        if not self._removed:
            for runtime in self._runtimes:
                runtime.reset()
            for step in reversed(self._undo):
                step()
            self._removed = True


def apply(
    target: object,
    method: str | Method,
    /,
    *,
    schedule: Schedule | None = None,
    strict: bool = True,
    **overrides: Any,
) -> Patch:
    """Put a sparse-attention method into a pipeline or a model.

    Args:
        target: A diffusers pipeline (all its video transformers at once) or one transformer.
        method: A registry key ("vsa") or a `Method`.
        schedule: When layers are sparse; None: the method's published schedule.
        strict: True: refuse whatever cannot run sparse, with every reason. False: run that dense, count it in
            ``stats()`` and warn once.
        **overrides: Fields of the method, e.g. ``density=0.125``.

    Returns:
        The `Patch`; ``patch.remove()`` undoes everything.

    Raises:
        ValueError: unknown method or option, a value out of range, nothing to patch, already patched.
        NotImplementedError: a site cannot be patched (strict).
    """
    method = _method(method, overrides)
    schedule = method.default_schedule if schedule is None else _schedule(schedule)
    host, roots = _find(target)
    for root in roots:
        if _ATTRIBUTE in root.module.__dict__:
            raise ValueError(
                f"{root.name} is already patched with {root.module.__dict__[_ATTRIBUTE].method.key!r}: "
                "call vsparse.patch_of(model).remove() first"
            )
    made = _plan(host, roots, method, schedule)
    if made.skipped and strict:
        rows = [f"{name}: {'; '.join(why)}" for name, why in made.skipped.items()]
        raise NotImplementedError(f"cannot patch {type(target).__name__} with {method.key!r}:\n  - " + "\n  - ".join(rows))
    tracker = Tracker(None)
    undo: list[Callable[[], None]] = []
    try:
        tracker.source = host.source(target, roots)
        runtimes = [_install(host, root, made, tracker, strict, undo) for root in roots]
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    for runtime in runtimes:
        runtime.siblings = runtimes
    patch = Patch(made, runtimes, tracker, undo)
    _PATCHES.update({runtime: patch for runtime in runtimes})
    return patch


_PATCHES: weakref.WeakKeyDictionary[Runtime, Patch] = weakref.WeakKeyDictionary()


def _install(
    host: HostAdapter, root: Root, made: Plan, tracker: Tracker, strict: bool, undo: list[Callable[[], None]]
) -> Runtime:
    claims = [claim for claim in root.claims if f"{root.name}.{claim.site.name}" not in made.skipped]
    sites = []
    for claim in claims:
        sparse = _build(host, made.method, made.schedule, claim)
        undo.append(host.install(claim, sparse))
        sites.append(sparse)
    runtime = Runtime(
        name=root.name,
        sites=sites,
        method=made.method,
        schedule=made.schedule,
        tracker=tracker,
        read=host.read,
        bind=host.bind,
        intact=host.intact,
        strict=strict,
    )
    before = root.module.register_forward_pre_hook(runtime.before, with_kwargs=True)
    undo.append(before.remove)
    after = root.module.register_forward_hook(runtime.after, with_kwargs=True, always_call=True)
    undo.append(after.remove)
    undo.append(host.listen(root, runtime))
    root.module.__dict__[_ATTRIBUTE] = runtime
    undo.append(functools.partial(root.module.__dict__.pop, _ATTRIBUTE))
    return runtime


def _build(host: HostAdapter, method: Method, schedule: Schedule, claim: Claim) -> SparseAttention:
    device, dtype = host.placement(claim.module)
    with torch.inference_mode(False), torch.device(device):
        sparse = method.build(claim.site)
        if any(parameter.dtype != dtype for parameter in sparse.parameters()):
            sparse = sparse.to(dtype)
    sparse.peak_density = 1.0 if schedule.ramp is not None else method.call_density()
    sparse.train(claim.module.training)
    return sparse


def plan(
    target: object,
    method: str | Method,
    /,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    batch: int = 1,
    schedule: Schedule | None = None,
    **overrides: Any,
) -> Plan:
    """What `apply` would do, without touching the target.

    Args:
        target, method, schedule, **overrides: As of `apply`.
        height, width, num_frames: Video size in pixels and frames; all three, or none. With them the plan predicts
            density, FLOPs and state.
        steps: Denoising steps; needed when the schedule depends on them. batch: samples, CFG branches included.

    Raises:
        ValueError: as of `apply`, or a size that is incomplete.
    """
    method = _method(method, overrides)
    schedule = method.default_schedule if schedule is None else _schedule(schedule)
    host, roots = _find(target)
    made = _plan(host, roots, method, schedule)
    sizes = {"height": height, "width": width, "num_frames": num_frames}
    if all(value is None for value in sizes.values()):
        return made
    if height is None or width is None or num_frames is None:
        missing = ", ".join(name for name, value in sizes.items() if value is None)
        raise ValueError(f"plan: give height, width and num_frames together; missing: {missing}")
    if steps is None and schedule.needs_steps:
        raise ValueError("plan: this schedule depends on the denoising steps; give steps")
    grid = host.grid(target, roots[0], height, width, num_frames)
    # Experts share one step axis: each forward runs one root, so one root's sites are the cost of a step.
    layouts: dict[int, Layout] = {}
    for claim in roots[0].claims:
        layouts[claim.site.layer] = method.layout(grid, claim.site)
    sites = [(claim.site, layouts[claim.site.layer]) for claim in roots[0].claims]
    return dc.replace(
        made,
        grid=grid,
        density=sum(method.predicted_density(layout) for _, layout in sites) / len(sites),
        cost=attention_cost(method, schedule, sites, steps=steps, batch=batch),
        state_bytes=sum(_state_bytes(method, layout, site, batch) for site, layout in sites),
    )


def _state_bytes(method: Method, layout: Layout, site: Site, batch: int) -> int:
    specs = method.state(layout, site, batch).values()
    return sum(torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size() for shape, dtype in specs)


def _plan(host: HostAdapter, roots: list[Root], method: Method, schedule: Schedule) -> Plan:
    skipped: dict[str, tuple[str, ...]] = {}
    sites, kernel, parameters = [], None, 0
    for root in roots:
        _check_layers(schedule, root)
        for claim in root.claims:
            why = list(claim.reasons)
            missing = sorted(method.requires - claim.site.offers)
            if missing:
                why.append(f"{method.key} needs {', '.join(missing)}, which {claim.site.host} does not offer")
            name, device, dtype = _kernel(host, method, claim) if not why else (None, None, None)
            if name is None and not why and device is not None and dtype is not None:
                grid = Grid(t=2, h=8, w=8)
                layout = method.layout(grid, claim.site)
                why += kernel_reasons(layout, claim.site.heads, claim.site.head_dim, dtype, device)
            if why:
                skipped[f"{root.name}.{claim.site.name}"] = tuple(why)
                continue
            kernel = name or kernel
            sites.append(claim.site)
            with torch.device("meta"):
                parameters += sum(p.numel() for p in method.build(claim.site).parameters())
    return Plan(
        method=method,
        schedule=schedule,
        sites=tuple(sites),
        skipped=skipped,
        new_parameters=parameters,
        kernel=kernel,
    )


def _kernel(host: HostAdapter, method: Method, claim: Claim) -> tuple[str | None, torch.device, torch.dtype]:
    """Name of the implementation for a site, None when none can run it."""
    device, dtype = host.placement(claim.module)
    device = torch.device("cpu") if device.type == "meta" else device
    if method.default_schedule.dense_steps >= 1.0:
        return "host", device, dtype
    layout = method.layout(Grid(t=2, h=8, w=8), claim.site)
    if kernel_reasons(layout, claim.site.heads, claim.site.head_dim, dtype, device):
        return None, device, dtype
    return backend.implementations("block_sparse_attention", device.type)[0].name, device, dtype


def _check_layers(schedule: Schedule, root: Root) -> None:
    chosen, layers = schedule.dense_layers, len(root.claims)
    worst = chosen if isinstance(chosen, int) else max(chosen, default=-1) + 1
    if worst > layers:
        raise ValueError(f"schedule: dense_layers={chosen!r}, but {root.name} has {layers} attention layers")


def _method(method: str | Method, overrides: Mapping[str, Any]) -> Method:
    if isinstance(method, str):
        method = get_method(method)()
    if not isinstance(method, Method):
        raise ValueError(f"method must be a registry key or a vsparse Method, got {type(method).__name__}: {method!r}")
    return method.replace(**overrides) if overrides else method


def _schedule(schedule: object) -> Schedule:
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be a vsparse.Schedule, got {type(schedule).__name__}")
    return schedule


def _find(target: object) -> tuple[HostAdapter, list[Root]]:
    known: list[str] = []
    for name in _HOSTS:
        host: Any = importlib.import_module(name)
        roots = host.roots(target)
        if roots is not None:
            if not any(root.claims for root in roots):
                raise ValueError(f"{type(target).__name__} has no attention module that vsparse knows")
            return host, roots
        known += host.known()
    raise ValueError(
        f"vsparse cannot patch {type(target).__module__}.{type(target).__name__}: it is no pipeline or model of a known "
        f"family. Known models: {', '.join(known)}"
    )


def patch_of(model: nn.Module) -> Patch | None:
    """The patch of a model, or None. A deepcopy of a patched model is patched, too, with a patch of its own."""
    runtime = getattr(model, "__dict__", {}).get(_ATTRIBUTE)
    if runtime is None:
        return None
    if runtime not in _PATCHES:
        _PATCHES[runtime] = _adopt(model, runtime)
    return _PATCHES[runtime]


def _adopt(model: nn.Module, runtime: Runtime) -> Patch:
    """A patch for a copied model: its undo is rebuilt from what the copy carries."""
    (host,) = (importlib.import_module(name) for name in _HOSTS)
    runtime.siblings = [runtime]
    sites = tuple(sparse.site for sparse in runtime.sites)
    added = sum(p.numel() for sparse in runtime.sites for p in sparse.parameters())
    made = Plan(
        method=runtime.method, schedule=runtime.schedule, sites=sites, skipped={}, new_parameters=added, kernel=None
    )
    undo: list[Callable[[], None]] = [functools.partial(host.uninstall, model, sparse) for sparse in runtime.sites]
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in hooks.items():
            if getattr(hook, "__self__", None) is runtime:
                undo.append(functools.partial(_drop_hook, model, key))
    undo.append(functools.partial(host.unlisten, model))
    undo.append(functools.partial(model.__dict__.pop, _ATTRIBUTE))
    return Patch(made, [runtime], runtime.tracker, undo)


def _drop_hook(model: nn.Module, key: int) -> None:
    for table in (
        model._forward_pre_hooks,
        model._forward_pre_hooks_with_kwargs,
        model._forward_hooks,
        model._forward_hooks_with_kwargs,
        model._forward_hooks_always_called,
    ):
        table.pop(key, None)


def load(target: object, directory: str | os.PathLike[str], /, *, strict: bool = True) -> Patch:
    """Bring trained parts back: what `Patch.save` wrote, or a checkpoint with FastWan's gates.

    Args:
        target: A pipeline or model. Unpatched: it is patched as the adapter says (a FastWan checkpoint: with "vsa").
            Patched: its parts are overwritten; method and sites must fit.
        directory: The adapter's folder, or a folder or file of safetensors with ``to_gate_compress`` weights.
        strict: As of `apply`.

    Raises:
        ValueError: not an adapter, damaged, or made for other sites. Nothing is changed then.
    """
    stored = adapter.read(directory)
    _, roots = _find(target)
    patch = patch_of(roots[0].module)
    fresh = patch is None
    if patch is None:
        patch = apply(target, stored.method, schedule=stored.schedule, strict=strict)
    try:
        adapter.assign(stored, dict(patch.named_parameters()), patch.plan.method, [root.name for root in roots])
    except BaseException:
        if fresh:
            patch.remove()
        raise
    return patch
