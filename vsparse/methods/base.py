"""What every method is made of: Site, Call, SparseAttention, Method."""

from __future__ import annotations

import abc
import contextlib
import dataclasses as dc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, Segment, kept_blocks
from vsparse.layouts import Layout
from vsparse.methods.budgets import Density, mean_of
from vsparse.methods.call import Call, check_hidden
from vsparse.parallel.share import ALL
from vsparse.patterns import Pattern, block_map
from vsparse.schedule import Phase, Schedule
from vsparse.state import RunState, Version

__all__ = [
    "Call",
    "Method",
    "Paper",
    "Site",
    "SparseAttention",
    "added",
    "applied",
    "check_hidden",
    "given_hidden",
    "greatest_density",
    "predict_density",
    "recomputed",
    "static_maps",
    "with_text",
    "zero_linear",
]

T = TypeVar("T")


@dc.dataclass(frozen=True, kw_only=True)
class Site:
    """One claimed attention module.

    Args:
        root: Name of the model in its pipeline. name: dotted path of the module in the root.
        layer, layers: Index in the root, counted over all its stacks, and how many there are.
        dim: Width of the hidden states. heads, head_dim: of the attention.
        host: Family name in the host table.
        offers: What the site can give a method: "hidden" (attention input), "time" (more than one frame, which
            each call is asked for again).
    """

    root: str
    name: str
    layer: int
    layers: int
    dim: int
    heads: int
    head_dim: int
    host: str
    offers: frozenset[str] = frozenset({"hidden", "time"})

    @classmethod
    def alone(cls, *, heads: int, head_dim: int, layer: int = 0) -> Site:
        """A site of no model, the last of its layers: what methods are tried on samples with."""
        return cls(
            root="none",
            name="site",
            layer=layer,
            layers=layer + 1,
            dim=heads * head_dim,
            heads=heads,
            head_dim=head_dim,
            host="none",
        )


@dc.dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from: title, arXiv number, and whether it is trained."""

    title: str
    arxiv: str
    trained: bool


class SparseAttention(nn.Module):
    """The part of a method that lives at one site, as the child ``attn.vsparse``.

    Subclasses implement `core` and, where a branch is added in host order, `combine`. `phase`, `call`, `hidden` and
    `state` are plain attributes, set by the root before each forward.

    Class attributes:
        aux: What `core` hands to `combine`: "tokens", tensors ``[B, N or video, H, any]`` in host order, or "pooled"
            ones, ``[B, any, H, any]``, of which each process gets all heads.
    """

    aux: ClassVar[Literal["tokens", "pooled"]] = "pooled"
    phase: Phase
    call: Call | None
    hidden: Tensor | None
    state: RunState

    def __init__(self, method: Method, site: Site) -> None:
        super().__init__()
        self.method, self.site = method, site
        self.phase, self.call, self.hidden, self.state = "dense", None, None, RunState()
        self.peak_density = 1.0
        given = method.call_density()
        if isinstance(given, tuple) and len(given) != site.heads:
            raise ValueError(
                f"{method.key}: {len(given)} densities for {site.name}, which has {site.heads} heads; give one number, "
                "or one for each head"
            )
        self.ran = False
        self.added: frozenset[str] = frozenset()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this site in host order: q, k, v and the result are ``[B, N, H, D]``.

        `core` runs without autocast, which would take scores, losses and centroids to half precision: q, k and v come
        in the dtype that attention is computed in. `combine` runs under it, like the layers of the host.
        """
        assert self.call is not None
        hidden, self.hidden = self.hidden, None  # a recomputation may stop in here and would leave it behind
        kind = q.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
            fine, aux = self.attend(q, k, v, hidden, self.call)
        return self.combine(fine, aux, hidden, self.call)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`core`; with several processes to one video, between an exchange of tokens for heads and the way back."""
        share = call.share
        q, k, v, *features = share.exchange(q, k, v, *self.features(q, hidden))
        if features:
            call = dc.replace(call, features=tuple(features))
        fine, aux = self.core(q, k, v, hidden, call)
        if self.aux == "tokens":
            fine, *branches = share.restore(fine, *aux)
            return fine, tuple(branches)
        return share.restore(fine)[0], tuple(share.all_heads(x, 2) for x in aux)

    def features(self, q: Tensor, hidden: Tensor | None) -> tuple[Tensor, ...]:
        """What a choice needs besides q, k and v, of every token and head: it comes to `core` as `Call.features`.

        Args:
            q: ``[B, n, H, D]``. hidden: ``[B, n, dim]``, the attention input; n: the tokens that this process holds.

        Returns:
            Tensors ``[B, n, H, any]``, with the text around them or without. Default: none.
        """
        return ()

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pack, select, attend, unpack; without autocast, so ``hidden`` may come in another dtype than q, k and v.

        With several processes to one video q, k and v are of the heads ``call.share.mine`` alone, while ``hidden``
        holds the tokens of this process.

        Returns:
            ``fine [B, N, H, D]`` in host order, and tensors for `combine`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sparse path; it only runs dense")

    def combine(self, fine: Tensor, aux: tuple[Tensor, ...], hidden: Tensor | None, call: Call) -> Tensor:
        """Add what a method computes beside the fine attention, in host order. Default: nothing."""
        return fine

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the method added, by its own names: without the factors that a LoRA has put around a layer."""
        for name, parameter in self.named_parameters():
            plain = name.replace(".base_layer.", ".")
            if plain in self.added:
                yield plain, parameter

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What ``Patch.save`` writes, floating: the parameters, and whatever else a trained method needs back."""
        yield from self.own_parameters()

    def version(self, branch: str) -> Version:
        """What a call of a branch reads, and what its recomputation under checkpointing reads again."""
        return self.state.version(branch)

    def absorb(self, staged: dict[str, Tensor]) -> None:
        """Take from what a call has staged whatever outlives a generation; the rest is the branch's next version."""

    def tally(self, blocks: BlockMap, batch: int, *more: BlockMap) -> None:
        """Report the executed map of this call, or several disjoint ones whose parts are merged.

        Accumulated on the device, read only by ``Patch.stats``.
        """
        share = ALL if self.call is None else self.call.share
        lead = (batch, share.heads_of(self.site.heads))
        computed, possible = (x.expand(lead).sum(0) for x in blocks.pairs())
        for part in more:
            computed = computed + part.pairs()[0].expand(lead).sum(0)
        self.state.stage("pairs", torch.stack((computed.sum(), possible.sum())))
        if not share.alone:
            self.state.stage("loads", computed)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.method.key}, layer {self.site.layer} of {self.site.layers}"


@dc.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """One published method with its published defaults: a frozen, keyword-only dataclass.

    Class attributes:
        key: Registry name. default_schedule: the published schedule. requires: what a site must offer.
        paper: Source. state_phases: phases that leave something for later calls (empty: stateless).
        exact_phases: phases whose output is full attention.
        search_cost: `search_flops` with the default options as a formula of B, H, D, N (tokens), V (video tokens), S
            (slots), K (video tiles or key clusters), Q (query clusters), P (density of the static map) and options.
        static_by_head: whether static maps that differ within a layer differ by head.
        advice: when to use it, in one sentence. chooses: whether it leaves pairs out as it stands; False: it computes
            everything until something is trained, calibrated or put together.
    """

    key: ClassVar[str]
    paper: ClassVar[Paper]
    default_schedule: ClassVar[Schedule] = Schedule()
    requires: ClassVar[frozenset[str]] = frozenset()
    state_phases: ClassVar[frozenset[str]] = frozenset()
    exact_phases: ClassVar[frozenset[str]] = frozenset({"dense"})
    search_cost: ClassVar[str] = "0"
    static_by_head: ClassVar[bool] = True
    advice: ClassVar[str] = ""
    chooses: ClassVar[bool] = True

    @abc.abstractmethod
    def layout(self, grid: Grid, site: Site) -> Layout:
        """The layout of a site; cached by the caller on ``layout.key``."""

    @abc.abstractmethod
    def build(self, site: Site) -> SparseAttention:
        """The module for a site. Must not draw from the global random generator."""

    def of(self, site: Site) -> Method:
        """The method that runs at a site: this one, unless it puts others together."""
        return self

    def needs_steps(self, schedule: Schedule) -> bool:
        """Whether a phase depends on the denoising step."""
        return schedule.needs_steps

    def shares_branches(self) -> bool:
        """Whether the CFG branches have one state: what one has found, the other uses."""
        return bool(getattr(self, "share_branches", False))

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
        """The phase of one call: what the schedule says; the arguments are those of `Schedule.phase`, and the step of
        the last call that left state, None when there is none.
        """
        return schedule.phase(step=step, steps=steps, layer=layer, filled=filled)

    def call_density(self) -> Density:
        """Density that goes into `Call.density` when no ramp overrides it."""
        density: Density = getattr(self, "density", 1.0)
        return density

    def kernel_options(self) -> Mapping[str, Any]:
        """Options that `core` hands to ``block_sparse_attention``: who does not take them is refused before a run."""
        return {}

    def static_pattern(self, site: Site) -> Pattern | tuple[Pattern, ...] | None:
        """What of the map follows from the layout alone, one pattern or one per head; None: nothing.

        Its block form is made once per layout, outside any compiled region, shared by the layers whose pattern is
        equal, and handed to the site as `Call.static`.
        """
        return None

    def static_map(self, layout: Layout, site: Site) -> BlockMap | None:
        """The block form of `static_pattern` over a layout, for texts of full length."""
        pattern = self.static_pattern(site)
        return None if pattern is None else block_map(pattern, layout)

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """Share of token pairs that a sparse call computes, forced text included, for a full text.

        It follows from the method, the layout, the static pattern and the shape of the heads: asked once for each.
        """
        return predict_density(layout, self.call_density())

    def state(
        self, layout: Layout, site: Site, batch: int, dtype: torch.dtype
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what one branch of a site keeps between calls; ``dtype`` is that of its attention."""
        return {}

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """FLOPs that a call in ``phase`` spends on finding its map; as of `predicted_density`, asked once."""
        return 0.0

    def options(self) -> dict[str, Any]:
        """The fields as numbers, strings, None and tuples of them: what an adapter or a profile writes down."""
        return dc.asdict(self)

    def replace(self, **overrides: Any) -> Method:
        """A copy with fields replaced.

        Raises:
            ValueError: a field that the method does not have.
        """
        known = [f.name for f in dc.fields(self)]
        for name in overrides:
            if name not in known:
                accepted = ", ".join(known) if known else "none"
                raise ValueError(f"method {self.key!r} has no option {name!r}; its options: {accepted}")
        return dc.replace(self, **overrides)


def static_maps(sites: Sequence[SparseAttention], layout: Layout) -> dict[int, BlockMap | None]:
    """Static map of each layer of some sites with one layout.

    Sites with equal methods and patterns share one object, and all maps have one capacity: they share their graphs.
    """
    kinds = {site.site.layer: (site.method, site.method.static_pattern(site.site)) for site in sites}
    first = {kinds[site.site.layer]: site for site in reversed(sites)}
    maps = {kind: site.method.static_map(layout, site.site) for kind, site in first.items()}
    widest = max((blocks.capacity for blocks in maps.values() if blocks is not None), default=0)
    wide = {kind: None if blocks is None else blocks.widened(widest) for kind, blocks in maps.items()}
    return {layer: wide[kind] for layer, kind in kinds.items()}


def with_text(grid: Grid, share: float) -> float:
    """Executed density when ``share`` of the pairs of video tokens is computed, and every pair with text."""
    return share + (1.0 - share) * (1.0 - grid.video**2 / grid.tokens**2)


def predict_density(layout: Layout, density: Density) -> float:
    """Executed density when ``density`` of the video blocks and all text is kept, lengths averaged."""
    tiles = layout.video_tiles
    return with_text(layout.grid, mean_of(density, lambda share: kept_blocks(share, tiles)) / tiles)


def greatest_density(layout: Layout, count: int, static: BlockMap | None = None) -> float:
    """Executed density that no map exceeds whose rows choose ``count`` tiles of the video, whichever the data says.

    Every row is given the largest tiles, on top of what a static map keeps of it, and all text, in full length.
    """
    tiles = layout.tiled
    size = torch.where(tiles.segment == int(Segment.TEXT), 0, tiles.length[0, 0]).double()
    free = size[None]
    if static is not None:
        per_tile = layout.blocks_per_tile
        free = torch.where(static.to_mask()[0, :, ::per_tile, ::per_tile], 0, size)
    kept = size.sum() - free.sum(-1) + free.topk(min(count, len(size))).values.sum(-1)
    return with_text(layout.grid, float((kept * size).sum(-1).mean() / layout.grid.video**2))


def given_hidden(key: str, hidden: Tensor | None) -> Tensor:
    """The attention input, for a method that cannot do without it."""
    if hidden is None:
        raise ValueError(
            f"{key}: this call brings no attention input (what a site offers as 'hidden'), which the trained part "
            "reads; choose a method that needs nothing of a site"
        )
    return hidden


def recomputed(function: Callable[..., T], /, *inputs: Any) -> T:
    """What a function of tensors gives; for the backward only its inputs are kept, and it runs a second time.

    For work that is cheap and leaves much behind. A compiler, which weighs that itself, gets the plain call.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def added(fine: Tensor, branch: Tensor, call: Call) -> Tensor:
    """``fine [B, N, H, D]`` with a branch of the video tokens alone, ``[B, video, H, D]``, added to it."""
    grid = call.grid
    return fine + F.pad(branch, (0, 0, 0, 0, grid.text_before, grid.text_after)) if grid.text else fine + branch


def applied(layer: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer of a method outside of autocast: x goes in, and comes out, in the dtype of the weights.

    Args:
        dtype: That of the host's attention: weights that layerwise casting stores in float8 are used in it.
    """
    stored = layer.weight.dtype
    found: Tensor = layer(x.to(dtype if stored.itemsize == 1 else stored))
    return found


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer of zeros, made without drawing from the global random generator as ``nn.Linear`` does."""
    like = torch.empty(0)
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(like.new_zeros(outputs, inputs))
    linear.bias = nn.Parameter(like.new_zeros(outputs))
    return linear
