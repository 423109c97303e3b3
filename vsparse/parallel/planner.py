"""How to lay one attention over several processes: a cost model of every factorisation, and the fastest that fits."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from vsparse.optional import require
from vsparse.parallel.context import ContextParallel
from vsparse.parallel.rates import Cluster
from vsparse.parallel.simulation import Split, hop

__all__ = ["PARTS", "Attention", "Choice", "How", "Passes", "Prediction", "choose", "factorisations", "predict"]

How = Literal["ulysses", "ring", "gather"]
"""How keys of other shards are reached; "ulysses": there is one shard, every process has all keys of its heads."""

Passes = Literal["forward", "training"]

PARTS = ("exchange", "blocks", "compute", "imbalance", "merging", "choosing")
"""The fields of a `Prediction` that add up to its seconds."""

_BACKWARD = 2.5  # FLOPs of the backward of attention over those of its forward: five products for two


@dc.dataclass(frozen=True, kw_only=True)
class Attention:
    """One layer's attention, as the model has it; what is kept of it stands in a `Split`.

    Args:
        tokens: N of the video. heads: H. head_dim: D. bytes: of an element. samples: CFG branches included.
        layers: That run like this one.
        tensors: That change places with the heads: 4, q, k and v on the way in and the output on the way back; 5 with a
            gate (vsa).
        choosing: FLOPs of choosing the map of one sample, all heads. pooled: key blocks of which every shard needs the
            mean of the others to choose; 0: none.

    Raises:
        ValueError: a number that is out of range.
    """

    tokens: int
    heads: int
    head_dim: int
    bytes: int = 2
    samples: int = 1
    layers: int = 1
    tensors: int = 4
    choosing: float = 0.0
    pooled: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "head_dim", "bytes", "samples", "layers", "tensors"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Attention: {name} must be an integer >= 1, got {value!r}")
        for name in ("choosing", "pooled"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Attention: {name} must be a finite number >= 0, got {getattr(self, name)!r}")


@dc.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of one layer by part, which add up, and bytes of one process; the slowest process counts everywhere.

    Args:
        ulysses, ring: U and R. how: see `How`.
        exchange: Heads against tokens, there and back. blocks: key blocks of other shards, as far as the computation
            does not cover them; ``hidden``: what it covers, not part of the sum.
        compute: Pairs of the mean process. imbalance: what the slowest one takes longer, exchange by exchange.
        merging: Partial results of a ring.
        choosing: The map, with its exchange of pooled keys.
        memory: Bytes that one process holds of this attention at most. sent: bytes that it receives, all exchanges.
        union: As of `Split.union`.
    """

    ulysses: int
    ring: int
    how: How
    exchange: float
    blocks: float
    compute: float
    imbalance: float
    merging: float
    choosing: float
    hidden: float
    memory: float
    sent: float
    union: float

    @property
    def seconds(self) -> float:
        """Of one layer: the sum of `PARTS`."""
        return math.fsum(getattr(self, name) for name in PARTS)

    @property
    def name(self) -> str:
        """``ulysses 8``, ``ring 4``, ``ulysses 8 x gather 2``."""
        parts = [f"ulysses {self.ulysses}"] * (self.ulysses > 1 or self.ring == 1)
        return " x ".join(parts + [f"{self.how} {self.ring}"] * (self.ring > 1))


@dc.dataclass(frozen=True, kw_only=True)
class Choice:
    """Every way that was tried, and the fastest that fits.

    Args:
        best: The fastest of ``tried`` whose memory fits. split: its heads and tokens. tried: all, fastest first.
        memory: bytes that were the bound.
        attention, cluster: What it was predicted for.
        notes: What else it was predicted from, in words that the table prints.
    """

    best: Prediction
    split: Split
    tried: tuple[Prediction, ...]
    memory: float
    attention: Attention
    cluster: Cluster
    notes: tuple[str, ...] = ()

    @property
    def setting(self) -> ContextParallel:
        """The best way as `apply` takes it; ``str`` of it is what ``--context-parallel`` takes."""
        one = self.best
        shards = {how: one.ring if one.how == how else 1 for how in ("ring", "gather")}
        return ContextParallel(ulysses=one.ulysses, ring=shards["ring"], gather=shards["gather"])

    def tables(self) -> Any:
        """For rich: every way, its parts in milliseconds, and what was assumed; 80 columns wide."""
        a, rich = self.attention, require("rich.table", "cli")
        title = (
            f"{a.layers} layers of {a.heads} heads, {a.tokens:,} tokens, {self.best.ulysses * self.best.ring} x "
            f"{self.cluster.name}: predicted, not measured"
        )
        ways = rich.Table(title=title, title_justify="left")
        for column in ("", "way", "ms a layer", "s in all", "GiB", "of the dense ring"):
            words = column in ("", "way")
            ways.add_column(column, justify="left" if words else "right", no_wrap=words)
        box = require("rich.box", "cli").SIMPLE_HEAD
        shares = rich.Table(box=box, padding=(0, 1, 0, 0), title="of which, ms a layer", title_justify="left")
        shares.add_column("way", no_wrap=True)
        parts = [name for name in (*PARTS, "hidden") if any(getattr(one, name) for one in self.tried)]
        for name in parts:
            shares.add_column(name, justify="right", no_wrap=True)
        for one in self.tried:
            mark = "*" if one is self.best else "" if one.memory <= self.memory else "too large"
            figures = [f"{1e3 * one.seconds:.3g}", f"{one.seconds * a.layers:.3g}", f"{one.memory / 2**30:.2f}"]
            ways.add_row(mark, one.name, *figures, f"{one.union:.0%}" if one.ring > 1 else "\u2013")
            shares.add_row(one.name, *(f"{1e3 * getattr(one, name):.3g}" for name in parts))
        notes = "\n".join((*self.cluster.assumptions(), *self.notes))
        return require("rich.console", "cli").Group(ways, shares, require("rich.text", "cli").Text(notes, "dim"))


def factorisations(processes: int, heads: int) -> list[tuple[int, int]]:
    """All ``(U, R)`` with ``U * R == processes`` and ``U <= heads``, the greatest U first; U need not divide the heads.

    Raises:
        ValueError: a number below 1.
    """
    for name, value in (("processes", processes), ("heads", heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"factorisations: {name} must be an integer >= 1, got {value!r}")
    found = [(u, processes // u) for u in range(1, min(processes, heads) + 1) if processes % u == 0]
    return found[::-1]


def predict(
    attention: Attention, cluster: Cluster, split: Split, how: How, *, passes: Passes = "forward"
) -> Prediction:
    """Time and memory of one layer.

    With P processes as U places of heads times R shards, and ``h`` heads of a place (``h`` differs by place; the
    slowest counts), element size e, both directions of a link in use at once:

    - Exchange of heads. Printed in DSV, section 4.3: ``4 H_i (S/N) ((N-1)/N) D``, which is right only where ``H_i`` is
      normalised to H. A process ends up with ``S/R`` tokens of its h heads, so each of four tensors moves
      ``h (S/R) ((U-1)/U) D e`` bytes, in two calls (q, k, v; the output), and q, k, v and the output hold
      ``4 h (S/R) D e`` bytes.
    - Key blocks. Printed: ``2 H (1 - a) s S D`` for a sparsity a and a remote share s. Here: ``2 D e`` for each
      head-slot of `Split.needed`, the union over all rows of the process as measured; a sparsity does not give it.
    - Gather: all of them in one exchange, then all pairs: ``T_fetch + T_pairs``.
    - Ring: exchange i + 1 flies while the pairs of exchange i are computed, own keys first:
      ``sum_i max(C_i, X_{i+1}) + C_{R-1}``, where C and X are of the slowest process of each exchange. For equal
      exchanges that is the model of db-SP (arXiv 2511.23113), ``max(C, X) (R - 1) + C``. An exchange in which nobody
      needs anything is left out. Each C but the first holds a merge: the result so far in float32, read and written,
      and the partial one, read. Both ways first exchange counts and block numbers: one latency.
    - Pairs: ``4 D`` FLOPs each. Choosing is divided by P; pooled keys of other shards come in one exchange.
    - Memory: the tensors of the whole attention before and after the exchange of heads, what was fetched (ring: two
      exchanges of it), and for the ring a partial result in float32.
    - Training: products 3.5 times, tensors change places twice as often (their gradients do), the ring fetches again
      and sends gradients home (3 times), gather sends gradients home (2 times); twice the memory. Recomputation and the
      choice of the map, which has no backward, count once.

    Args:
        attention: The layer. cluster: where. split: what is kept, on U x R processes.
        how: "ulysses" where R is 1, "ring" or "gather" where it is more.
        passes: "forward" or "training", which is a forward and a backward.

    Raises:
        ValueError: a split of other heads, a ``how`` that does not fit R, ranks without a link.
    """
    U, R, D = split.ulysses, split.ring, attention.head_dim
    if sum(map(len, split.heads)) != attention.heads:
        raise ValueError(f"predict: split must have {attention.heads} heads, got {sum(map(len, split.heads))}")
    if how not in _ways(R):
        raise ValueError(f"predict: how must be one of {_ways(R)} for ring={R}, got {how!r}")
    if passes not in ("forward", "training"):
        raise ValueError(f"predict: passes must be 'forward' or 'training', got {passes!r}")
    train = passes == "training"
    slot = attention.samples * D * attention.bytes  # bytes of one tensor, head and token
    most = max(map(len, split.heads))
    tokens = float(split.slots.max() / split.slots.sum()) * attention.tokens
    moved = attention.tensors * most * tokens * slot * (U - 1) / U
    places = [range(s * U, (s + 1) * U) for s in range(R)]
    exchange = max(_all_to_all(cluster, group, moved, calls=2) for group in places) * (2 if train else 1)

    flops = 4.0 * D * attention.samples * split.pairs * (1 + _BACKWARD if train else 1)
    arrived = 2.0 * slot * split.needed * ((3 if how == "ring" else 2) if train else 1)
    mean = float(flops.sum()) / (U * R)
    own = cluster.rate.seconds(mean)
    held = blocks = hidden = merging = 0.0
    if how == "ring":
        partial = most * tokens * (D + 1) * 4 * attention.samples
        passed = 2 * partial + most * tokens * slot
        merge = 0.0 if cluster.rate.memory is None else passed / cluster.rate.memory
        slowest, merging, blocks, hidden = _ring(cluster, flops, arrived, merge)
        held = 2 * max(float(hop(split.needed, i).max()) for i in range(1, R)) * 2 * slot + partial
    else:
        slowest = cluster.rate.seconds(float(flops.sum(-1).max()))
        if how == "gather":
            blocks = _counts(cluster, U, R) + max(
                _many(cluster, u, s, U, arrived[u, s].tolist()) for u in range(U) for s in range(R)
            )
            held = float(split.needed.sum(-1).max()) * 2 * slot
    fetched = float(arrived.sum(-1).max())
    choosing = cluster.rate.seconds(attention.choosing * attention.samples / (U * R))
    pooled = most * attention.pooled * slot * (R - 1) / R
    if pooled:
        choosing += max(_many(cluster, u, s, U, [pooled / (R - 1)] * R) for u in range(U) for s in range(R))
    before = attention.tensors * attention.heads * tokens / U * slot
    after = attention.tensors * most * tokens * slot * (U > 1)
    return Prediction(
        ulysses=U,
        ring=R,
        how=how,
        exchange=exchange,
        blocks=blocks,
        compute=own,
        imbalance=max(0.0, slowest - own),
        merging=merging,
        choosing=choosing,
        hidden=hidden,
        memory=(before + after + held) * (2 if train else 1),
        sent=moved * (2 if train else 1) + fetched + pooled,
        union=split.union,
    )


def choose(
    attention: Attention,
    cluster: Cluster,
    splits: Sequence[Split],
    *,
    memory: float | None = None,
    passes: Passes = "forward",
) -> Choice:
    """Predict every split, ring and gather, and take the fastest that fits.

    Args:
        attention: The layer. cluster: where.
        splits: One for each factorisation that is to be tried, all of one number of processes.
        memory: Bytes that one process may hold of the attention; None: those of the cluster. passes: as of `predict`.

    Raises:
        ValueError: no split, splits of several numbers of processes, or nothing fits; and as of `predict`.
    """
    counts = sorted({split.ulysses * split.ring for split in splits})
    if len(counts) != 1:
        raise ValueError(f"choose: splits must be of one number of processes, at least one, got {counts}")
    bound = cluster.memory if memory is None else memory
    tried = [predict(attention, cluster, split, how, passes=passes) for split in splits for how in _ways(split.ring)]
    tried.sort(key=lambda one: (one.seconds, one.ring, one.how))
    fits = [one for one in tried if one.memory <= bound]
    if not fits:
        least = min(tried, key=lambda one: one.memory)
        raise ValueError(
            f"choose: memory of {bound / 2**30:.2f} GiB holds no way on {counts[0]} processes; the smallest, "
            f"{least.name}, needs {least.memory / 2**30:.2f} GiB"
        )
    best = fits[0]
    split = next(split for split in splits if (split.ulysses, split.ring) == (best.ulysses, best.ring))
    return Choice(best=best, split=split, tried=tuple(tried), memory=bound, attention=attention, cluster=cluster)


def _ways(ring: int) -> tuple[How, ...]:
    return ("ulysses",) if ring == 1 else ("ring", "gather")


def _all_to_all(cluster: Cluster, ranks: range, moved: float, *, calls: int) -> float:
    """Seconds of ``calls`` exchanges that move bytes to each of some ranks, as much from everyone; slowest rank."""
    others = len(ranks) - 1
    if not others:
        return 0.0
    return max(_received(cluster, here, [(x, moved / others) for x in ranks if x != here], calls) for here in ranks)


def _many(cluster: Cluster, u: int, s: int, U: int, amounts: Sequence[float]) -> float:
    """Seconds in which process (u, s) gets an amount from each shard, in one exchange."""
    here = s * U + u
    return _received(cluster, here, [(t * U + u, amounts[t]) for t in range(len(amounts)) if t != s], 1)


def _received(cluster: Cluster, here: int, parts: Sequence[tuple[int, float]], calls: int) -> float:
    """The links inside a node and between nodes work at the same time, so the slower of the two counts."""
    by_link: dict[Any, float] = {}
    for there, amount in parts:
        if amount:
            link = cluster.link(here, there)
            by_link[link] = by_link.get(link, 0.0) + amount
    return max((calls * link.latency + amount / link.bandwidth for link, amount in by_link.items()), default=0.0)


def _counts(cluster: Cluster, U: int, R: int) -> float:
    """One exchange of a few bytes in the widest sequence group: its latency."""
    return max(cluster.link(u, s * U + u).latency for u in range(U) for s in range(1, R))


def _ring(cluster: Cluster, flops: Tensor, arrived: Tensor, merge: float) -> tuple[float, float, float, float]:
    """Seconds of pairs exchange by exchange, of merges, of transfers that these do not cover, and that they cover."""
    U, R, _ = flops.shape
    compute, transfer = [], [0.0]
    for i in range(R):
        compute.append(cluster.rate.seconds(float(hop(flops, i).max())))
        if i:
            ways = ((u, s, (s + i) % R) for u in range(U) for s in range(R))
            transfer.append(
                max(cluster.link(s * U + u, t * U + u, ring=True).seconds(float(arrived[u, s, t])) for u, s, t in ways)
            )
    used = [0, *(i for i in range(1, R) if transfer[i])]
    busy = [compute[i] + (merge if i else 0.0) for i in used]
    slowest, merging = sum(compute[i] for i in used), merge * (len(used) - 1)
    covered = sum(min(now, transfer[i]) for now, i in zip(busy, used[1:], strict=False))
    return slowest, merging, sum(transfer) - covered + _counts(cluster, U, R), covered
