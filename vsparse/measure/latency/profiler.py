"""Put a timeline into a pipeline for one run: torch hooks, and clocks around a few functions; all of it taken off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

import vsparse.ops.host_order as host_order
from vsparse import ops
from vsparse.host import Claim, find_roots
from vsparse.layouts import Blocking
from vsparse.measure.latency.timeline import (
    BLOCK,
    CHOOSE,
    COMBINE,
    COMMUNICATE,
    CROSS,
    FEED,
    KERNEL,
    PACK,
    PROJECT,
    SCHEDULER,
    SEARCH,
    TEXT,
    TRANSFORMER,
    VAE,
    Timeline,
)
from vsparse.methods import SparseAttention
from vsparse.parallel import shard
from vsparse.parallel.collectives import Group
from vsparse.patch import Patch

__all__ = ["functions", "profiled"]

# What methods call, by the name under which it is looked up when it is called.
_FUNCTIONS: tuple[tuple[Any, str, str], ...] = (
    (Blocking, "pack", PACK),
    (Blocking, "unpack", PACK),
    (host_order, "reorder", PACK),
    (host_order, "attend", KERNEL),
    (host_order, "block_sparse_attention", KERNEL),
    (host_order, "merge_attention", COMBINE),
    (ops, "block_sparse_attention", KERNEL),
    (ops, "merge_attention", COMBINE),
    (ops, "block_linear_attention", COMBINE),
    (ops, "search_attention", SEARCH),
    # What these wait for is a part inside.
    (shard, "sharded_attention", KERNEL),
    (shard, "spread_attention", KERNEL),
)
_ENCODERS = ("text_encoder", "image_encoder")
_FEED = ("ff", "mlp", "proj_mlp", "proj_out")


@contextlib.contextmanager
def profiled(target: Any, timeline: Timeline, patch: Patch | None = None) -> Iterator[None]:
    """Have a timeline follow what a pipeline or a transformer runs inside the block.

    Full attention is seen where it is PyTorch's ``scaled_dot_product_attention``; the kernel of another backend counts
    as a part of the projections. What is computed outside of `Timeline`'s thread is not seen.

    Args:
        target: A pipeline or a transformer. timeline: of this run. patch: in force on the target, or None.

    Raises:
        ValueError: a target that `vsparse.apply` does not know.
        NotImplementedError: a compiled model, whose layers run no hooks.
    """
    roots = find_roots(target)[1]
    sites = {} if patch is None else {(site.site.root, site.site.layer): site for site in patch.sites}
    with contextlib.ExitStack() as undo:
        _follow_pipeline(target, timeline, undo)
        for root in roots:
            for module in root.module.modules():
                if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
                    raise NotImplementedError(
                        f"latency: {root.name} is compiled, and its layers cannot be told apart; measure it uncompiled"
                    )
            _follow(root.module, undo, timeline, TRANSFORMER)
            for claim in root.claims:
                site = sites.get((root.name, claim.site.layer))
                _follow_block(root.module, claim, site, timeline, undo)
        for site in sites.values():
            _follow(site, undo, timeline, CHOOSE)
            _replace(undo, site, "combine", timeline.timed(site.combine, COMBINE))
        undo.enter_context(functions(timeline))
        stock = nn.functional.scaled_dot_product_attention
        # Where a video is shared, full attention runs between two exchanges, inside the site.
        timed = timeline.timed(stock, KERNEL, inside=(PROJECT, CHOOSE))
        _replace(undo, nn.functional, "scaled_dot_product_attention", timed)
        yield


@contextlib.contextmanager
def functions(timeline: Timeline) -> Iterator[None]:
    """Have a timeline follow only what methods call: packing, kernels, merging, searching, and waiting for others."""
    with contextlib.ExitStack() as undo:
        for owner, name, part in _FUNCTIONS:
            _replace(undo, owner, name, timeline.timed(getattr(owner, name), part))
        _replace(undo, Group, "sending", _sending(timeline))
        yield


def _sending(timeline: Timeline) -> Callable[[Group, str], contextlib.AbstractContextManager[None]]:
    """What waits for other processes, as a part."""
    stock = Group.sending

    @contextlib.contextmanager
    def sending(group: Group, what: str) -> Iterator[None]:
        timeline.enter(COMMUNICATE)
        try:
            with stock(group, what):
                yield
        finally:
            timeline.leave()

    return sending


def _follow_pipeline(target: Any, timeline: Timeline, undo: contextlib.ExitStack) -> None:
    """The parts around the transformer."""
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        return
    for name, component in components.items():
        if name.startswith(_ENCODERS) and isinstance(component, nn.Module):
            _follow(component, undo, timeline, TEXT)
    vae, scheduler = components.get("vae"), components.get("scheduler")
    for name in ("encode", "decode"):
        if hasattr(vae, name):
            _replace(undo, vae, name, timeline.timed(getattr(vae, name), VAE))
    if scheduler is not None:
        inner = timeline.timed(scheduler.step, SCHEDULER)

        def _step(*args: Any, **options: Any) -> Any:
            found = inner(*args, **options)
            timeline.step += timeline.here
            return found

        _replace(undo, scheduler, "step", _step)


def _follow_block(
    root: nn.Module, claim: Claim, site: SparseAttention | None, timeline: Timeline, undo: contextlib.ExitStack
) -> None:
    """One layer: its self-attention, the other attention beside it, its feed-forward network, and the rest."""
    block = root.get_submodule(claim.site.name.rpartition(".")[0])

    def began() -> None:
        timeline.layer, timeline.phase = claim.site.layer, "dense" if site is None else site.phase

    def ended() -> None:
        timeline.layer, timeline.phase = None, ""

    _follow(block, undo, timeline, BLOCK, began=began, ended=ended)
    _follow(claim.module, undo, timeline, PROJECT)
    for name, child in block.named_children():
        if child is claim.module:
            continue
        if name.startswith("attn"):
            _follow(child, undo, timeline, CROSS)
        elif name.startswith(_FEED):
            _follow(child, undo, timeline, FEED)


def _follow(
    module: nn.Module,
    undo: contextlib.ExitStack,
    timeline: Timeline,
    part: str,
    *,
    began: Callable[[], None] = lambda: None,
    ended: Callable[[], None] = lambda: None,
) -> None:
    """Hooks around the forward of a module."""

    def before(*_: Any) -> None:
        if timeline.here:
            began()
            timeline.enter(part)

    def after(*_: Any) -> None:
        if timeline.here:
            timeline.leave()
            ended()

    undo.callback(module.register_forward_pre_hook(before, prepend=True).remove)
    undo.callback(module.register_forward_hook(after, always_call=True).remove)


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the end."""
    own = vars(owner)
    if name in own:
        undo.callback(setattr, owner, name, own[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)
