"""VMoBA: partitions, gates in every scope against loops, and the merged attention against one masked softmax."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vsparse import Grid, PartitionLayout, Schedule, reference
from vsparse.methods import Call, Site
from vsparse.methods.vmoba import VMoBA, gate_threshold, gate_top_k

CHUNKS = {"frames": 2, "patch": (2, 3), "cube": (2, 3, 2)}
SCOPES = ("query_head", "block", "head_global", "overall")


def site(layer: int = 0, heads: int = 2, head_dim: int = 8) -> Site:
    return Site(
        root="transformer",
        name="blocks.0.attn1",
        layer=layer,
        layers=3,
        dim=heads * head_dim,
        heads=heads,
        head_dim=head_dim,
        host="wan",
    )


def call(layout: PartitionLayout, text_length: Tensor | None = None) -> Call:
    return Call(
        layout=layout,
        blocking=layout.bind(text_length),
        text_length=text_length,
        step=torch.tensor(-1),
        density=torch.tensor(1.0, dtype=torch.float64),
    )


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    chunk=st.tuples(*[st.integers(1, 6)] * 3),
    before=st.integers(0, 4),
    after=st.integers(0, 4),
)
def test_partition_holds_every_token_once(
    sizes: tuple[int, int, int], chunk: tuple[int, int, int], before: int, after: int
) -> None:
    grid = Grid(t=sizes[0], h=sizes[1], w=sizes[2], text_before=before, text_after=after)
    layout = PartitionLayout(grid, chunk=chunk)
    assert layout.slots == layout.tokens == grid.tokens == int(layout.length.sum())
    assert torch.equal(layout.slot_token.flatten().sort().values, torch.arange(grid.tokens))
    token = torch.arange(grid.video).view(*sizes)
    expected = {
        tuple((token[t : t + chunk[0], h : h + chunk[1], w : w + chunk[2]] + before).flatten().tolist())
        for t in range(0, sizes[0], chunk[0])
        for h in range(0, sizes[1], chunk[1])
        for w in range(0, sizes[2], chunk[2])
    }
    starts, lengths = layout.start.flatten().tolist(), layout.length.flatten().tolist()
    slots = layout.slot_token.flatten().tolist()
    chunks = [tuple(slots[a : a + n]) for a, n in zip(starts, lengths, strict=True)]
    assert {c for c, segment in zip(chunks, layout.segment.tolist(), strict=True) if segment} == expected
    x = torch.randn(2, grid.tokens, 2, 3)
    blocking = layout.bind()
    assert torch.equal(blocking.unpack(blocking.pack(x)), x)


def test_partition_binds_text_lengths() -> None:
    grid = Grid(t=2, h=2, w=3, text_after=5)
    blocking = PartitionLayout(grid, chunk=(1, 2, 3)).bind(torch.tensor([0, 3]))
    assert blocking.length[:, 0].tolist() == [[6, 6, 0], [6, 6, 3]]
    assert blocking.rows().length[:, 0].sum(-1).tolist() == [12, 15]
    packed = blocking.pack(torch.ones(2, grid.tokens, 1, 1))
    assert packed[:, :, 0, 0].sum(-1).tolist() == [12, 15]


def test_partition_cycles_with_the_layer() -> None:
    grid = Grid(t=5, h=4, w=6)
    method = VMoBA(**CHUNKS)
    keys = [method.layout(grid, site(layer)).key[-1] for layer in range(4)]
    assert keys == [(2, 4, 6), (5, 2, 3), (2, 3, 2), (2, 4, 6)]


# ---- gates -------------------------------------------------------------------------------------------------------


def groups(scope: str, heads: int, slots: int, chunks: int) -> list[list[tuple[int, int, int]]]:
    """Entries (head, slot, chunk) that compete with each other."""
    entries = [(h, s, c) for h in range(heads) for s in range(slots) for c in range(chunks)]
    key = {
        "query_head": lambda e: (e[0], e[1]),
        "block": lambda e: e[2],
        "head_global": lambda e: e[0],
        "overall": lambda e: None,
    }[scope]
    found: dict[object, list[tuple[int, int, int]]] = {}
    for entry in entries:
        found.setdefault(key(entry), []).append(entry)
    return list(found.values())


def by_threshold(gate: Tensor, own: list[int], share: float, scope: str) -> Tensor:
    keep = torch.zeros(gate.shape, dtype=torch.bool)
    for group in groups(scope, *gate.shape):
        score = {e: float(gate[e]) for e in group}
        low, high = min(score.values()), max(score.values())
        weight = {e: (x - low) / (high - low) if high > low else 1.0 for e, x in score.items()}
        total = math.fsum(weight.values())
        chosen = [e for e in group if own[e[1]] == e[2]]
        others = sorted((e for e in group if own[e[1]] != e[2]), key=lambda e: -weight[e])
        while math.fsum(weight[e] for e in chosen) < share * total and others:
            chosen.append(others.pop(0))
        for entry in chosen:
            keep[entry] = True
    return keep


def by_top_k(gate: Tensor, own: list[int], top: int, scope: str) -> Tensor:
    keep = torch.zeros(gate.shape, dtype=torch.bool)
    for group in groups(scope, *gate.shape):
        amount = top * len({e[:2] for e in group})
        order = sorted(group, key=lambda e: (own[e[1]] != e[2], -float(gate[e])))
        for entry in order[:amount]:
            keep[entry] = True
    return keep


@pytest.mark.parametrize("scope", SCOPES)
@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.05, 0.25, 0.5, 0.9]), heads=st.integers(1, 3))
def test_threshold_keeps_the_smallest_set_that_reaches_the_share(
    scope: str, seed: int, share: float, heads: int
) -> None:
    torch.manual_seed(seed)
    slots, chunks = 7, 4
    gate = torch.randn(1, heads, slots, chunks, dtype=torch.float64)
    own = [s % chunks for s in range(slots)]
    mine = torch.tensor(own)[:, None] == torch.arange(chunks)
    counted = torch.ones(slots, chunks, dtype=torch.bool)
    keep = gate_threshold(gate, mine, counted, share=share, scope=scope)  # type: ignore[arg-type]
    assert torch.equal(keep[0], by_threshold(gate[0], own, share, scope))


@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope != "block"])
@given(seed=st.integers(0, 2**16), top=st.integers(1, 4), heads=st.integers(1, 3))
def test_top_k_keeps_own_chunk_and_the_best(scope: str, seed: int, top: int, heads: int) -> None:
    torch.manual_seed(seed)
    slots, chunks = 7, 4
    gate = torch.randn(1, heads, slots, chunks, dtype=torch.float64)
    own = [s % chunks for s in range(slots)]
    mine = torch.tensor(own)[:, None] == torch.arange(chunks)
    counted = torch.ones(slots, chunks, dtype=torch.bool)
    keep = gate_top_k(gate, mine, counted, top=top, tokens=slots, scope=scope)  # type: ignore[arg-type]
    assert torch.equal(keep[0], by_top_k(gate[0], own, top, scope))


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_scores_weigh_the_same(scope: str) -> None:
    """Min-max normalisation of equal scores is 0/0 in the released code."""
    mine = torch.eye(4, dtype=torch.bool)
    keep = gate_threshold(torch.zeros(1, 1, 4, 4), mine, torch.ones_like(mine), share=0.5, scope=scope)  # type: ignore[arg-type]
    assert int(keep.sum()) == 8
    assert bool(keep[0, 0].diagonal().all())


@pytest.mark.parametrize("scope", SCOPES)
def test_own_chunk_alone_is_enough(scope: str) -> None:
    """Where it reaches the threshold, no further chunk is taken; the released code always takes one more."""
    mine = torch.eye(4, dtype=torch.bool)
    gate = torch.where(mine, 5.0, torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    keep = gate_threshold(gate, mine, torch.ones_like(mine), share=0.3, scope=scope)  # type: ignore[arg-type]
    assert torch.equal(keep, mine.expand_as(keep))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_single_chunk_is_no_0_by_0(scope: str) -> None:
    """The least and the greatest score of one chunk are the same."""
    gate, mine = torch.randn(1, 2, 5, 1), torch.ones(5, 1, dtype=torch.bool)
    assert bool(gate_threshold(gate, mine, mine, share=0.2, scope=scope).all())  # type: ignore[arg-type]


def test_share_of_one_keeps_everything() -> None:
    gate, mine = torch.randn(1, 2, 6, 3), torch.zeros(6, 3, dtype=torch.bool)
    assert bool(gate_threshold(gate, mine, torch.ones_like(mine), share=1.0, scope="overall").all())


# ---- attention ---------------------------------------------------------------------------------------------------


def module(method: VMoBA, grid: Grid, layer: int):
    sparse = method.build(site(layer))
    return sparse, method.layout(grid, site(layer))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("options", [{"top_k": (1, 2, 3)}, {"select": "threshold", "scope": "head_global"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_parts_equal_one_masked_softmax(layer: int, options: dict[str, object], dtype: torch.dtype) -> None:
    grid = Grid(t=3, h=4, w=5, text_after=4)
    sparse, layout = module(VMoBA(**CHUNKS, **options), grid, layer)  # type: ignore[arg-type]
    now = call(layout, torch.tensor([4, 1]))
    torch.manual_seed(layer)
    q, k, v = (torch.randn(2, grid.tokens, 2, 8).to(dtype) for _ in range(3))
    packed = [now.blocking.pack(x) for x in (q, k)]
    own, chosen = sparse._maps(*packed, now.blocking)
    own.validate()
    chosen.validate()
    pairs = oracle.pairs(own, layout.slots, layout.slots).int() + oracle.pairs(chosen, layout.slots, layout.slots).int()
    assert int(pairs.max()) == 1, "own chunk and chosen chunks must be disjoint"
    mask = pairs.bool()

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (now.blocking.pack(x) for x in (q, k, v))
        s = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
        p = s.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
        return now.blocking.unpack(torch.einsum("bhnm,bmhd->bnhd", p, v))

    def parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (now.blocking.pack(x) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        found = [reference.block_sparse_attention(q, k, v, blocks, scale=scale) for blocks in (own, chosen)]
        return now.blocking.unpack(reference.merge_attention(*zip(*found, strict=True))[0])

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (now.blocking.pack(x).transpose(1, 2) for x in (q, k, v))
        return now.blocking.unpack(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2))

    def candidate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The map is fixed: bfloat16 and float32 may choose differently at near-ties, which is not what is tested.
        sparse._maps = lambda *_: (own, chosen)
        return sparse.core(q, k, v, None, now)[0]

    oracle.assert_identity(candidate, softmax, (q, k, v))
    oracle.assert_law(candidate, parts, (q, k, v), also=[fused])


def test_without_further_chunks_there_is_no_silent_full_attention() -> None:
    """The released code attends over the whole sequence when no pair but own chunks is chosen."""
    grid = Grid(t=4, h=2, w=2)
    sparse, layout = module(VMoBA(frames=2, patch=(2, 2), cube=(2, 2, 2), top_k=(1, 1, 1)), grid, 0)
    q, k, v = (torch.randn(1, grid.tokens, 2, 8) for _ in range(3))
    out = sparse.core(q, k, v, None, call(layout))[0]
    v2 = v.clone()
    v2[:, 8:] += 1
    again = sparse.core(q, k, v2, None, call(layout))[0]
    assert torch.equal(out[:, :8], again[:, :8])
    assert not torch.equal(out[:, 8:], again[:, 8:])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"select": "top"}, "select"),
        ({"scope": "head"}, "scope"),
        ({"scope": "block"}, "block"),
        ({"top_k": (1, 2)}, "top_k"),
        ({"top_k": (0, 2, 3)}, "top_k"),
        ({"threshold": float("nan")}, "threshold"),
        ({"patch": (2,)}, "patch"),
        ({"cube": (2, 2, 0)}, "chunk"),
    ],
)
def test_refuses_in_words(options: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        VMoBA(**options)  # type: ignore[arg-type]


def test_published_defaults() -> None:
    method, grid = VMoBA(), Grid(t=21, h=30, w=52)
    tiles = [method.layout(grid, site(layer)).video_tiles for layer in range(3)]
    assert tiles == [7, 24, 72]
    found = [method.predicted_density(method.layout(grid, site(layer)), site(layer)) for layer in range(3)]
    assert found == [2 / 7, 0.25, 0.25]
    assert method.default_schedule == Schedule(dense_steps=0.25)
