"""Contact sheet, layout and block map: what lands in the figure, and in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vsparse import BlockMap, Grid, RasterLayout, TileLayout, select
from vsparse.measure import draw, figures, sheet


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    kept: list[Any] = []

    def save(figure: Any, path: Path) -> Path:
        kept.append(figure)
        return figures.save_figure(figure, path)

    monkeypatch.setattr(draw, "save_figure", save)
    monkeypatch.setattr(sheet, "save_figure", save)
    return kept


def words(figure: Any) -> list[str]:
    titles = [axis.get_title() for axis in figure.axes]
    labels = [label for axis in figure.axes for label in (axis.get_xlabel(), axis.get_ylabel())]
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    inside = [text.get_text() for axis in figure.axes for text in axis.texts]
    return [*(text.get_text() for text in figure.texts), *titles, *labels, *legends, *inside]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def frames(offset: float = 0.0) -> torch.Tensor:
    return torch.linspace(0.1, 0.8, 9)[:, None, None, None].expand(9, 16, 16, 3) + offset


def test_contact_sheet_shows_runs_facts_frames_and_differences(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [
        sheet.SheetRow(name="dense", facts=["8 s"], frames=frames()),
        sheet.SheetRow(name="same", facts=["equal to the bit"], frames=frames()),
        sheet.SheetRow(name="sparse", facts=["density 0.25", "PSNR 20 dB"], frames=frames(0.05)),
    ]
    path = sheet.contact_sheet(tmp_path / "sheet.png", rows, title="a prompt", note="a note", columns=5)
    assert is_png(path)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    found = words(drawn[0])
    for text in ("a prompt", "a note", "dense", "same", "sparse", "density 0.25\nPSNR 20 dB", "frame 1", "frame 9"):
        assert text in found
    assert sum("difference" in text for text in found) == 1, "a difference that nobody could see has no row"
    assert len(drawn[0].axes) == 5 * 4
    shown = drawn[0].axes[-1].images[0].get_array()
    assert float(shown.max()) == pytest.approx(sheet.GAIN * 0.05)


def test_many_runs_stand_in_columns_with_the_reference_at_the_head(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [sheet.SheetRow(name=f"run {i}", facts=[], frames=frames()) for i in range(2 * sheet.LONGEST)]
    sheet.contact_sheet(tmp_path / "sheet.png", rows, title="", columns=2)
    found = words(drawn[0])
    assert found.count("run 0") == found.count("frame 9") == 2
    assert all(found.count(row.name) == 1 for row in rows[1:])
    assert len({round(axis.get_position().x0, 4) for axis in drawn[0].axes}) == 2 * 2


def test_contact_sheet_refuses_rows_that_do_not_fit(tmp_path: Path) -> None:
    rows = [sheet.SheetRow(name=str(n), facts=[], frames=frames()[:n]) for n in (9, 8)]
    with pytest.raises(ValueError, match="8: frames"):
        sheet.contact_sheet(tmp_path / "sheet.png", rows, title="")
    with pytest.raises(ValueError, match="at least one row"):
        sheet.contact_sheet(tmp_path / "sheet.png", [], title="")
    with pytest.raises(ValueError, match=r"must end in \.png"):
        sheet.contact_sheet(tmp_path / "sheet.jpg", rows[:1], title="")


def test_layout_names_blocks_ragged_tiles_and_text(tmp_path: Path, drawn: list[Any]) -> None:
    layout = TileLayout(Grid(t=5, h=6, w=7, text_after=9), tile=(4, 4, 4))
    path = draw.draw_layout(tmp_path / "layout.png", layout, title="tiles")
    assert is_png(path)
    found = words(drawn[0])
    assert [f"latent frame {i}" in found for i in range(5)] == [True] * 5
    assert "text tokens: 9 after the video" in found
    assert "a block that is not full: padding in its slots" in found
    assert {str(i) for i in range(layout.blocks)} <= set(found), "every block carries its index"
    hatched = [patch for axis in drawn[0].axes for patch in axis.patches if patch.get_hatch()]
    ragged = int((layout.length[0, 0] < layout.block)[layout.token_block[0, 0]].sum())
    assert len(hatched) == ragged


def test_layout_of_full_blocks_has_no_hatches(tmp_path: Path, drawn: list[Any]) -> None:
    draw.draw_layout(tmp_path / "layout.png", RasterLayout(Grid(t=2, h=8, w=8), block=64))
    assert not [patch for axis in drawn[0].axes for patch in axis.patches]
    assert any("all full" in text for text in words(drawn[0]))


def test_long_videos_show_their_first_frames(tmp_path: Path, drawn: list[Any]) -> None:
    draw.draw_layout(tmp_path / "layout.png", RasterLayout(Grid(t=21, h=4, w=4, condition_frames=1)), frames=6)
    found = words(drawn[0])
    assert "conditioning frame 0" in found
    assert any("first 6 of 21 latent frames" in text for text in found)


def test_block_map_shows_kept_text_and_density_of_each_head(tmp_path: Path, drawn: list[Any]) -> None:
    blocking = TileLayout(Grid(t=4, h=8, w=8, text_after=70)).bind(torch.tensor([5]))
    scores = torch.rand(1, 3, blocking.blocks, blocking.blocks, generator=torch.Generator().manual_seed(0))
    blocks = select.top_k(scores, blocking, count=2, forced=select.forced_text(blocking))
    path = draw.draw_block_map(tmp_path / "map.png", blocks, title="some method", origin="somewhere")
    assert is_png(path)
    found, density = words(drawn[0]), blocks.density()[0]
    assert {"some method", "key block", "query block", "kept, computed", "omitted"} <= set(found)
    assert [f"head {h}   density {float(density[h]):.3f}" in found for h in range(3)] == [True] * 3
    assert "block without a valid token" in found, "the second text block is empty at text length 5"
    image = torch.as_tensor(drawn[0].axes[0].images[0].get_array())
    assert torch.equal(image[:4, :4] == 1, blocks.to_mask()[0, 0, :4, :4])
    assert bool((image[:4, 4] == 2).all())
    assert bool((image[:, 5] == 3).all())


def test_block_map_without_a_layout_and_with_chosen_heads(tmp_path: Path, drawn: list[Any]) -> None:
    bound = RasterLayout(Grid(t=2, h=8, w=8)).bind()
    blocks = BlockMap.from_mask(torch.eye(2, dtype=torch.bool)[None, None].expand(1, 4, 2, 2), bound)
    draw.draw_block_map(tmp_path / "map.png", blocks, heads=[3, 1])
    assert [axis.get_title()[:6] for axis in drawn[0].axes] == ["head 3", "head 1"]
    with pytest.raises(ValueError, match="heads"):
        draw.draw_block_map(tmp_path / "map.png", blocks, heads=[4])
    with pytest.raises(ValueError, match="sample"):
        draw.draw_block_map(tmp_path / "map.png", blocks, sample=1)
