"""Orders and blockings: every token has its slot, comes back, and knows its block."""

from __future__ import annotations

import dataclasses as dc
import itertools
import math

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from vsparse import ClusterLayout, CurveLayout, Grid, PartitionLayout, RasterLayout, TileLayout
from vsparse.geometry import Segment, kept_blocks
from vsparse.layouts import Layout
from vsparse.layouts.curve import hilbert


@st.composite
def bound(draw: st.DrawFn) -> tuple[Layout, torch.Tensor | None]:
    grid = draw(strategies.grids())
    return draw(strategies.layouts(grid)), draw(strategies.text_lengths(grid, 2))


@given(case=bound(), seed=strategies.seeds)
def test_unpack_undoes_pack(case: tuple[Layout, torch.Tensor | None], seed: int) -> None:
    layout, lengths = case
    blocking = layout.bind(lengths)
    x = torch.randn(2, layout.tokens, 3, 2, generator=torch.Generator().manual_seed(seed))
    packed = blocking.pack(x)
    assert packed.shape == (2, layout.slots, 3, 2)
    kept = valid_tokens(layout.grid, lengths)
    assert torch.equal(blocking.unpack(packed), torch.where(kept[..., None, None], x, 0))
    assert int((packed != 0).all(-1).all(-1).sum()) == int(kept.sum()), "padding and invalid text must be zero"


@given(case=bound(), seed=strategies.seeds)
def test_each_head_may_have_its_order(case: tuple[Layout, torch.Tensor | None], seed: int) -> None:
    """Tokens of the same segment and block may stand in another order in the second head, text keeps its own."""
    layout, lengths = case
    generator = torch.Generator().manual_seed(seed)
    slot_token, token_slot = layout.slot_token[0, 0].clone(), layout.token_slot[0, 0].clone()
    for block, segment in enumerate(layout.segment.tolist()):
        slots = token_slot[layout.token_block[0, 0] == block]
        if segment != int(Segment.TEXT):
            slot_token[slots] = slot_token[slots[torch.randperm(len(slots), generator=generator)]]
    token_slot[slot_token[slot_token >= 0]] = (slot_token >= 0).nonzero().squeeze(1)
    values = {f.name: getattr(layout, f.name) for f in dc.fields(Layout) if f.init}
    values["slot_token"] = torch.stack([layout.slot_token[0, 0], slot_token])[None]
    values["token_slot"] = torch.stack([layout.token_slot[0, 0], token_slot])[None]
    if layout.start is not None:
        values["start"] = layout.start.expand(1, 2, -1).contiguous()
    by_head, plain = Layout(**values).bind(lengths), layout.bind(lengths)
    x = torch.randn(2, layout.tokens, 2, 3, generator=generator, requires_grad=True)
    packed = by_head.pack(x)
    kept = valid_tokens(layout.grid, lengths)
    moved = torch.where(kept[..., None, None], x, 0)[:, slot_token.clamp_min(0)] * (slot_token >= 0)[:, None, None]
    assert torch.equal(packed[:, :, 0], plain.pack(x)[:, :, 0])
    assert torch.equal(packed[:, :, 1], moved[:, :, 1])
    back = by_head.unpack(packed)
    assert torch.equal(back, torch.where(kept[..., None, None], x, 0))
    weight = torch.randn(x.shape, generator=generator)
    back.backward(weight)
    assert torch.equal(x.grad, torch.where(kept[..., None, None], weight, 0))


def valid_tokens(grid: Grid, lengths: torch.Tensor | None) -> torch.Tensor:
    """``[2, N]`` bool by the definition: a prefix of the text."""
    kept = torch.ones(2, grid.tokens, dtype=torch.bool)
    if lengths is not None:
        first = 0 if grid.text_before else grid.video
        for sample, amount in enumerate(lengths.tolist()):
            kept[sample, first + amount : first + grid.text] = False
    return kept


@given(case=bound())
def test_lengths_count_valid_tokens_and_come_first(case: tuple[Layout, torch.Tensor | None]) -> None:
    layout, lengths = case
    blocking = layout.bind(lengths)
    kept = valid_tokens(layout.grid, lengths)
    assert torch.equal(blocking.length.sum(-1).expand(2, 1)[:, 0].long(), kept.sum(-1))
    slot_kept = kept[:, layout.slot_source[0, 0]] & (layout.slot_token[0, 0] >= 0)
    starts = layout.start if layout.start is not None else torch.arange(layout.blocks)[None, None] * layout.block
    for sample in range(2):
        for start, length in zip(
            starts[0, 0].tolist(), blocking.length.expand(2, 1, -1)[sample, 0].tolist(), strict=True
        ):
            assert bool(slot_kept[sample, start : start + length].all())


@given(case=bound())
def test_no_block_straddles_segments(case: tuple[Layout, torch.Tensor | None]) -> None:
    layout, _ = case
    segment_of_token = torch.empty(layout.tokens, dtype=torch.int32)
    for segment, first, stop in layout.grid.segments():
        segment_of_token[first:stop] = int(segment)
    assert torch.equal(layout.segment[layout.token_block[0, 0]], segment_of_token)
    video = layout.segment.view(-1, layout.blocks_per_tile)[:, 0] != int(Segment.TEXT)
    assert layout.video_tiles == int(video.sum())


@given(case=bound(), seed=strategies.seeds)
def test_expand_gives_each_token_the_value_of_its_block(case: tuple[Layout, torch.Tensor | None], seed: int) -> None:
    layout, _ = case
    blocking = layout.bind()
    pooled = torch.randn(2, layout.blocks, 3, 1, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(blocking.expand(pooled), pooled[:, layout.token_block[0, 0]])
    tiles = blocking.tiles()
    assert torch.equal(
        tiles.length[0, 0], layout.length[0, 0].view(-1, layout.blocks_per_tile).sum(-1, dtype=torch.int32)
    )
    by_tile = torch.randn(2, tiles.blocks, 3, 1, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(tiles.expand(by_tile), by_tile[:, layout.tile_of_block[layout.token_block[0, 0]]])


@pytest.mark.parametrize("tile", [(4, 4, 4), (2, 4, 8), (1, 8, 8)])
def test_full_tiles_stand_where_vsa_puts_them(tile: tuple[int, int, int]) -> None:
    """The closed form of VSA (arXiv 2505.13389): tile index times tile size plus the place in the tile."""
    grid = Grid(t=8, h=8, w=16)
    layout = TileLayout(grid, tile=tile)
    ct, ch, cw = tile
    nh, nw = grid.h // ch, grid.w // cw
    for token, slot in enumerate(layout.token_slot[0, 0].tolist()):
        t, h, w = token // grid.frame, token // grid.w % grid.h, token % grid.w
        corner = ((t // ct) * nh + h // ch) * nw + w // cw
        assert slot == corner * math.prod(tile) + ((t % ct) * ch + h % ch) * cw + w % cw


def test_published_padding_of_cubes() -> None:
    slots = {
        (21, 30, 52): 24 * 32 * 52,
        (21, 45, 80): 24 * 48 * 80,
        (33, 45, 80): 36 * 48 * 80,
    }
    for (t, h, w), expected in slots.items():
        assert TileLayout(Grid(t=t, h=h, w=w)).slots == expected


def test_raster_without_padding_is_the_host_order() -> None:
    layout = RasterLayout(Grid(t=2, h=4, w=8), block=16)
    x = torch.randn(1, 64, 1, 1)
    assert layout.identity
    assert layout.bind().pack(x) is x
    assert layout.bind().unpack(x) is x


sizes = st.tuples(*[st.integers(1, 9)] * 3)


def steps(cells: list[tuple[int, int, int]]) -> torch.Tensor:
    """``[n - 1, 3]``: how far the curve goes along each axis from one cell to the next."""
    return torch.tensor(cells).reshape(-1, 3).diff(dim=0).abs()


@given(size=sizes)
def test_the_curve_visits_every_cell_once_and_never_jumps(size: tuple[int, int, int]) -> None:
    """A step goes to a neighbour or, where odd sizes want it, to the next cell across one diagonal of a square."""
    cells = hilbert(*size)
    assert sorted(cells) == list(itertools.product(*map(range, size)))
    gone = steps(cells)
    assert bool((gone <= 1).all())
    assert bool((gone.sum(1) <= 2).all())


@given(size=sizes)
def test_the_curve_of_even_sizes_goes_from_neighbour_to_neighbour(size: tuple[int, int, int]) -> None:
    gone = steps(hilbert(*(2 * n for n in size)))
    assert bool((gone.sum(1) == 1).all())


@pytest.mark.parametrize("size", [(21, 30, 52), (21, 45, 80), (33, 45, 80), (13, 30, 45)])
def test_diagonals_of_published_grids_are_rare(size: tuple[int, int, int]) -> None:
    gone = steps(hilbert(*size))
    assert bool((gone.sum(1) <= 2).all())
    assert float((gone.sum(1) == 2).double().mean()) < 0.011


def test_blocks_along_the_curve_are_compact() -> None:
    """128 tokens span about 5 positions along each axis; in raster order, a row and a half of one frame."""
    layout = CurveLayout(Grid(t=20, h=40, w=80))
    token = layout.slot_token[0, 0].view(-1, 128)
    place = torch.stack((token // 3200, token // 80 % 40, token % 80))
    extent = (place.amax(2) - place.amin(2) + 1).double()
    assert float(extent.prod(0).mean()) < 3 * 128
    assert float(extent.amax(0).mean()) < 10


def test_segments_have_curves_of_their_own() -> None:
    grid = Grid(t=5, h=4, w=6, text_before=3, condition_frames=2)
    layout = CurveLayout(grid, block=10)
    assert layout.length[0, 0].tolist() == [3, 10, 10, 10, 10, 8, 10, 10, 10, 10, 10, 10, 10, 2]
    assert layout.slot_token[0, 0][layout.slot_token[0, 0] >= 0][3:51].max() < 3 + 48


def test_equal_layouts_have_equal_keys() -> None:
    grid = Grid(t=3, h=4, w=5)
    assert TileLayout(grid).key == TileLayout(grid, tile=(4, 4, 4), block=64).key
    keys = [
        TileLayout(grid).key,
        TileLayout(grid, block=32).key,
        RasterLayout(grid).key,
        RasterLayout(grid, break_at="frame").key,
    ]
    assert len({*keys, PartitionLayout(grid, chunk=(1, 2, 2)).key, CurveLayout(grid, block=64).key}) == 6


def test_tables_are_cached_by_value_and_hold_no_device() -> None:
    """An equal grid, made anew, finds the same tables; a copy on another device leaves those of the CPU alone."""
    kinds = (
        lambda grid: TileLayout(grid, tile=(2, 2, 3), block=4),
        lambda grid: RasterLayout(grid, block=4),
        lambda grid: PartitionLayout(grid, chunk=(1, 2, 2)),
        lambda grid: CurveLayout(grid, block=4),
        lambda grid: ClusterLayout(grid, clusters=5),
    )
    for kind in kinds:
        first, again = (kind(Grid(t=3, h=4, w=5, text_after=6)) for _ in range(2))
        assert first.slot_token is again.slot_token
        assert first.length is again.length
        moved = first.to("meta")
        assert moved.length.is_meta
        assert moved.token_slot.is_meta
        assert kind(Grid(t=3, h=4, w=5, text_after=6)).length.device == torch.device("cpu")
        assert kind(Grid(t=3, h=5, w=4, text_after=6)).slot_token is not first.slot_token


def test_layout_made_under_inference_mode_trains() -> None:
    with torch.inference_mode():
        layout = TileLayout(Grid(t=2, h=3, w=7), tile=(2, 2, 3), block=5)
    blocking = layout.bind().tiles()
    x = torch.randn(1, 42, 1, 2, requires_grad=True)
    blocking.unpack(blocking.pack(x)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: Grid(t=0, h=1, w=1), "t must"),
        (lambda: Grid(t=1, h=1.0, w=1), "h must"),
        (lambda: Grid(t=2, h=1, w=1, condition_frames=2), "condition_frames"),
        (lambda: Grid(t=1, h=1, w=1, text_after=-1), "text_after"),
        (lambda: TileLayout(Grid(t=1, h=1, w=1), tile=(4, 4)), "tile"),
        (lambda: TileLayout(Grid(t=1, h=1, w=1), tile=(4, 0, 4)), r"tile\[1\]"),
        (lambda: RasterLayout(Grid(t=1, h=1, w=1), block=0), "block"),
        (lambda: CurveLayout(Grid(t=1, h=1, w=1), block=0), "block"),
        (lambda: RasterLayout(Grid(t=1, h=1, w=1), break_at="row"), "break_at"),
        (lambda: RasterLayout(Grid(t=1, h=1, w=1)).bind(torch.tensor([1])), "text_length"),
        (lambda: RasterLayout(Grid(t=1, h=1, w=1, text_after=2)).bind(torch.tensor([1.0])), "text_length"),
        (lambda: RasterLayout(Grid(t=1, h=1, w=1, text_after=2, text_before=1)).bind(torch.tensor([1])), "both sides"),
        (lambda: RasterLayout(Grid(t=1, h=1, w=2)).bind().pack(torch.zeros(1, 3, 1, 1)), "N=2"),
        (lambda: kept_blocks(float("nan"), 4), "density"),
    ],
)
def test_refuses_in_words(build: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build()  # type: ignore[operator]


@given(density=st.floats(0.001, 1.0), blocks=st.integers(1, 500))
def test_kept_blocks(density: float, blocks: int) -> None:
    kept = kept_blocks(density, blocks)
    assert 1 <= kept <= blocks
    assert kept >= density * blocks - 1e-6
    assert kept == 1 or kept - 1 < density * blocks
    assert kept_blocks(0.1, 80) == 8
