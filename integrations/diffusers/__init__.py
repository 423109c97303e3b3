"""The diffusers host: which models and modules, how they are entered and left (`vsparse.host.HostAdapter`)."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from vsparse.fingerprint import Fingerprint, sample
from vsparse.geometry import Grid
from vsparse.host import Claim, Root, TrainingHost
from vsparse.methods import Site, SparseAttention
from vsparse.optional import require
from vsparse.parallel.context import ContextParallel
from vsparse.parallel.division import Division
from vsparse.runtime import Reading, Runtime
from vsparse.steps import StepSource

from . import cutting, processors
from .hosts import HOSTS, Host, host_of
from .tracking import DiffusersSteps, Listener, detach
from .training import training_side

__all__ = [
    "bind",
    "context_parallel",
    "divide",
    "fingerprint",
    "grid",
    "install",
    "intact",
    "known",
    "listen",
    "placement",
    "read",
    "roots",
    "source",
    "training_host",
    "uninstall",
    "unlisten",
]


# The floor and the pin of constraints.txt: what `make test-floor` and `make test` run.
TESTED = ("0.37.0", "0.42.1")


def known() -> list[str]:
    """Model classes of the host table."""
    return [model for host in HOSTS for model in host.models]


@functools.cache
def _check_version() -> None:
    """Warn, once, about a diffusers that the tests have not seen."""
    version = require("diffusers", "diffusers").__version__
    if version not in TESTED:
        warnings.warn(
            f"vsparse is tested with diffusers {' and '.join(TESTED)}; this is {version}. It refuses processors "
            "that it does not recognise, but has not been run with this version",
            stacklevel=2,
        )


def roots(target: object) -> list[Root] | None:
    """Video transformers of a pipeline, or the transformer itself; None when the target is nothing of diffusers.

    What ``torch.compile`` has put around a transformer is seen through: it runs the transformer and its hooks.
    """
    _check_version()
    target = getattr(target, "_orig_mod", target)
    if isinstance(target, nn.Module):
        host = host_of(target)
        return None if host is None else [_root("transformer", target, host)]
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        return None
    seen: dict[int, Root] = {}
    for name, component in components.items():
        module = getattr(component, "_orig_mod", component)
        if isinstance(module, nn.Module) and id(module) not in seen and (host := host_of(module)) is not None:
            seen[id(module)] = _root(name, module, host)
    return list(seen.values()) or None


def _root(name: str, module: nn.Module, host: Host) -> Root:
    matches = host.sites(module)
    config: Any = module.config
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    claims = []
    for layer, (path, attention) in enumerate(matches):
        site = Site(
            root=name,
            name=path,
            layer=layer,
            layers=len(matches),
            dim=heads * head_dim,
            heads=heads,
            head_dim=head_dim,
            host=host.family,
        )
        claims.append(Claim(site=site, module=attention, reasons=tuple(processors.reasons(attention, host))))
    return Root(name=name, module=module, claims=tuple(claims))


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of a root's forward by the names of its class's forward."""
    signature = inspect.signature(type(module).forward)
    return signature.bind(module, *args, **kwargs).arguments


def _host(module: nn.Module) -> Host:
    host = host_of(module)
    assert host is not None
    return host


def read(module: nn.Module, arguments: Mapping[str, Any]) -> Reading:
    """Grid, batch, text lengths of one forward."""
    return _host(module).read(module, arguments)


def context_parallel(module: nn.Module) -> ContextParallel | None:
    """What ``enable_parallelism`` has put on a root."""
    return cutting.by_diffusers(module)


def grid(target: object, root: Root, height: int, width: int, num_frames: int) -> Grid:
    """The lattice for a size in pixels, by the pipeline's autoencoder or the family's usual one, with usual text."""
    host = _host(root.module)
    temporal = int(getattr(target, "vae_scale_factor_temporal", host.vae[0]))
    spatial = int(getattr(target, "vae_scale_factor_spatial", host.vae[1]))
    t, h, w = host.patch(root.module)
    frames = (num_frames - 1) // temporal + 1
    return host.grid(-(-frames // t), height // spatial // h, width // spatial // w, text=host.usual_text)


def source(target: object) -> StepSource:
    """Steps from the cache context and, for a pipeline, its scheduler."""
    return DiffusersSteps(None if isinstance(target, nn.Module) else target)


def install(claim: Claim, sparse: SparseAttention) -> Callable[[], None]:
    """Give an attention module its sparse child and a processor that routes to it."""
    return processors.install(claim.module, sparse)


def uninstall(module: nn.Module, sparse: SparseAttention) -> None:
    """Undo `install` in a copied root."""
    processors.uninstall(module.get_submodule(sparse.site.name))


def intact(module: nn.Module, sparse: SparseAttention) -> str | None:
    """Why a site no longer runs our code, or None."""
    return processors.intact(module.get_submodule(sparse.site.name), sparse)


def listen(root: Root, runtime: Runtime) -> Callable[[], None]:
    """Hear cache contexts, the end of a run, and saves of one root; offer it a plan for several processes."""
    Listener.attach(root.module, runtime)
    cutting.offer_plan(root.module, _host(root.module))
    return functools.partial(unlisten, root.module)


def unlisten(module: nn.Module) -> None:
    """Undo `listen`, in a copied root too."""
    detach(module)
    cutting.withdraw_plan(module)
    processors.forget(module)


def divide(root: Root, division: Division) -> Callable[[], None]:
    """Cut tokens where a root takes them in, and put its output together."""
    return cutting.attach(root.module, _host(root.module), division)


def placement(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype for parameters that are added to an attention module.

    Under layerwise casting the weights are stored in float8: what counts is the dtype that they are cast to. Where
    offloading moves single layers in and out, ours stay on the device that computes: they are small, and no hook of
    the offloader knows them.
    """
    linear = module.get_submodule("to_q")
    parameters = [*linear.parameters(), *module.parameters()]
    while isinstance(inner := getattr(linear, "base_layer", None), nn.Module):
        linear = inner
    hooks = _hooks(linear)
    device = torch.device(getattr(getattr(linear, "_hf_hook", None), "execution_device", None) or parameters[0].device)
    if "group_offloading" in hooks:
        device = torch.device(hooks["group_offloading"].group.onload_device)
    if "layerwise_casting" in hooks:
        return device, hooks["layerwise_casting"].compute_dtype
    ordinary = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return device, next((p.dtype for p in parameters if p.dtype in ordinary), torch.float32)


def fingerprint(module: nn.Module) -> Fingerprint:
    """Class, configuration, and samples of the query projections: every attention module has one, and keeps it when
    projections are fused. A LoRA around it hands out the weight that it is around."""
    host = _host(module)
    names = {base.__name__ for base in type(module).__mro__}
    config: Any = module.config
    values = {name: _plain(value) for name, value in config.items() if not name.startswith("_")}
    layers = {name: attention.get_submodule("to_q") for name, attention in host.sites(module)}
    samples = {name: sample(getattr(layer, "weight", None)) for name, layer in layers.items()}
    if any(_on_disk(x) for x in module.modules()):
        samples = dict.fromkeys(samples, "weights that are offloaded to disk")
    return Fingerprint(
        model=next(name for name in host.models if name in names),
        config={name: value for name, value in values.items() if isinstance(value, _PLAIN)},
        weights={name: x for name, x in samples.items() if not isinstance(x, str)},
        unread=next((x for x in samples.values() if isinstance(x, str)), ""),
    )


_PLAIN = (bool, int, float, str, tuple, type(None))


def _plain(value: Any) -> Any:
    """A configuration's value, which is a list or a tuple depending on whether it was read from a file."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _hooks(module: nn.Module) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return found


def _on_disk(module: nn.Module) -> bool:
    """Whether group offloading has left memory of no meaning in the place of a module's weights."""
    group = getattr(_hooks(module).get("group_offloading"), "group", None)
    return getattr(group, "offload_to_disk_path", None) is not None


def training_host(target: object, *, guidance: float | None) -> TrainingHost | None:
    """What training needs of a pipeline; None when the target is nothing of diffusers."""
    _check_version()
    return training_side(target, guidance)
