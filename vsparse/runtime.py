"""What happens around one forward of a patched model: which call it is, and the phase and state of every site."""

from __future__ import annotations

import dataclasses as dc
import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vsparse.blocks import BlockMap
from vsparse.forms import Forms
from vsparse.geometry import Grid
from vsparse.layouts import Blocking
from vsparse.methods.base import Call, Method, SparseAttention
from vsparse.methods.budgets import Density
from vsparse.parallel.context import ContextParallel
from vsparse.parallel.division import Division
from vsparse.parallel.share import Cut, Share
from vsparse.schedule import Phase, Schedule
from vsparse.state import Version
from vsparse.steps import Tracker, Where
from vsparse.wrapping import refuse_fullgraph, unreduced

__all__ = ["Reading", "Runtime"]


@dc.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a host reads off the arguments of one forward of its root.

    Args:
        grid: The lattice. batch: B. device: of the hidden states.
        text_length: ``[B]`` int tensor of valid text tokens, or None when the host has no padded text.
        text_source: The tensors that determine ``text_length``; while they are the same objects, unchanged, the
            longest length is not read from the device again.
    """

    grid: Grid
    batch: int
    device: torch.device
    text_length: Tensor | None = None
    text_source: tuple[Tensor, ...] = ()


@dc.dataclass(eq=False)
class _Record:
    """Everything one forward bound to its sites: what a recomputation needs back."""

    bound: list[tuple[SparseAttention, Phase, Call, Version]]
    division: Division
    cut: Cut | None
    batch: int

    def dense(self, site: SparseAttention, whole: Tensor | float) -> Tensor | float:
        """Token pairs of full attention at a site, by this process; ``whole``: of one head with all rows."""
        call = next(call for module, _, call, _ in self.bound if module is site)
        if call.share.shard is not None:
            rows, keys = (side.length.double().sum(-1) for side in (call.rows, call.blocking))
            whole = (rows * keys).expand(self.batch, 1).sum()
        return whole * call.share.heads_of(site.site.heads)

    def restore(self, *, again: bool = False) -> None:
        self.division.cut = self.cut
        for module, phase, call, version in self.bound:
            module.phase, module.call = phase, call
            module.state.bind(version, again=again)


class Runtime:
    """One patched root: hooks around its forward, and what they gather."""

    def __init__(
        self,
        *,
        name: str,
        sites: Sequence[SparseAttention],
        method: Method,
        schedule: Schedule,
        tracker: Tracker,
        read: Callable[[nn.Module, Mapping[str, Any]], Reading],
        parallel: Callable[[nn.Module], ContextParallel | None],
        bind: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Mapping[str, Any]],
        intact: Callable[[nn.Module, SparseAttention], str | None],
        placement: Callable[[nn.Module], tuple[torch.device, torch.dtype]],
        strict: bool,
        division: Division,
        skipped: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        self.name, self.sites, self.method, self.schedule = name, list(sites), method, schedule
        self.tracker, self.read, self.bind, self.intact = tracker, read, bind, intact
        self.parallel = parallel
        self.placement, self.strict, self.division = placement, strict, division
        self.skipped = dict(skipped or {})
        self.siblings: list[Runtime] = []
        self.patch: Any = None
        self.losses: dict[str, Tensor] = {}
        self.fallbacks: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.pairs: dict[str, Tensor] = {}
        self.dense_pairs: Tensor | float = 0.0
        self.forms = Forms(self.sites)
        self._longest: list[tuple[tuple[weakref.ref[Tensor], ...], tuple[int, ...], int]] = []
        self._owner: threading.Thread | None = None
        self._now: tuple[Where, str, _Record, Tensor | float] | None = None
        self._seen: tuple[object, int | None, dict[str, int]] | None = None
        self._form: tuple[Grid, int] | None = None
        self.noticed: Callable[[Grid], None] | None = None
        # Made here, because the decorator imports a compiler; on plain functions, which copies of a model may share.
        why = "vsparse prepares each forward on the host; use fullgraph=False, or compile the blocks of the model"
        self._uncompiled = [torch.compiler.disable(x, reason=why) for x in (Runtime._before, Runtime._after)]

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the root."""
        self._uncompiled[0](self, module, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the root; runs after an exception, too."""
        self._uncompiled[1](self, output)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        me = threading.current_thread()
        # An interrupt (Ctrl-C) tears a forward away without its hooks; then its thread is this one, or gone.
        if self._owner is not None and self._owner is not me and self._owner.is_alive():
            raise RuntimeError(
                f"{self.name}: a forward of this patched model is still running; concurrent calls of one patched model "
                "would share its state. Use one model per thread, or run the calls one after another."
            )
        self._owner = me
        self.division.enter()
        try:
            self._refuse_overlooked()
            self._prepare(module, self.read(module, self.bind(module, args, kwargs)))
        except BaseException as error:
            self.division.failed(error)
            self._release()
            raise

    def _after(self, output: Any) -> None:
        if self._owner is not threading.current_thread():
            return
        now, failed = self._now, output is None
        if failed:
            self.division.failed(sys.exc_info()[1])
        try:
            if now is not None and not failed:
                if not self.tracker.suspended:
                    self._commit(*now)
                if torch.is_grad_enabled():
                    _on_backward(output, now[2])
        finally:
            self._release()

    def _release(self) -> None:
        for site in self.sites:
            site.hidden = None
        self._owner = self._now = None

    def _refuse_overlooked(self) -> None:
        """Refuse to train what DDP would not average; it can only be seen while its forward runs."""
        if not torch.is_grad_enabled():
            return
        count = unreduced(parameter for site in self.sites for _, parameter in site.own_parameters())
        if count:
            raise ValueError(
                f"{self.name}: DistributedDataParallel was put around this model before vsparse.apply added {count} "
                f"parameters of {self.method.key!r}, which it does not average between processes; call apply first, "
                "then wrap the model"
            )

    def _prepare(self, module: nn.Module, reading: Reading) -> None:
        suspended = self.tracker.suspended
        where = Where() if suspended else self.tracker.where(self.name)
        branch = "suspended" if suspended else self._enter(where, reading)
        against = [reason for site in self.sites if (reason := self.intact(module, site)) is not None]
        sparse = [s for s in self.sites if self._phase(s, where, branch) != "dense"]
        if sparse:
            dtype = self._dtype(module, sparse[0], reading.device)
            against += self.forms.unsupported(sparse, reading.grid, reading.device, dtype)
        if against:
            self._fall_back(against)
        # full, not tensor: a fill is launched on the device, a copy from the host would wait for it.
        step = torch.full((), -1 if where.step is None else where.step, device=reading.device)
        trim = self._trim(reading)
        calls: dict[object, Call] = {}
        bound = []
        if self.sites:
            self.division.follow(self.parallel(module), self.sites[0].site.heads, reading.device)
        if not self.division.alone:
            refuse_fullgraph(module)
        layouts = [self.forms.layout(reading.grid, site, reading.device) for site in self.sites]
        movable = all(site.state.empty for site in self.sites)
        self.division.begin(reading.grid, reading.batch, reading.device, layouts, movable=movable)
        for site, layout in zip(self.sites, layouts, strict=True):
            static = self.forms.static(layout, site)
            density = self._density(module, site)
            share = self.division.share(site.site.layer, site.site.heads)
            call = calls.get((layout.key, static, density, share))
            if call is None:
                blocking = layout.bind(reading.text_length)
                call = calls[layout.key, static, density, share] = Call(
                    layout=layout,
                    blocking=blocking,
                    static=None if static is None else _bound(static, blocking, site, share),
                    share=share,
                    shard_rows=None if share.shard is None else share.shard.own.bind(reading.text_length),
                    text_length=reading.text_length,
                    step=step,
                    density=_own(self.forms.budget(density, reading.device), share),
                    trim=trim,
                )
            phase: Phase = "dense" if against else self._phase(site, where, branch)
            bound.append((site, phase, call, site.version(_key(site, branch))))
            site.ran = False
        record = _Record(bound, self.division, self.division.cut, reading.batch)
        record.restore()
        self._now = (where, branch, record, _token_pairs(reading))

    def _enter(self, where: Where, reading: Reading) -> str:
        """Notice a new generation, batch or grid; returns the branch."""
        if self._form != (reading.grid, reading.batch):
            self.reset()
            self.forms.shrink()
            self._form = (reading.grid, reading.batch)
            if self.noticed is not None:
                self.noticed(reading.grid)
        branch = where.branch or "default"
        key, last, repeats = self._seen or (None, None, {})
        backwards = last is not None and where.step is not None and where.step < last
        again = where.step == last and branch in repeats
        # Without a generation to compare, a step that comes again may be a restart after an interrupted run.
        if key != where.generation or backwards or (again and where.generation is None):
            self.reset()
            repeats = {}
        elif where.step != last:
            repeats = {}
        repeats[branch] = repeats.get(branch, 0) + 1
        if self.method.needs_steps(self.schedule) and not where.advancing and repeats[branch] > 2:
            raise ValueError(
                f"{self.name}: the scheduler of the patched pipeline does not move between calls; another pipeline or "
                "loop seems to drive this model. Patch that pipeline, or use patch.generation and patch.step."
            )
        apart = any(site.method.state_phases and not site.method.shares_branches() for site in self.sites)
        if apart and where.branch is None and where.step is not None and repeats[branch] > 1:
            raise ValueError(
                f"{self.name}: two calls in step {where.step}, and nothing tells their CFG branches apart; wrap "
                'each in `with patch.step(i, branch="cond")` or branch="uncond"'
            )
        self._seen = (where.generation, where.step, repeats)
        for other in self.siblings:
            if other is not self:
                other.reset()
        return branch

    def _phase(self, site: SparseAttention, where: Where, branch: str) -> Phase:
        if self.tracker.suspended:
            return "dense"
        branch = _key(site, branch)
        filled = bool(site.state.version(branch))
        step, layer = where.step, site.site.layer
        stamp = site.state.stamp(branch)
        phase = self.method.phase(self.schedule, step=step, steps=where.steps, layer=layer, filled=filled, stamp=stamp)
        if where.step is not None and phase in site.method.state_phases and stamp == where.step:
            # A second evaluation of a step that has already searched: it reads, and never writes.
            return "dense" if phase in site.method.exact_phases else "reuse"
        return phase

    def _density(self, module: nn.Module, site: SparseAttention) -> Density:
        ramp = self.schedule.ramp
        if ramp is None or not module.training:
            return site.method.call_density()
        if self.tracker.training_step is None:
            raise ValueError("this schedule has a density ramp: call patch.training_step(i) before each training step")
        density = float(ramp(self.tracker.training_step))
        if not 0.0 < density <= 1.0:
            raise ValueError(f"the ramp gave density {density!r} at training step {self.tracker.training_step}")
        return density

    def _dtype(self, module: nn.Module, site: SparseAttention, device: torch.device) -> torch.dtype:
        """dtype that attention computes in: autocast's, else that of the site's projections."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.placement(module.get_submodule(site.site.name))[1]

    def _fall_back(self, against: list[str]) -> None:
        if self.strict:
            raise NotImplementedError(f"{self.name}: sparse attention cannot run here:\n  - " + "\n  - ".join(against))
        for reason in against:
            if reason not in self.fallbacks:
                warnings.warn(f"vsparse: {self.name} runs dense: {reason}", stacklevel=2)
            self.fallbacks[reason] += 1

    def _trim(self, reading: Reading) -> Tensor | None:
        """A tensor of as many rows as there are tokens up to the longest valid text; read once per prompt."""
        if reading.text_length is None or not reading.grid.text_after:
            return None
        longest = None
        versions = tuple(-1 if x.is_inference() else x._version for x in reading.text_source)
        if -1 not in versions:
            for refs, known, value in self._longest:
                if known == versions and all(r() is x for r, x in zip(refs, reading.text_source, strict=True)):
                    longest = value
        if longest is None:
            longest = _longest(reading)
            entry = (tuple(weakref.ref(x) for x in reading.text_source), versions, longest)
            self._longest = [entry, *self._longest[:7]]
        trim = torch.empty(reading.grid.video + longest, 0, device=reading.device)
        torch._dynamo.maybe_mark_dynamic(trim, 0)
        return trim

    def _commit(self, where: Where, branch: str, record: _Record, dense: Tensor | float) -> None:
        for name, (heads, why) in self.skipped.items():
            self.fallbacks[f"{name}: {why}"] += 1
            self.dense_pairs = self.dense_pairs + dense * heads
        self.losses = {}
        for site, phase, _, _ in record.bound:
            if not site.ran:
                continue
            self.phases[phase] += 1
            staged = site.state.staged
            pairs, loss, loads = (staged.pop(name, None) for name in ("pairs", "loss", "loads"))
            if loads is not None:
                self.division.observe(site.site.layer, loads)
            site.absorb(staged)
            if loss is not None:
                self.losses[site.site.name] = loss
                _on_backward((loss,), record)  # of a frozen host it is all that a backward goes through
            if pairs is not None:
                total = self.pairs.get(site.site.name)
                self.pairs[site.site.name] = pairs if total is None else total + pairs
            else:
                self.dense_pairs = self.dense_pairs + record.dense(site, dense)
            if phase in site.method.state_phases:
                site.state.commit(_key(site, branch), where.step)

    def reset(self) -> None:
        """Drop the state of all sites; the next call starts a generation."""
        self._seen = None
        for site in self.sites:
            site.state.clear()

    def clear_stats(self) -> None:
        """Count anew."""
        self.fallbacks, self.phases = Counter(), Counter()
        self.pairs, self.dense_pairs = {}, 0.0

    def state_bytes(self) -> int:
        """Bytes of state held now."""
        return sum(site.state.nbytes() for site in self.sites)

    def __deepcopy__(self, memo: dict[int, object]) -> Runtime:
        import copy

        twin = Runtime(
            name=self.name,
            sites=copy.deepcopy(self.sites, memo),
            method=self.method,
            schedule=self.schedule,
            tracker=copy.deepcopy(self.tracker, memo),
            read=self.read,
            parallel=self.parallel,
            bind=self.bind,
            intact=self.intact,
            placement=self.placement,
            strict=self.strict,
            division=copy.deepcopy(self.division, memo),
            skipped=self.skipped,
        )
        memo[id(self)] = twin
        return twin


def _own(budget: Tensor, share: Share) -> Tensor:
    return share.own_heads(budget, 0) if budget.ndim else budget


def _key(site: SparseAttention, branch: str) -> str:
    """Under which name a site keeps the state of a CFG branch."""
    return "shared" if site.method.shares_branches() else branch


def _longest(reading: Reading) -> int:
    """Longest valid text; without values (FakeTensor) all of it."""
    length = reading.text_length
    assert length is not None
    return reading.grid.text if isinstance(length, FakeTensor) else int(length.max())


def _bound(static: BlockMap, blocking: Blocking, site: SparseAttention, share: Share) -> BlockMap:
    """A static map of the heads of this process, with the text lengths of a call."""
    if static.index.shape[1] > 1 and site.method.static_by_head:
        static = dc.replace(static, index=share.own_heads(static.index, 1), count=share.own_heads(static.count, 1))
    return dc.replace(static, q=blocking, k=blocking)


def _token_pairs(reading: Reading) -> Tensor | float:
    """Valid token pairs of one head, over all samples."""
    if reading.text_length is None:
        return float(reading.batch * reading.grid.tokens**2)
    return (reading.text_length.double() + reading.grid.video).square().sum()


def _on_backward(output: Any, record: _Record) -> None:
    """Bind this forward's call again before anything of it is recomputed in a backward."""
    tensors = output if isinstance(output, tuple | list) else getattr(output, "values", lambda: (output,))()
    for value in tensors:
        if isinstance(value, Tensor) and value.requires_grad:

            def restore(_: Tensor) -> None:
                record.restore(again=True)

            value.register_hook(restore)
