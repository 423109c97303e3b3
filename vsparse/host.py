"""What a host library offers: its models, their attention modules, and how they are entered and left."""

from __future__ import annotations

import dataclasses as dc
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from vsparse.geometry import Grid
from vsparse.methods import Site, SparseAttention
from vsparse.runtime import Reading, Runtime
from vsparse.steps import StepSource

__all__ = ["Claim", "HostAdapter", "Root", "find_roots", "hosts"]

# Host adapters, imported by name on first use: a host that is not installed costs nothing.
_HOSTS = ("vsparse.integrations.diffusers",)


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

    def source(self, target: object) -> StepSource:
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


def hosts() -> list[HostAdapter]:
    """The host adapters.

    Raises:
        ImportError: a host library is not installed; the message names the extra that brings it.
    """
    return [importlib.import_module(name) for name in _HOSTS]


def find_roots(target: object) -> tuple[HostAdapter, list[Root]]:
    """The host of a target, and the target's models.

    Raises:
        ValueError: no host knows the target, or it has no attention module that vsparse knows.
    """
    known: list[str] = []
    for host in hosts():
        roots = host.roots(target)
        if roots is not None:
            if not any(root.claims for root in roots):
                raise ValueError(f"{type(target).__name__} has no attention module that vsparse knows")
            return host, roots
        known += host.known()
    raise ValueError(
        f"vsparse cannot patch {type(target).__module__}.{type(target).__name__}: it is no pipeline or model of a "
        f"known family. Known models: {', '.join(known)}"
    )
