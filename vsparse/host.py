"""What a host library offers: its models, their attention modules, how they are entered and left, how they train."""

from __future__ import annotations

import dataclasses as dc
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vsparse.fingerprint import Fingerprint
from vsparse.geometry import Grid
from vsparse.methods import Site, SparseAttention
from vsparse.parallel.context import ContextParallel
from vsparse.parallel.division import Division
from vsparse.runtime import Reading, Runtime
from vsparse.steps import StepSource

__all__ = ["Claim", "HostAdapter", "Root", "TrainingHost", "find_roots", "hosts", "training_host"]

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

    def context_parallel(self, module: nn.Module) -> ContextParallel | None:
        """The division between processes that a root's own library makes, with its mesh; None when it makes none.

        Raises:
            NotImplementedError: one that attention cannot follow.
        """

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

    def divide(self, root: Root, division: Division) -> Callable[[], None]:
        """Have the tokens of one root divided between processes as ``division.cut`` says; returns the undo.

        Raises:
            NotImplementedError: a model that reads tokens outside of its attention.
        """

    def placement(self, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        """Device and compute dtype for parameters that are added to an attention module."""

    def fingerprint(self, module: nn.Module) -> Fingerprint:
        """What tells a root, patched or not, from other models; of a sharded one every process must call it."""

    def training_host(self, target: object, *, guidance: float | None) -> TrainingHost | None:
        """What training needs of a pipeline, or None when the target is none of this host's."""


class TrainingHost(Protocol):
    """What training needs of a pipeline: features of videos and captions, and the model call of its denoising loop.

    Features are computed once and stored; ``forward`` takes them back. No gradient flows into an encoder.
    """

    @property
    def experts(self) -> Mapping[str, tuple[float, float]]:
        """Transformers by component name, with the noise range of each: sigma in ``[low, high)``, the last one to 1."""

    def expert(self, timestep: float) -> str:
        """Name of the transformer that the pipeline calls at a timestep of its scheduler."""

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Is a size in pixels one that the autoencoder and the transformer take without cutting or padding?

        Raises:
            ValueError: no; the message names the nearest sizes that are.
        """

    def blank(self, frames: int, height: int, width: int, *, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and text features in the shapes of `encode_video` and `encode_text`, made without an encoder.

        Returns:
            Zeros, float32; masks are ones.

        Raises:
            ValueError: a size that `check_size` refuses.
        """

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Text features as the pipeline makes them; ``""`` is the caption of a sample whose text is dropped.

        Returns:
            Tensors ``[B, ...]`` by the name of the transformer's argument, of the same shape for every caption.
        """

    def encode_video(self, pixels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents in the layout and scale that the transformer takes.

        Args:
            pixels: ``[B, 3, F, H, W]`` floating, in [-1, 1]. generator: Draws from the autoencoder's posterior; None:
                its mode.

        Returns:
            Float32 (float64 for a float64 autoencoder): ``[B, C, T, h, w]``, or ``[B, T, C, h, w]`` for CogVideoX.

        Raises:
            ValueError: another shape, dtype or range, or a size that `check_size` refuses.
        """

    def decode_video(self, latents: Tensor) -> Tensor:
        """The pixels ``[B, 3, F, H, W]`` in [-1, 1] of latents as `encode_video` gives them."""

    def forward(self, model: nn.Module, noisy: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The prediction of one model call, with every argument that the pipeline's own loop passes.

        Args:
            model: The transformer, as it is or wrapped. noisy: Latents of any floating dtype. timestep: ``[B]`` in the
                scheduler's scale. text: what `encode_text` gave for these samples.

        Returns:
            A tensor in the shape of ``noisy`` and the dtype of the model.

        Raises:
            ValueError: ``text`` has other names than `encode_text` gives.
        """


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
        inner = getattr(target, "module", None)
        if inner is not None and host.roots(inner):
            raise ValueError(
                f"{type(target).__name__} wraps a {type(inner).__name__}: call vsparse.apply on the model itself, then "
                "wrap it, so that the wrapper finds the parameters that a method adds"
            )
        known += host.known()
    raise ValueError(
        f"vsparse cannot patch {type(target).__module__}.{type(target).__name__}: it is no pipeline or model of a "
        f"known family. Known models: {', '.join(known)}"
    )


def training_host(target: object, *, guidance: float | None = None) -> TrainingHost:
    """What training needs of a pipeline.

    Args:
        target: A text-to-video pipeline of a known family. guidance: Embedded guidance scale at which a
            guidance-distilled model (HunyuanVideo) is trained; None: the default of the pipeline's call.

    Raises:
        ValueError: no such pipeline, or ``guidance`` for a model that embeds none.
    """
    for host in hosts():
        found = host.training_host(target, guidance=guidance)
        if found is not None:
            return found
    raise ValueError(f"vsparse cannot train {type(target).__module__}.{type(target).__name__}: it is no pipeline")
