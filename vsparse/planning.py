"""Plan: what `apply` would do, and what it would cost, without touching anything."""

from __future__ import annotations

import dataclasses as dc
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vsparse import backend
from vsparse.cost import AttentionCost, attention_cost
from vsparse.geometry import Grid
from vsparse.host import Claim, HostAdapter, Root, find_roots
from vsparse.layouts import Layout
from vsparse.methods import Method, Site, get_method
from vsparse.profile import Profile, is_profile
from vsparse.reasons import grid_reasons, kernel_reasons
from vsparse.schedule import Schedule

__all__ = ["Chosen", "Plan", "choose", "make_plan", "plan", "size_notice"]


@dc.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `apply` would do.

    Args:
        method, schedule: What would be applied. sites: claimed sites, all roots. skipped: site name -> reasons.
        new_parameters: Parameters that the method adds. kernel: implementation that would run, or None.
        grid, density, cost, state_bytes: For the given size; None without one.
        profile: Where method and schedule come from, if from one.
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
    profile: Profile | None = None

    def __str__(self) -> str:
        rows = [] if self.profile is None else [f"profile          {self.profile}{self._changes()}"]
        rows += [
            f"method           {self.method}",
            f"schedule         {self.schedule}",
            f"attention sites  {len(self.sites)}" + (f", {len(self.skipped)} skipped" if self.skipped else ""),
            f"kernel           {self.kernel or 'none'}",
            f"new parameters   {self.new_parameters:,}",
        ]
        if self.grid is not None and self.cost is not None:
            g, cost = self.grid, self.cost
            rows += [
                f"grid             {g.t} x {g.h} x {g.w} = {g.video:,} tokens"
                + (f" + {g.text} text" if g.text else ""),
                f"density          {self.density:.4f} in a sparse call, {cost.density:.4f} over all calls",
                f"attention FLOPs  {cost.sparse:.3e} of {cost.dense:.3e} dense ({cost.sparse / cost.dense:.1%}), "
                f"search {cost.search:.3e}",
                f"state            {(self.state_bytes or 0) / 2**20:.1f} MiB per branch",
            ]
        rows += [f"skipped          {name}: {'; '.join(why)}" for name, why in self.skipped.items()]
        return "\n".join(rows)

    def _changes(self) -> str:
        assert self.profile is not None
        same = (self.profile.method, self.profile.schedule) == (self.method, self.schedule)
        return "" if same else " (with other settings)"


@dc.dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was asked for: a method and its schedule, and the profile that they are from, if any."""

    method: Method
    schedule: Schedule
    profile: Profile | None = None


def plan(
    target: object,
    method: str | Method | Profile | os.PathLike[str],
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
            density, FLOPs and state. None: that of a profile.
        steps: Denoising steps; needed when the schedule depends on them; None: those of a profile. batch: samples, CFG
            branches included.

    Raises:
        ValueError: as of `apply`, or a size that is incomplete.
    """
    chosen = choose(method, schedule, overrides)
    method, schedule = chosen.method, chosen.schedule
    host, roots = find_roots(target)
    made = make_plan(host, roots, chosen)
    if chosen.profile is not None and height is width is num_frames is None:
        size = chosen.profile.size
        height, width, num_frames = size.height, size.width, size.frames
        steps = size.steps if steps is None else steps
    sizes = {"height": height, "width": width, "num_frames": num_frames}
    for name, value in {**sizes, "steps": steps, "batch": batch}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"plan: {name} must be an integer >= 1, got {value!r}")
    if all(value is None for value in sizes.values()):
        return made
    if height is None or width is None or num_frames is None:
        missing = ", ".join(name for name, value in sizes.items() if value is None)
        raise ValueError(f"plan: give height, width and num_frames together; missing: {missing}")
    if steps is None and method.needs_steps(schedule):
        raise ValueError("plan: this schedule depends on the denoising steps; give steps")
    try:
        grid = host.grid(target, roots[0], height, width, num_frames)
    except ValueError as error:
        raise ValueError(f"plan: {height=}, {width=}, {num_frames=} is less than one patch: {error}") from error
    for method_of_site in {method.of(claim.site) for claim in roots[0].claims}:
        for reason in grid_reasons(method_of_site, grid):
            raise ValueError(f"plan: {num_frames=} is {grid}: {reason}")
    # Experts share one step axis: each forward runs one root, so one root's sites are the cost of a step.
    layouts: dict[int, Layout] = {}
    for claim in roots[0].claims:
        layouts[claim.site.layer] = method.of(claim.site).layout(grid, claim.site)
    sites = [(claim.site, layouts[claim.site.layer]) for claim in roots[0].claims]
    cost = attention_cost(method, schedule, sites, steps=steps, batch=batch)
    return dc.replace(
        made,
        grid=grid,
        density=cost.sparse_density,
        cost=cost,
        state_bytes=sum(
            _state_bytes(
                method.of(claim.site), layouts[claim.site.layer], claim.site, batch, host.placement(claim.module)[1]
            )
            for claim in roots[0].claims
        ),
    )


def _state_bytes(method: Method, layout: Layout, site: Site, batch: int, dtype: torch.dtype) -> int:
    specs = method.state(layout, site, batch, dtype).values()
    return sum(torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size() for shape, dtype in specs)


def make_plan(host: HostAdapter, roots: list[Root], asked: Chosen) -> Plan:
    """Check every claim of every root, and a profile against each."""
    method, schedule = asked.method, asked.schedule
    skipped: dict[str, tuple[str, ...]] = {}
    sites, kernel, parameters = [], None, 0
    for root in roots:
        if asked.profile is not None:
            asked.profile.check(root.name, type(root.module).__name__, [claim.site for claim in root.claims])
            if asked.profile.model.weights is not None:
                asked.profile.check_weights(root.name, host.fingerprint(root.module))
        _check_layers(schedule, root)
        for claim in root.claims:
            why, chosen = list(claim.reasons), method.of(claim.site)
            if schedule.ramp is not None and isinstance(chosen.call_density(), tuple):
                raise ValueError(
                    f"schedule: a ramp gives one density to all heads, and {chosen.key!r} has one for each; drop one"
                )
            missing = sorted(chosen.requires - claim.site.offers)
            if missing:
                why.append(
                    f"{chosen.key} needs {', '.join(map(repr, missing))} of a site, which {claim.site.host} does not "
                    "offer; choose a method that needs nothing of it: `vsparse methods KEY` says what each one needs"
                )
            name, device, dtype = _kernel(host, chosen, claim) if not why else (None, None, None)
            if name is None and not why and device is not None and dtype is not None:
                grid = Grid(t=2, h=8, w=8)
                layout = chosen.layout(grid, claim.site)
                why += kernel_reasons(chosen, layout, claim.site, dtype, device)
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
        profile=asked.profile,
    )


def _kernel(host: HostAdapter, method: Method, claim: Claim) -> tuple[str | None, torch.device, torch.dtype]:
    """Name of the implementation for a site, None when none can run it."""
    device, dtype = host.placement(claim.module)
    device = torch.device("cpu") if device.type == "meta" else device
    if method.default_schedule.dense_steps >= 1.0:
        return "host", device, dtype
    layout = method.layout(Grid(t=2, h=8, w=8), claim.site)
    if kernel_reasons(method, layout, claim.site, dtype, device):
        return None, device, dtype
    return backend.implementations("block_sparse_attention", device.type)[0].name, device, dtype


def _check_layers(schedule: Schedule, root: Root) -> None:
    chosen, layers = schedule.dense_layers, len(root.claims)
    worst = chosen if isinstance(chosen, int) else max(chosen, default=-1) + 1
    if worst > layers:
        raise ValueError(f"schedule: dense_layers={chosen!r}, but {root.name} has {layers} attention layers")


def choose(
    method: str | Method | Profile | os.PathLike[str], schedule: Schedule | None, overrides: Mapping[str, Any]
) -> Chosen:
    """A method from its key, itself or a profile, with fields replaced, and its schedule, if no other is given.

    Raises:
        ValueError: neither of them, an unknown key or field, or a profile that says something else.
    """
    profile = Profile.read(method) if is_profile(method) else method if isinstance(method, Profile) else None
    if profile is not None:
        found, schedule = profile.method, profile.schedule if schedule is None else schedule
    elif isinstance(method, str):
        found = get_method(method)()
    elif isinstance(method, Method):
        found = method
    else:
        raise ValueError(
            "method must be a registry key, a vsparse Method, or a profile or its file, got "
            f"{type(method).__name__}: {method!r}"
        )
    if overrides:
        found = found.replace(**overrides)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be a vsparse.Schedule, got {type(schedule).__name__}")
    return Chosen(method=found, schedule=found.default_schedule if schedule is None else schedule, profile=profile)


def size_notice(
    host: HostAdapter, target: object, root: Root, profile: Profile | None
) -> Callable[[Grid], None] | None:
    """What hears of the size of each new video, for a profile."""
    if profile is None:
        return None
    size = profile.size
    return functools.partial(profile.notice, host.grid(target, root, size.height, size.width, size.frames))
