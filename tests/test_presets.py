"""Published patterns: each against its rule written out over positions, and as text."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from one_site import Driven

from vsparse import Grid, RasterLayout, TileLayout, patterns
from vsparse.methods.pattern import StaticPattern
from vsparse.patterns import Pattern, presets

GRIDS = [Grid(t=5, h=4, w=6), Grid(t=3, h=5, w=7, text_after=4), Grid(t=4, h=1, w=3, text_before=2)]
Place = tuple[int, int, int]
Rule = Callable[[Place, Place, Grid], bool]


def near(q: int, k: int, size: int, length: int, step: int = 1, share: int = 1) -> bool:
    """Neighbourhood attention along one axis: the ``size`` positions of the query's own residue around it."""
    own = [x for x in range(length) if x % step == q % step]
    leader = min(own.index(q) // share * share + share // 2, len(own) - 1)
    first = max(0, min(leader - size // 2, len(own) - size))
    return k in own[first : first + size]


def sizes(grid: Grid) -> Place:
    return grid.t, grid.h, grid.w


def every(rule: Callable[[int, int, int, int], bool]) -> Rule:
    """A rule that must hold along each axis: query, key, length, axis."""
    return lambda q, k, grid: all(rule(q[a], k[a], sizes(grid)[a], a) for a in range(3))


def some_frame(head: int) -> Rule:
    return lambda q, k, grid: k[0] % 3 == head % 3 or every(lambda a, b, n, _: near(a, b, 2, n))(q, k, grid)


def rolled(shift: int, size: int) -> Rule:
    return lambda q, k, grid: q[0] // size == (k[0] + shift) % grid.t // size


ONE: dict[str, tuple[Pattern, Rule]] = {
    "neighborhood": (presets.neighborhood(size=3), every(lambda q, k, n, _: near(q, k, 3, n))),
    "dilated neighborhood": (
        presets.neighborhood(size=2, dilation=(1, 2, 2), stride=(2, 1, 1)),
        every(lambda q, k, n, a: near(q, k, 2, n, (1, 2, 2)[a], (2, 1, 1)[a])),
    ),
    "window": (presets.window(size=(2, 3, 3)), every(lambda q, k, n, a: q // (2, 3, 3)[a] == k // (2, 3, 3)[a])),
    "shifted window": (
        presets.window(size=2, shift=(0, 1, 1)),
        every(lambda q, k, n, a: (q + (a > 0)) // 2 == (k + (a > 0)) // 2),
    ),
    "window with halo": (
        presets.window(size=2, halo=(0, 1, 1)),
        every(lambda q, k, n, a: q // 2 * 2 - (a > 0) <= k < q // 2 * 2 + 2 + (a > 0)),
    ),
    "interleaved": (presets.interleaved(step=(1, 2, 3)), every(lambda q, k, n, a: (q - k) % (1, 2, 3)[a] == 0)),
    "divided": (presets.divided(), lambda q, k, grid: q[0] == k[0] or q[1:] == k[1:]),
    "unidirectional": (presets.unidirectional(block=2), every(lambda q, k, n, _: 0 <= q // 2 - k // 2 <= 1)),
    "unidirectional, further back in time": (
        presets.unidirectional(block=(1, 2, 2), reach=(3, 1, 1)),
        every(lambda q, k, n, a: 0 <= q // (1, 2, 2)[a] - k // (1, 2, 2)[a] <= (3, 1, 1)[a]),
    ),
}
SEVERAL: dict[str, tuple[tuple[Pattern, ...], list[Rule]]] = {
    "stripes": (
        presets.stripes(heads=4, width=(2, 1, 3)),
        [
            lambda q, k, grid: q[0] // 2 == k[0] // 2,
            lambda q, k, grid: q[0] // 2 == k[0] // 2,
            lambda q, k, grid: q[1] == k[1],
            lambda q, k, grid: q[2] // 3 == k[2] // 3,
        ],
    ),
    "shards": (presets.shards(heads=4, count=3, local=2), [some_frame(head) for head in range(4)]),
    "shifted chunks": (
        presets.shifted_chunks(heads=4, size=2),
        [rolled(0, 2), rolled(0, 2), rolled(1, 2), rolled(1, 2)],
    ),
    "shifted chunks and dilated heads": (
        presets.shifted_chunks(heads=3, size=3, groups=3, dilation=2),
        [rolled(0, 3), rolled(1, 3), lambda q, k, grid: (q[0] - k[0]) % 2 == 0],
    ),
    "global and local": (
        presets.global_local(heads=3, size=(1, 2, 2), step=(1, 2, 2), share=0.4),
        [
            every(lambda q, k, n, a: q // (1, 2, 2)[a] == k // (1, 2, 2)[a]),
            every(lambda q, k, n, a: k % (1, 2, 2)[a] == 0),
            every(lambda q, k, n, a: k % (1, 2, 2)[a] == 0),
        ],
    ),
    "alternating": (
        presets.alternating(patterns.same_position, patterns.same_frame),
        [lambda q, k, grid: q[1:] == k[1:], lambda q, k, grid: q[0] == k[0]],
    ),
}
CASES = [(name, pattern, rule) for name, (pattern, rule) in ONE.items()]
CASES += [
    (f"{name} {i}", pattern, rule)
    for name, (parts, rules) in SEVERAL.items()
    for i, (pattern, rule) in enumerate(zip(parts, rules, strict=True))
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("name", "pattern", "rule"), CASES, ids=[name for name, *_ in CASES])
def test_rule_written_out(name: str, pattern: Pattern, rule: Rule, grid: Grid) -> None:
    """Token by token, and over blocks: one is kept if and only if any token pair in it is."""
    video = slice(grid.text_before, grid.text_before + grid.video)
    places = list(itertools.product(*map(range, sizes(grid))))
    wanted = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    wanted[video, video] = torch.tensor([[rule(q, k, grid) for k in places] for q in places])
    assert torch.equal(pattern.token_mask(grid), wanted)
    for layout in (RasterLayout(grid, block=4), TileLayout(grid, tile=(2, 2, 2))):
        member = torch.zeros(layout.tokens, layout.blocks, dtype=torch.float64)
        member[torch.arange(layout.tokens), layout.token_block[0, 0]] = 1
        blocks = member.T @ wanted.double() @ member > 0
        assert torch.equal(pattern.block_map(layout).validate().to_mask()[0, 0], blocks)


def test_heads_of_shards_and_of_shifted_chunks_cover_the_video_together() -> None:
    grid = GRIDS[0]
    for parts in (presets.shards(heads=3, count=3, local=1), presets.shifted_chunks(heads=4, size=5, groups=4)):
        assert bool(torch.stack([part.token_mask(grid) for part in parts]).any(0).all())


def test_by_layer() -> None:
    method = StaticPattern(pattern=presets.alternating(patterns.same_position, patterns.same_frame), by="layer")
    for layer in range(4):
        one = Driven(method, GRIDS[0], layer=layer, layers=4)
        wanted = (patterns.same_position, patterns.same_frame)[layer % 2]
        assert method.static_pattern(one.site) == wanted
    assert StaticPattern(pattern="divided()").static_pattern(one.site) == presets.divided()


def test_presets_are_written_and_read() -> None:
    method = StaticPattern(pattern="shifted_chunks(heads=2, size=3)")
    assert method.pattern == presets.shifted_chunks(heads=2, size=3)
    again = StaticPattern(**method.options())
    assert again == method
    assert patterns.parse("window(size=2) | ~neighborhood(size=3)") == (
        presets.window(size=2) | ~presets.neighborhood(size=3)
    )
    with pytest.raises(ValueError, match="stripes gives one pattern for each head and combines with nothing"):
        patterns.parse("stripes(heads=3, width=1) | same_frame")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: presets.stripes(heads=2, width=1), "stripes: heads must be an integer >= 3, got 2"),
        (lambda: presets.shards(heads=2, count=3, local=1), "shards: heads must be an integer >= 3, got 2"),
        (lambda: presets.shards(heads=2, count=0, local=1), "shards: count must be an integer >= 1, got 0"),
        (lambda: presets.shifted_chunks(heads=2, size=0), "shifted_chunks: size must be an integer >= 1, got 0"),
        (lambda: presets.global_local(heads=1, size=1, step=2), "global_local: heads must be an integer >= 2, got 1"),
        (lambda: presets.global_local(heads=4, size=1, step=2, share=1.0), "global_local: share must lie between"),
        (lambda: presets.alternating(), "alternating: every layer must be a Pattern"),
        (lambda: presets.window(size=0), "Cells: size must be integers >= 1"),
        (lambda: StaticPattern(by="step"), 'pattern: by must be "head" or "layer", got \'step\''),
    ],
)
def test_refused_in_words(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
