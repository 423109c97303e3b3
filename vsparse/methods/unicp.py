"""unicp: attention outputs of earlier steps again while they barely change, and logits in fewer dimensions."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Layout
from vsparse.methods import get_method
from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention
from vsparse.methods.budgets import Density
from vsparse.patterns import Pattern
from vsparse.schedule import Phase, Schedule

__all__ = ["UniCP", "UniCPAttention", "full_attention", "relative_change"]

Windows = int | tuple[int, ...] | tuple[tuple[int, ...], ...]
Choices = bool | tuple[bool, ...] | tuple[tuple[bool, ...], ...]


@dc.dataclass(frozen=True, kw_only=True)
class UniCP(Method):
    """A cache of attention outputs inspired by UniCP (arXiv 2502.04393); not that method, and no claim of its results.

    The public text of the paper does not define it fully. Taken from it: caching windows that follow the error of each
    layer, slicing of attention by principal components at steps that cannot be cached, and the choice between the two
    by error. How each is done here is ours. As it stands the method computes every step exactly and measures how far
    outputs change from step to step; `vsparse.measure.calibrate.changes` gathers that, and
    `vsparse.methods.unicp_calibration` finds the numbers below. Nothing is decided from a running error: that would
    make the host wait for the device.

    Args:
        windows: Steps that one computed output serves, its own included; 1: no step is cached. One number, a tuple with
            one for each of as many equal ranges of the steps, or a tuple with such a tuple for each layer. The window
            of an output is that of the step that computed it.
        sliced: Whether a step projects q and k to ``rank`` dimensions instead of computing exactly or reusing: softmax
            of these logits over all keys, v as it is. In the forms of ``windows``. It leaves no output to reuse.
        rank: Dimensions that slicing keeps; None: no slicing. The projection is a parameter, a basis for each head,
            the first ``rank`` coordinates until `unicp_calibration.fit_bases` sets it; it is saved with the patch.
        ends: Share of the steps at either end that are computed exactly and never reused; at least one step if > 0.
        inner: What computes the other steps: "dense", or a method that keeps nothing between calls, by key or as a
            `Method`. Slicing is for "dense" only.

    A cached output costs ``tokens * width`` numbers for each layer and CFG branch (`vsparse.plan` says how much). In
    training mode nothing is cached: steps are computed by the inner method, or sliced with gradients, those of the
    basis included. In evaluation mode a reused output has no gradient, and is refused where one is asked for.

    Schedule: every layer and step; that of the inner method is not taken over. Not here: inner methods with phases of
    their own (adaspa, svg2), caching of attention maps. Predicted FLOPs count a sliced step as a full one.
    """

    key: ClassVar[str] = "unicp"
    paper: ClassVar[Paper] = Paper(title="inspired by UniCP, no parity claimed", arxiv="2502.04393", trained=False)
    advice: ClassVar[str] = "Outputs hardly change over the middle steps, and a calibration run can say by how much."
    chooses: ClassVar[bool] = False
    state_phases: ClassVar[frozenset[str]] = frozenset({"search", "refresh"})

    windows: Windows = 1
    sliced: Choices = False
    rank: int | None = None
    ends: float = 0.1
    inner: str | Method = "dense"

    def __post_init__(self) -> None:
        for name in ("windows", "sliced"):
            object.__setattr__(self, name, _tuples(getattr(self, name)))
        _check_table("windows", self.windows, "an integer >= 1", lambda x: _integer(x) and x >= 1)
        _check_table("sliced", self.sliced, "True or False", lambda x: isinstance(x, bool))
        if self.rank is not None and not (_integer(self.rank) and self.rank >= 1):
            raise ValueError(f"unicp: rank must be an integer >= 1 or None, got {self.rank!r}")
        if isinstance(self.ends, bool) or not isinstance(self.ends, int | float) or not 0.0 <= self.ends <= 0.5:
            raise ValueError(f"unicp: ends must be a share in [0, 0.5], got {self.ends!r}")
        if any(_numbers(self.sliced)) and self.rank is None:
            raise ValueError("unicp: sliced steps need a rank, got rank=None")
        inner = _inner(self.inner)
        if isinstance(self.inner, Mapping):
            object.__setattr__(self, "inner", inner)
        if inner.state_phases:
            raise ValueError(
                f"unicp: inner must be a method that keeps nothing between calls, got {inner.key!r}, which keeps what "
                f"its phases {', '.join(sorted(inner.state_phases))} find"
            )
        dense = inner.key == "dense"
        if self.rank is not None and not dense:
            raise ValueError(f'unicp: rank is for inner="dense", got rank={self.rank!r} with inner {inner.key!r}')
        object.__setattr__(self, "_inner", inner)
        # What a site must offer, and which phases are exact, follow the inner method.
        object.__setattr__(self, "requires", inner.requires)
        object.__setattr__(self, "exact_phases", frozenset({"dense", *(self.state_phases if dense else ())}))

    @property
    def inner_method(self) -> Method:
        """The method that computes, resolved."""
        found: Method = self._inner  # type: ignore[attr-defined]
        return found

    @property
    def saves(self) -> bool:
        """Whether any step may be cached or sliced."""
        return max(_numbers(self.windows)) > 1 or any(_numbers(self.sliced))

    def window(self, *, layer: int, step: int, steps: int) -> int:
        """Steps that an output computed in ``step`` serves, its own included."""
        return 1 if self.protected(step, steps) else int(_entry(self.windows, layer, step, steps))

    def protected(self, step: int, steps: int) -> bool:
        """Whether a step lies at one of the ends, which are always computed."""
        count = protected_steps(self.ends, steps)
        return step < count or step >= steps - count

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
        """ "search": the first output is computed; "refresh": a further one; "output": it is given again; "reuse": a
        step that leaves nothing, sliced if the tables say so.
        """
        if schedule.search_at is not None:
            raise ValueError(
                f"unicp: its windows say when attention is computed, got a schedule with search_at={schedule.search_at}"
            )
        if super().phase(schedule, step=step, steps=steps, layer=layer, filled=filled) == "dense":
            return "dense"
        if step is None or steps is None:
            if self.saves:
                raise ValueError(
                    "unicp: which steps are cached depends on the denoising step, and nothing tells it: patch the "
                    "pipeline instead of the bare model, or wrap your loop in `with patch.generation(num_steps)` and "
                    'each model call in `with patch.step(i, branch="cond")`'
                )
            return "refresh" if filled else "search"
        if not self.protected(step, steps):
            if _entry(self.sliced, layer, step, steps):
                return "reuse"
            age = None if stamp is None or not filled else step - stamp
            if age is not None and 0 < age < self.window(layer=layer, step=step - age, steps=steps):
                return "output"
        return "refresh" if filled else "search"

    def layout(self, grid: Grid, site: Site) -> Layout:
        """That of the inner method; host order for "dense"."""
        return self.inner_method.layout(grid, site)

    def call_density(self) -> Density:
        """Of the inner method."""
        return self.inner_method.call_density()

    def kernel_options(self) -> Mapping[str, Any]:
        """Of the inner method."""
        return self.inner_method.kernel_options()

    def static_pattern(self, site: Site) -> Pattern | tuple[Pattern, ...] | None:
        """Of the inner method."""
        return self.inner_method.static_pattern(site)

    def static_map(self, layout: Layout, site: Site) -> BlockMap | None:
        """Of the inner method."""
        return self.inner_method.static_map(layout, site)

    def predicted_density(self, layout: Layout, site: Site) -> float:
        """Of a step that is computed."""
        dense = self.inner_method.key == "dense"
        return 1.0 if dense else self.inner_method.predicted_density(layout, site)

    def search_flops(self, layout: Layout, site: Site, batch: int, phase: Phase) -> float:
        """Of the inner method, in the steps that are computed."""
        return 0.0 if phase == "output" else self.inner_method.search_flops(layout, site, batch, "search")

    def state(
        self, layout: Layout, site: Site, batch: int, dtype: torch.dtype
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """The last computed output, and its change from the one before."""
        output = (batch, layout.tokens, site.heads, site.head_dim)
        return {"output": (output, dtype), "change": ((), torch.float32)}

    def options(self) -> dict[str, Any]:
        """The fields; an inner method as its key, or as its key and options."""
        fields = {field.name: getattr(self, field.name) for field in dc.fields(self)}
        if isinstance(self.inner, Method):
            fields["inner"] = {"method": self.inner.key, **self.inner.options()}
        return fields

    def build(self, site: Site) -> SparseAttention:
        """The module; its parameter is the basis of slicing, and it has those of the inner method."""
        for name in ("windows", "sliced"):
            table = getattr(self, name)
            if isinstance(table, tuple) and isinstance(table[0], tuple) and len(table) != site.layers:
                raise ValueError(
                    f"unicp: {name} has {len(table)} layers, and {site.root} has {site.layers}; calibrate it for this "
                    "model, or give one row for all layers"
                )
        if self.rank is not None and self.rank > site.head_dim:
            raise ValueError(f"unicp: rank must be at most the head dimension {site.head_dim}, got {self.rank}")
        return UniCPAttention(self, site)


class UniCPAttention(SparseAttention):
    """The cache at one site, around the inner method."""

    method: UniCP
    inner: SparseAttention | None
    basis: nn.Parameter | None

    def __init__(self, method: UniCP, site: Site) -> None:
        super().__init__(method, site)
        inner = method.inner_method
        self.inner = None if inner.key == "dense" else inner.build(site)
        if self.inner is not None:
            self.aux = self.inner.aux  # type: ignore[misc]
            self.inner.phase, self.inner.state = "search", self.state
            self.inner.tally = self._inner_tally  # type: ignore[method-assign]
        self.basis = None
        if method.rank is not None:
            start = torch.eye(site.head_dim, method.rank).expand(site.heads, -1, -1)
            self.basis = nn.Parameter(start.clone())

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Give the cached output, of the tokens and heads that were asked for, or compute one."""
        if self._gives_cached:
            if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
                raise NotImplementedError(
                    f"unicp: {self.site.name} would reuse an output, which has no gradient: call model.train(), which "
                    "computes every step, or run under torch.no_grad()"
                )
            everything = BlockMap.full(call.blocking)
            self.tally(dc.replace(everything, count=torch.zeros_like(everything.count)), q.shape[0])
            return self.state.read("output"), ()
        return super().attend(q, k, v, hidden, call)

    def features(self, q: Tensor, hidden: Tensor | None) -> tuple[Tensor, ...]:
        """Those of the inner method."""
        return () if self.inner is None else self.inner.features(q, hidden)

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, call: Call
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute, sliced or not. aux: of the inner method."""
        if self.inner is not None:
            self.inner.peak_density, self.inner.call = self.peak_density, call
            return self.inner.core(q, k, v, hidden, call)
        self.tally(BlockMap.full(call.rows, call.blocking), q.shape[0])
        basis = call.share.own_heads(self.basis, 0) if self.basis is not None and self.phase == "reuse" else None
        return full_attention(q, k, v, call, basis), ()

    def combine(self, fine: Tensor, aux: tuple[Tensor, ...], hidden: Tensor | None, call: Call) -> Tensor:
        """Finish what the inner method has computed; cache it."""
        if self._gives_cached:
            return fine
        out = fine if self.inner is None else self.inner.combine(fine, aux, hidden, call)
        if self.phase in self.method.state_phases and not self.training:
            kept = out.detach()
            far = kept.new_full((), torch.inf, dtype=torch.float32)
            if self.phase == "refresh":
                far = relative_change(kept, self.state.read("output")).float()
            self.state.stage("output", kept)
            self.state.stage("change", far)
        return out

    @property
    def _gives_cached(self) -> bool:
        return self.phase == "output" and not self.training

    def _inner_tally(self, blocks: BlockMap, batch: int, *more: BlockMap) -> None:
        self.tally(blocks, batch, *more)


def full_attention(q: Tensor, k: Tensor, v: Tensor, call: Call, basis: Tensor | None = None) -> Tensor:
    """Softmax attention over all valid tokens by torch's own kernels, its logits in the dimensions of a basis.

    Args:
        q, k, v: ``[B, N, H, D]``, host order. call: gives the grid and the text lengths.
        basis: ``[H, D, R]``, orthonormal columns; None: the logits are exact. The scale stays ``D ** -0.5``.

    Returns:
        ``[B, N, H, D]``, contiguous; 0 for text that is not valid.
    """
    scale, mask, shown = q.shape[-1] ** -0.5, None, None
    if call.share.shard is not None:
        if basis is not None:
            q = torch.einsum("bnhd,hdr,hcr->bnhc", q, basis.to(q.dtype), basis.to(q.dtype))
        everything = BlockMap.full(call.rows, call.blocking)
        return call.attend(q, k, v, everything, packed=[call.rows.pack(x) for x in (q, k, v)])
    if call.text_length is not None:
        shown = valid_tokens(call.grid, call.text_length)
        size = call.grid.tokens if call.trim is None else call.trim.shape[0]
        k, v = k[:, :size], v[:, :size]
        if call.trim is None or q.shape[0] > 1:
            mask = shown[:, None, None, :size]
    if basis is not None:
        q, k = (torch.einsum("bnhd,hdr->bnhr", x, basis.to(x.dtype)) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    return (out if shown is None else torch.where(shown[:, :, None, None], out, 0)).contiguous()


def valid_tokens(grid: Grid, text_length: Tensor) -> Tensor:
    """``[B, N]`` bool: tokens of the video and valid text."""
    token = torch.arange(grid.tokens, device=text_length.device)
    before, after = token < grid.text_before, token >= grid.text_before + grid.video
    place = torch.where(before, token, token - grid.text_before - grid.video)
    return ~(before | after) | (place < text_length[:, None])


def relative_change(found: Tensor, previous: Tensor) -> Tensor:
    """0-d: ``sum |found - previous| / sum |previous|`` over all samples, tokens and heads; float32 at least."""
    wide = torch.promote_types(found.dtype, torch.float32)
    size = torch.linalg.vector_norm(previous, 1, dtype=wide).clamp_min(torch.finfo(wide).tiny)
    far: Tensor = torch.linalg.vector_norm(found - previous, 1, dtype=wide) / size
    return far


def protected_steps(ends: float, steps: int) -> int:
    """How many steps at either end are always computed."""
    return -int(-(ends * steps - 1e-9) // 1) if ends > 0.0 else 0


def _inner(given: object) -> Method:
    if isinstance(given, Mapping):
        options = {name: _tuples(value) for name, value in given.items() if name != "method"}
        return get_method(given["method"])().replace(**options)
    if isinstance(given, str):
        return get_method(given)()
    if not isinstance(given, Method):
        raise ValueError(f"unicp: inner must be the key of a method or a Method, got {given!r}")
    return given


def _entry(table: Any, layer: int, step: int, steps: int) -> Any:
    """The number of a layer and step: for all, by equal ranges of the steps, or these for each layer."""
    if isinstance(table, tuple) and isinstance(table[0], tuple):
        table = table[layer]
    return table[step * len(table) // steps] if isinstance(table, tuple) else table


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, tuple | list) else value


def _numbers(table: Any) -> list[Any]:
    return [x for part in table for x in _numbers(part)] if isinstance(table, tuple) else [table]


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_table(name: str, table: Any, accepted: str, fits: Any) -> None:
    rows = table if isinstance(table, tuple) else (table,)
    nested = [isinstance(row, tuple) for row in rows]
    shaped = bool(rows) and (not any(nested) or (all(nested) and all(rows)))
    flat = not any(isinstance(x, tuple) for row in rows if isinstance(row, tuple) for x in row)
    if not shaped or not flat or not all(fits(x) for x in _numbers(table)):
        raise ValueError(
            f"unicp: {name} must be {accepted}, a tuple of them by ranges of the steps, or a tuple of such tuples by "
            f"layer, got {table!r}"
        )
