"""Calibration data: what the attention of a pipeline or model is given, and how its outputs change over the steps."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vsparse import ops
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Layout, RasterLayout
from vsparse.methods import Call, Method, Paper, Site, SparseAttention
from vsparse.methods.samples import Sample
from vsparse.methods.unicp import UniCP
from vsparse.patch import Patch, apply
from vsparse.schedule import Phase, Schedule

__all__ = ["Recorded", "by_layer", "changes", "hearing", "recording"]

Recorded = Mapping[tuple[str, int], Sequence[Sample]]

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@contextlib.contextmanager
def recording(
    target: object, *, layers: Sequence[int] | None = None, most: int = 8, device: torch.device | str | None = None
) -> Iterator[Recorded]:
    """Gather what the attention layers are given, with exact attention in all of them.

    Of n calls of a layer ``most`` are kept, spread over all of them: those with the smallest fractional part of
    ``i * (sqrt(5) - 1) / 2``, i counted from 0. That needs no n, leaves gaps of three lengths at most, and falls
    on all branches and steps alike, where every second or fourth call would fall on one branch of guidance. All layers
    keep the same calls.

    Args:
        target: A pipeline or model, not patched. layers: only these; None: all, of every root.
        most: Samples that a layer keeps, at least 1. Each holds q, k and v: three times the tokens times the width.
        device: Where samples are kept; None: where they were computed.

    Yields:
        (root, layer) -> its samples, in the order of the calls; the lists fill while the target runs.

    Raises:
        ValueError: ``most`` below 1, a layer that is not there, and all that `vsparse.apply` refuses.

    The target is as before when the block ends, with an exception or without. Blocks that were compiled run uncompiled
    meanwhile, in the whole process. What is recomputed for a backward is not recorded twice.
    """
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"recording: most must be an integer >= 1, got {most!r}")
    tapes: dict[tuple[str, int], _Tape] = {}

    def offer(site: Site, sample: Sample, _: Tensor) -> None:
        tapes[site.root, site.layer].offer(sample)

    with hearing(target, offer, layers=layers) as sites:
        tapes |= {(site.root, site.layer): _Tape(most, device) for site in sites}
        yield {key: tape.samples for key, tape in tapes.items()}


@contextlib.contextmanager
def hearing(
    target: object, told: Callable[[Site, Sample, Tensor], None], *, layers: Sequence[int] | None = None
) -> Iterator[list[Site]]:
    """Hear of every call of the attention layers, with exact attention in all of them.

    Args:
        target, layers: As of `recording`.
        told: Is given the site, the call's own tensors (to look at, not to keep), and the output ``[B, N, H, D]``.

    Yields:
        The sites that are heard.

    Raises:
        ValueError: as of `recording`.
    """
    chosen = None if layers is None else tuple(layers)
    with apply(target, _Recording(layers=chosen)) as patch, torch.compiler.set_stance("force_eager"):
        found: list[Site] = []
        for sparse in patch.sites:
            assert isinstance(sparse, _RecordingAttention)
            if chosen is None or sparse.site.layer in chosen:
                sparse.told = told
                found.append(sparse.site)
        missing = sorted(set(chosen or ()) - {site.layer for site in found})
        if missing or not found:
            raise ValueError(f"recording: no layer {missing or list(chosen or ())}; there are {len(patch.sites)}")
        yield found


def by_layer(recorded: Recorded, root: str | None = None) -> list[Sequence[Sample]]:
    """The samples of one root, layer by layer, as `search_global_frames` takes them.

    Args:
        recorded: From `recording`, of all layers. root: which model of the pipeline; None: the only one.

    Raises:
        ValueError: a root that is not there, several without a choice, a layer left out.
    """
    roots = sorted({name for name, _ in recorded})
    if root is None and len(roots) != 1:
        raise ValueError(f"by_layer: root must be given, as there are several: {', '.join(roots) or 'none'}")
    name = roots[0] if root is None else root
    if name not in roots:
        raise ValueError(f"by_layer: no root {name!r}; recorded are: {', '.join(roots)}")
    layers = sorted(layer for found, layer in recorded if found == name)
    if layers != list(range(len(layers))):
        raise ValueError(f"by_layer: {name} must be recorded in all layers, got {layers}")
    return [recorded[name, layer] for layer in layers]


class _Tape:
    """The samples of one layer: at most so many, evenly spread over the calls so far."""

    def __init__(self, most: int, device: torch.device | str | None) -> None:
        self.most, self.device = most, device
        self.samples: list[Sample] = []
        self._ranks: list[float] = []
        self._calls = 0

    def offer(self, sample: Sample) -> None:
        """Keep a copy of a call's tensors, or not."""
        rank = self._calls * _GOLDEN % 1.0
        self._calls += 1
        if len(self.samples) == self.most:
            last = max(range(self.most), key=self._ranks.__getitem__)
            if rank > self._ranks[last]:
                return
            del self._ranks[last], self.samples[last]
        length = None if sample.text_length is None else self._copy(sample.text_length)
        q, k, v = (self._copy(x) for x in (sample.q, sample.k, sample.v))
        self.samples.append(Sample(grid=sample.grid, q=q, k=k, v=v, text_length=length))
        self._ranks.append(rank)

    def _copy(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return x.detach().to(device=self.device, copy=True)


@dc.dataclass(frozen=True, kw_only=True)
class _Recording(Method):
    """Exact attention whose inputs are recorded, in some layers; not in the registry."""

    key: ClassVar[str] = "recording"
    paper: ClassVar[Paper] = Paper(title="calibration recording", arxiv="", trained=False)
    exact_phases: ClassVar[frozenset[str]] = frozenset({"dense", "search"})

    layers: tuple[int, ...] | None = None

    def layout(self, grid: Grid, site: Site) -> Layout:
        """The host's order."""
        return RasterLayout(grid)

    def phase(
        self,
        schedule: Schedule,
        *,
        step: int | None,
        steps: int | None,
        layer: int,
        filled: bool,
        stamp: int | None = None,
    ) -> Phase:
        """What is not recorded runs the host's own attention."""
        return "search" if self.layers is None or layer in self.layers else "dense"

    def build(self, site: Site) -> SparseAttention:
        """The module; it has no parameters."""
        return _RecordingAttention(self, site)


class _RecordingAttention(SparseAttention):
    """Full attention, heard by somebody."""

    told: Callable[[Site, Sample, Tensor], None] | None = None

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pack, attend, unpack; tell of the call, unless it is recomputed."""
        blocking = call.blocking
        packed = [blocking.pack(x) for x in (q, k, v)]
        out = blocking.unpack(ops.block_sparse_attention(packed[0], packed[1], packed[2], BlockMap.full(blocking))[0])
        if self.told is not None and not self.ran:
            with torch.no_grad():
                self.told(self.site, Sample(grid=call.grid, q=q, k=k, v=v, text_length=call.text_length), out)
        return out, ()


@contextlib.contextmanager
def changes(patch: Patch) -> Iterator[list[dict[int, float]]]:
    """Gather how far the outputs of each layer change from one computed step to the next.

    Args:
        patch: A "unicp" patch that computes every step, as the method does by default.

    Yields:
        For each layer, step -> largest ``sum |O - O'| / sum |O'|`` over all branches, runs and models of the pipeline;
        it fills while the target runs. The first step of a run, and of each model, has none. Reads each number from
        the device, and costs one output for each layer and branch while it runs.

    Raises:
        ValueError: a patch of another method, or one that caches or slices.
    """
    method = patch.plan.method
    if not isinstance(method, UniCP) or method.saves:
        raise ValueError(f'changes: the patch must be "unicp" with every step computed, got {method}')
    found: list[dict[int, float]] = [{} for _ in range(max(sparse.site.layers for sparse in patch.sites))]
    with contextlib.ExitStack() as stack:
        for sparse in patch.sites:
            stack.enter_context(_committed(sparse, found[sparse.site.layer]))
        yield found


@contextlib.contextmanager
def _committed(sparse: SparseAttention, found: dict[int, float]) -> Iterator[None]:
    state = sparse.state
    keep = state.commit

    def commit(branch: str, step: int | None) -> None:
        keep(branch, step)
        change = state.version(branch).get("change")
        if change is not None and step is not None and math.isfinite(value := float(change)):
            found[step] = max(value, found.get(step, 0.0))

    state.commit = commit  # type: ignore[method-assign]
    try:
        yield
    finally:
        del state.commit
