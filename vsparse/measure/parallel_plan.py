"""How to lay a planned model over several GPUs: maps of its method at full size, and the fastest way that fits."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterable, Sequence

import torch

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.measure.machines import room
from vsparse.measure.sharding import GAINS, chosen_map, fixed_map, layer_attention, made_samples, pooled_map
from vsparse.measure.synthetic import HEADS
from vsparse.methods import Method, Site, SparseAttention
from vsparse.methods.unicp import UniCP
from vsparse.parallel.planner import Attention, Choice, choose, factorisations, predict
from vsparse.parallel.rates import Cluster
from vsparse.parallel.shard import cannot_shard
from vsparse.parallel.simulation import Split, even_split, simulate_all
from vsparse.planning import Plan

__all__ = ["choose_parallel", "heads_alone", "layer_maps"]


def choose_parallel(
    made: Plan,
    cluster: Cluster,
    gpus: int,
    *,
    batch: int = 1,
    gpu_memory: float | None = None,
    seed: int = 0,
    told: Callable[[str], None] = lambda _: None,
) -> Choice:
    """The fastest way to lay a plan's attention over GPUs, of those that its method allows and whose memory fits.

    A sparse call in every layer is what is predicted. Where the map of the method depends on the data, four heads of
    known structure are made and searched, which takes some seconds; `Choice.notes` says so.

    Args:
        made: A plan for a size of video (`vsparse.plan`). cluster: measured (`read_rates`) or assumed.
        gpus: Processes of one video. batch: samples of a call, CFG branches included.
        gpu_memory: Bytes of a GPU, of which `room` is what the attention may hold; None: as the cluster says.
        seed: Of the heads that are made. told: hears what is done next.

    Returns:
        The choice; ``Choice.setting`` is what `vsparse.apply` takes.

    Raises:
        ValueError: a plan without size or without a layer to patch, more GPUs than heads and tiles can keep busy or
            than the cluster has links for, or a memory into which nothing fits.
        NotImplementedError: layers of several shapes.
    """
    if made.grid is None:
        raise ValueError("choosing for several GPUs needs a video: give height, width and num_frames to the plan")
    if not made.sites:
        raise ValueError(
            "choosing for several GPUs needs an attention layer that can be patched, and the plan has none"
        )
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise ValueError(f"gpus must be an integer >= 1, got {gpus!r}")
    if gpus > cluster.per_node and cluster.between is None:
        raise ValueError(
            f"{gpus} GPUs are more than a node of {cluster.name} has, {cluster.per_node}, and nothing is known of the "
            "link between nodes: measure the rates across nodes, or with as many processes as a node has GPUs"
        )
    sites = [site for site in made.sites if site.root == made.sites[0].root]  # a forward runs one root
    shapes = sorted({(site.heads, site.head_dim) for site in sites})
    if len(shapes) > 1:
        raise NotImplementedError(f"choosing for several GPUs takes layers of one shape, got heads and widths {shapes}")
    against = heads_alone(made.method, sites, made.grid)
    if against is None:
        attention, splits, notes = _both(made, sites, gpus, batch=batch, seed=seed, told=told)
    else:
        attention, splits, notes = _heads(made, sites, gpus, against, batch=batch)
    told("predicting")
    memory = None if gpu_memory is None else room(gpu_memory)
    choice = choose(attention, cluster, [x for x in splits if x.ulysses * x.ring == gpus], memory=memory)
    alone = next(split for split in splits if split.ulysses * split.ring == 1)
    one = predict(attention, cluster, alone, "ulysses").seconds
    notes += _of(choice, one)
    if made.density is not None and made.density < 1:
        keeps = made.method.state_phases and not isinstance(made.method, UniCP)  # which keeps outputs, no maps
        kept = ", its map kept from an earlier one" if keeps else ""
        notes.append(
            f"every layer of a call is sparse{kept}: dense steps and layers, and exact searches, are not in it"
        )
    if made.kernel == "host" and not cluster.rate.origin.startswith("assumed"):
        notes.append("full attention is taken to be as fast as the attention that was measured, which is block-sparse")
    return dc.replace(choice, notes=tuple(notes))


def heads_alone(method: Method, sites: Sequence[Site], grid: Grid) -> str | None:
    """Why processes can share no tokens under a method, so that they share heads alone; None where they can."""
    if against := cannot_shard([method.of(site).layout(grid, site) for site in sites]):
        return against
    if len({method.of(site) for site in sites}) > 1:
        return "its layers run several methods, and no map of one stands for the others"
    if method.of(sites[0]).kernel_options().get("skip_threshold") is not None:
        return "it skips blocks by a threshold, over all keys of a row"
    return None


def layer_maps(method: Method, grid: Grid, site: Site, *, seed: int = 0) -> tuple[list[BlockMap], str]:
    """Maps of one layer on a grid, and where they come from, in words.

    Heads beyond those of the maps repeat them in turn.
    """
    fixed = fixed_map(method, grid, site)
    if fixed is not None:
        return [fixed], f"map: {'all blocks' if fixed.capacity == 0 else 'static'}; {_density([fixed])}"
    static = method.static_map(method.layout(grid, site), site)
    if static is not None and static.index.shape[1] > 1 and not method.static_by_head:
        return [static], f"map: heads take the static patterns of {method.key} in turn; {_density([static])}"
    whole = f"{len(HEADS)} made heads ({', '.join(HEADS)}; seed {seed}), repeated by the others"
    (sample,) = made_samples(grid, gains=GAINS[:1], seed=seed)
    if why := _needs_more(method, site):
        found = [pooled_map(method, sample)]
        words = f"map: a stand-in, the largest products of block means, as {method.key} {why}; on {whole}"
    else:
        found = [chosen_map(method, sample, layer=site.layer)]
        words = f"map: chosen by {method.key} on {whole}"
    return found, f"{words}; {_density(found)}; a trained model's differ"


def _needs_more(method: Method, site: Site) -> str | None:
    """Why a map cannot be chosen from queries and keys alone."""
    if "search" in method.exact_phases:
        return "searches by attending"
    if type(method.build(site)).features is not SparseAttention.features:
        return "chooses by what is trained"
    return None


def _density(maps: Iterable[BlockMap]) -> str:
    found = torch.cat([one.density()[0] for one in maps])
    low, high = float(found.min()), float(found.max())
    of_heads = f" ({low:.3f} to {high:.3f} by head)" if f"{low:.3f}" != f"{high:.3f}" else ""
    return f"density {float(found.mean()):.3f}{of_heads}"


def _both(
    made: Plan, sites: Sequence[Site], gpus: int, *, batch: int, seed: int, told: Callable[[str], None]
) -> tuple[Attention, list[Split], list[str]]:
    """Heads and tokens: what the planner is told, a split for each factorisation and for one GPU, and notes."""
    assert made.grid is not None
    site = sites[0]
    method = made.method.of(site)
    if isinstance(method, UniCP):
        method = method.inner_method  # outputs that are given again cost nothing
    tiles = method.layout(made.grid, site).video_tiles
    pairs = [pair for pair in factorisations(gpus, site.heads) if pair[1] <= tiles]
    if not pairs:
        raise ValueError(
            f"{gpus} GPUs cannot share {site.heads} heads and {tiles} tiles of {made.grid.video} tokens: give a number "
            f"that is one of at most {site.heads} times one of at most {tiles}"
        )
    told(f"making and searching heads of {method.key}: {made.grid.video:,} tokens")
    maps, words = layer_maps(method, made.grid, site, seed=seed)
    told("counting what each process needs")
    splits = simulate_all(maps, list(dict.fromkeys([*pairs, (1, 1)])), heads=site.heads)
    attention = layer_attention(method, made.grid, site, maps[0], layers=len(sites), samples=batch)
    notes = [words]
    if method.static_by_head and len({method.static_pattern(one) for one in sites}) > 1:
        notes.append(f"layers differ in their pattern; that of layer {site.layer} stands for all")
    return attention, splits, notes


def _heads(
    made: Plan, sites: Sequence[Site], gpus: int, against: str, *, batch: int
) -> tuple[Attention, list[Split], list[str]]:
    """Heads alone, which need no map: as many pairs in each, by the density of the plan."""
    assert made.grid is not None
    assert made.density is not None
    heads = sites[0].heads
    if gpus > heads:
        raise ValueError(
            f"{made.method.key} shares heads alone ({against}), so at most {heads} GPUs can be used for {heads} heads, "
            f"got {gpus}"
        )
    splits = [even_split(made.grid.tokens, heads, n, 1, density=made.density) for n in dict.fromkeys((gpus, 1))]
    phases = [(site, made.method.of(site)) for site in sites]
    choosing = [
        one.search_flops(one.layout(made.grid, site), site, 1, "reuse" if one.state_phases else "search")
        for site, one in phases
    ]
    attention = Attention(
        tokens=made.grid.video,
        heads=heads,
        head_dim=sites[0].head_dim,
        samples=batch,
        layers=len(sites),
        choosing=sum(choosing) / len(choosing),
    )
    return attention, splits, [f"heads alone are shared: {against}", f"heads alike, density {made.density:.3f}"]


def _of(choice: Choice, alone: float) -> list[str]:
    """What else there is to say of a choice."""
    a, best, split = choice.attention, choice.best, choice.split
    times = alone / best.seconds
    notes = [
        f"tensors of {a.bytes} bytes, {a.samples} sample{'s' * (a.samples > 1)}; one GPU: {1e3 * alone:.3g} ms a "
        f"layer, so this is {times:.1f} times as fast",
        f"memory: {choice.memory / 2**30:.2f} GiB for one attention, beside weights and the rest",
    ]
    if best.ulysses > 1:
        counts = " or ".join(map(str, sorted({len(group) for group in split.heads})))
        balanced, naive = f"{split.balanced:.3f}", f"{split.naive:.3f}"
        words = f"heads: {counts} in each place; slowest process over mean {balanced}"
        if split.balanced < split.naive and balanced != naive:
            places = " | ".join(",".join(map(str, group)) for group in split.heads)
            words += f", in their order {naive}; {places}; a run finds its own from what it has computed"
        notes.append(words)
    return notes
