"""apply and Patch: check every attention site of a model, only then change it, and undo it exactly."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vsparse import adapter
from vsparse.fingerprint import Fingerprint
from vsparse.host import Claim, HostAdapter, Root, find_roots, hosts
from vsparse.methods import Method, SparseAttention
from vsparse.methods.budgets import highest
from vsparse.parallel.context import ContextParallel, agree, open_groups
from vsparse.parallel.division import Division
from vsparse.planning import Plan, choose, make_plan, size_notice
from vsparse.profile import Profile
from vsparse.runtime import Runtime
from vsparse.schedule import Schedule
from vsparse.stats import stats_of
from vsparse.steps import Tracker
from vsparse.wrapping import is_sharded, whole, writes

__all__ = ["Patch", "apply", "load", "patch_of"]

_ATTRIBUTE = "_vsparse"


class Patch:
    """A patched target. A context manager: leaving it removes the patch."""

    def __init__(
        self,
        plan: Plan,
        runtimes: list[Runtime],
        tracker: Tracker,
        undo: list[Callable[[], None]],
        fingerprint: Callable[[nn.Module], Fingerprint],
        models: Mapping[str, nn.Module],
    ) -> None:
        self.plan = plan
        self._fingerprint, self._models = fingerprint, {name: weakref.ref(model) for name, model in models.items()}
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
        """What ran since the patch was applied, or since `clear_stats`; the only call that reads from the device.

        Returns:
            ``density``: executed share of valid token pairs over all calls, dense ones included; ``sparse_density``:
            over the sparse calls, None without any; ``sites``: site -> its sparse density; ``calls``: phase -> calls of
            sites; ``searches``; ``fallbacks``: reason -> forwards that ran dense because of it; ``kernel``;
            ``state_bytes``. Where processes share a video, these are of the heads and rows of this one, and
            ``imbalance`` says how much more than the mean the slowest has to do in the worst layer: with heads in their
            order (``naive``), and ``now``.
        """
        return stats_of(self._runtimes, self.plan)

    @property
    def parallel(self) -> ContextParallel:
        """How videos are shared between processes, by `apply` or, since the last forward, by diffusers."""
        return self._runtimes[0].division.setting

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Around a loop of your own where processes share videos; all of them enter and leave it.

        What ends the loop on one process between two forwards (data that cannot be read, memory that is full in a
        backward) is told to the others, which stop with that cause where they wait. Forwards tell by themselves.
        """
        with self._runtimes[0].division.telling():
            yield

    def clear_stats(self) -> None:
        """Count anew from here on."""
        for runtime in self._runtimes:
            runtime.clear_stats()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that the method added, by root and site."""
        for runtime in self._runtimes:
            for site in runtime.sites:
                for name, parameter in site.own_parameters():
                    yield f"{runtime.name}.{site.site.name}.{name}", parameter

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What `save` writes: the parameters, and what else a trained method needs back."""
        for runtime in self._runtimes:
            for site in runtime.sites:
                for name, tensor in site.own_tensors():
                    yield f"{runtime.name}.{site.site.name}.{name}", tensor

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that the method added: what to hand to the optimiser beside the host's."""
        return [parameter for _, parameter in self.named_parameters()]

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Losses that a method asks to add to the training loss, by root and site, of the last forward of each model.

        They reach what the method has added, not the host. Only ``dsv`` has any, and only in training mode.
        """
        return {f"{run.name}.{name}": loss for run in self._runtimes for name, loss in run.losses.items()}

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

    def suspended(self) -> contextlib.AbstractContextManager[None]:
        """Inside it the target runs dense, with its present weights, as the method "dense" does: a teacher for
        distillation, a video to compare with. State, statistics and losses of the patch stay as they are.
        """
        return self._tracker.suspend()

    def sum_gradients(self) -> None:
        """Add up the gradients of each model over the processes that share its videos.

        Each of them holds a part of every gradient, that of its tokens and heads. Call it on all of them after the
        backward, before clipping and the optimiser. Without `ContextParallel` it does nothing; with
        ``gradients="mean"`` it is what wraps the model that averages, and this refuses.

        Raises:
            ValueError: the gradients are averaged elsewhere.
        """
        for runtime in self._runtimes:
            model = self._models[runtime.name]()
            if model is not None:
                runtime.division.sum_gradients(model.parameters())

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
        """Write the trained parts, the configuration, and a fingerprint of the model that they belong to.

        ``vsparse.load(target, directory)`` brings them back.

        Under `fully_shard` every process must call it, and the first one writes; under DDP let one process call it.
        """
        hosts = sorted({site.host for site in self.plan.sites})
        method, schedule, tensors = self.plan.method, self.plan.schedule, dict(self.named_tensors())
        models = {name: model for name, held in self._models.items() if (model := held()) is not None}
        prints = {name: self._fingerprint(model) for name, model in models.items()}
        write = writes([*tensors.values(), *(x for model in models.values() for x in model.parameters())])
        adapter.save(directory, method, schedule, hosts, whole(tensors), prints, write=write)

    def remove(self) -> None:
        """Give the target back: the host's own objects, keys, hooks and outputs. A second call does nothing.

        DDP goes on to expect gradients of the parameters that are gone: wrap the model anew to train it further.
        """
        if not self._removed:
            for runtime in self._runtimes:
                runtime.reset()
            while self._undo:
                self._undo.pop()()
            self._removed = True


def apply(
    target: object,
    method: str | Method | Profile | os.PathLike[str],
    /,
    *,
    schedule: Schedule | None = None,
    parallel: ContextParallel | None = None,
    strict: bool = True,
    **overrides: Any,
) -> Patch:
    """Put a sparse-attention method into a pipeline or a model.

    To train on several processes, call it before DDP or `fully_shard`: they average and shard what they find.

    Args:
        target: A diffusers pipeline (all its video transformers at once) or one transformer.
        method: A registry key ("vsa"), a `Method`, or a `vsparse.profile.Profile` or its file ("….toml"), which must
            fit the model; a video of another size than the profile's is told once, by a warning.
        schedule: When layers are sparse; None: the profile's, or the method's published schedule.
        parallel: Share each video between processes; all of them must call this with the same arguments.
        strict: True: refuse whatever cannot run sparse, with every reason. False: run that dense, count it in
            ``stats()`` and warn once.
        **overrides: Fields of the method, e.g. ``density=0.125``.

    Returns:
        The `Patch`; ``patch.remove()`` undoes everything.

    Raises:
        ValueError: unknown method or option, a value out of range, nothing to patch, already patched, or wrapped for
            several processes before parameters are added.
        NotImplementedError: a site cannot be patched (strict).
    """
    asked = choose(method, schedule, overrides)
    host, roots = find_roots(target)
    for root in roots:
        if _ATTRIBUTE in root.module.__dict__:
            raise ValueError(
                f"{root.name} is already patched with {root.module.__dict__[_ATTRIBUTE].method.key!r}: "
                "call vsparse.patch_of(model).remove() first"
            )
    made = make_plan(host, roots, asked)
    if made.skipped and strict:
        rows = [f"{name}: {'; '.join(why)}" for name, why in made.skipped.items()]
        raise NotImplementedError(
            f"cannot patch {type(target).__name__} with {made.method.key!r}:\n  - " + "\n  - ".join(rows)
        )
    _refuse_sharded(roots, made)
    divisions = _divisions(roots, made, parallel)
    tracker = Tracker(None)
    undo: list[Callable[[], None]] = []
    try:
        tracker.source = host.source(target)
        runtimes = [
            _install(host, root, made, tracker, strict, division, undo)
            for root, division in zip(roots, divisions, strict=True)
        ]
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    for runtime in runtimes:
        runtime.siblings = runtimes
    patch = Patch(made, runtimes, tracker, undo, host.fingerprint, {root.name: root.module for root in roots})
    for runtime in runtimes:
        runtime.patch = patch
        runtime.noticed = size_notice(host, target, roots[0], asked.profile)
    for name, why in made.skipped.items():
        warnings.warn(f"vsparse: {name} runs dense: {'; '.join(why)}", stacklevel=2)
    return patch


def _refuse_sharded(roots: list[Root], made: Plan) -> None:
    sharded = [root.name for root in roots if any(map(is_sharded, root.module.parameters()))]
    if sharded and made.new_parameters:
        raise ValueError(
            f"{', '.join(sharded)}: sharded already, and {made.method.key!r} adds {made.new_parameters:,} parameters, "
            "which would be neither sharded nor averaged between processes; call apply first, then fully_shard"
        )


def _divisions(roots: list[Root], made: Plan, parallel: ContextParallel | None) -> list[Division]:
    """The division of each root, once all processes have said that they want the same."""
    setting = ContextParallel() if parallel is None else parallel
    if setting.size > 1 and made.skipped:
        raise NotImplementedError(
            f"context parallel: {', '.join(made.skipped)} cannot be patched, and stock attention would see the tokens "
            "of one process alone"
        )
    found = []
    for root in roots:
        device = next((x.device for x in root.module.parameters()), torch.device("cpu"))
        groups = open_groups(setting, device)
        told = {"method": (made.method.key, made.method.options()), "schedule": made.schedule, "model": root.name}
        agree(groups.all, "vsparse.apply", {**told, **setting.told, "sites": len(root.claims)})
        least = min((claim.site.heads for claim in root.claims), default=0)
        if setting.ulysses > least:
            raise ValueError(
                f"context parallel: {root.name} has {least} heads, fewer than ulysses={setting.ulysses}; share tokens, "
                f"too: ulysses={least} with ring or gather"
            )
        found.append(Division(setting, groups))
    return found


def _install(
    host: HostAdapter,
    root: Root,
    made: Plan,
    tracker: Tracker,
    strict: bool,
    division: Division,
    undo: list[Callable[[], None]],
) -> Runtime:
    claims = [claim for claim in root.claims if f"{root.name}.{claim.site.name}" not in made.skipped]
    sites = []
    for claim in claims:
        sparse = _build(host, made.method, made.schedule, claim)
        undo.append(host.install(claim, sparse))
        sites.append(sparse)
    for kind in {type(sparse) for sparse in sites}:
        alike = [sparse for sparse in sites if type(sparse) is kind]
        most = max(sparse.peak_density for sparse in alike)
        for sparse in alike:  # lists of one length in all layers: they share their graphs
            sparse.peak_density = most
    runtime = Runtime(
        name=root.name,
        sites=sites,
        method=made.method,
        schedule=made.schedule,
        tracker=tracker,
        read=host.read,
        parallel=host.context_parallel,
        bind=host.bind,
        intact=host.intact,
        placement=host.placement,
        strict=strict,
        division=division,
        skipped={
            claim.site.name: (claim.site.heads, "; ".join(made.skipped[f"{root.name}.{claim.site.name}"]))
            for claim in root.claims
            if claim not in claims
        },
    )
    before = root.module.register_forward_pre_hook(runtime.before, with_kwargs=True)
    undo.append(before.remove)
    after = root.module.register_forward_hook(runtime.after, with_kwargs=True, always_call=True)
    undo.append(after.remove)
    undo.append(host.listen(root, runtime))
    if not division.alone:
        undo.append(host.divide(root, division))
    root.module.__dict__[_ATTRIBUTE] = runtime
    undo.append(functools.partial(root.module.__dict__.pop, _ATTRIBUTE))
    return runtime


def _build(host: HostAdapter, method: Method, schedule: Schedule, claim: Claim) -> SparseAttention:
    device, dtype = host.placement(claim.module)
    with torch.inference_mode(False), torch.device(device):
        sparse = method.build(claim.site)
        if any(parameter.dtype != dtype for parameter in sparse.parameters()):
            sparse = sparse.to(dtype)
    sparse.peak_density = 1.0 if schedule.ramp is not None else highest(sparse.method.call_density())
    sparse.added = frozenset(name for name, _ in sparse.named_parameters())
    sparse.train(claim.module.training)
    return sparse


def patch_of(model: nn.Module) -> Patch | None:
    """The patch of a model, or None. A deepcopy of a patched model is patched, too, with a patch of its own."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    runtime = getattr(model, "__dict__", {}).get(_ATTRIBUTE)
    if runtime is None:
        return None
    if runtime.patch is None:
        runtime.patch = _adopt(model, runtime)
    return runtime.patch  # type: ignore[no-any-return]


def _adopt(model: nn.Module, runtime: Runtime) -> Patch:
    """A patch for a copied model: its undo is rebuilt from what the copy carries."""
    (host,) = hosts()
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
    return Patch(made, [runtime], runtime.tracker, undo, host.fingerprint, {runtime.name: model})


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
        directory: The adapter's folder, or a checkpoint with ``to_gate_compress`` weights: a file of safetensors, a
            model's folder, sharded or not, or that of a whole pipeline.
        strict: As of `apply`. False: also loads an adapter that was saved from another model, and warns.

    An adapter fits the model that it was saved from and what was made of it by casting, merging a LoRA or fine-tuning;
    ``vsparse.fingerprint`` says how that is told. Where weights cannot be read (quantised, offloaded), a warning says
    that this was not checked. Of a sharded model every process must call this.

    Raises:
        ValueError: not an adapter, damaged, saved from another model (strict), or made for other sites. Nothing is
            changed then.
    """
    stored = adapter.read(directory)
    host, roots = find_roots(target)
    if stored.models is not None:
        found = {root.name: host.fingerprint(root.module) for root in roots}
        adapter.check_models(stored.path, stored.models, found, strict=strict)
    patch = patch_of(roots[0].module)
    fresh = patch is None
    if patch is None:
        patch = apply(target, stored.method, schedule=stored.schedule, strict=strict)
    try:
        adapter.assign(stored, dict(patch.named_tensors()), patch.plan.method, [root.name for root in roots])
    except BaseException:
        if fresh:
            patch.remove()
        raise
    return patch
