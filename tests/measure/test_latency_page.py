"""The latency report as a page: it says what the measurement says, stands alone, and a browser shows it whole."""

from __future__ import annotations

import dataclasses as dc
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from latency_cases import known

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import TileLayout
from vsparse.measure.latency import plots, report, tables
from vsparse.measure.latency.figures import Latency
from vsparse.measure.latency.page import page
from vsparse.measure.latency.timeline import KERNEL, PARTS


def with_map() -> Latency:
    found = known()
    blocks = BlockMap.full(TileLayout(Grid(t=2, h=8, w=8), tile=(1, 4, 4), block=16).bind())
    return dc.replace(found, executed=dc.replace(found.executed, blocks=blocks))


class Cells(html.parser.HTMLParser):
    """The rows of all tables of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_page_says_what_was_measured() -> None:
    found = with_map()
    text = page(found)
    cells: dict[str, list[str]] = {}
    for row in Cells(text).rows:
        cells.setdefault(row[0], row[1:])
    assert cells[KERNEL][0] == "7.000"
    assert cells["self-attention"] == ["8.000", "66.1%", "", "3.000", "49.6%", ""]
    assert cells["sum"][1] == "100.0%"
    for name, *figures in tables.whole_rows(found):
        assert cells[name] == figures
    assert cells["torch"] == ["2"]
    for line in tables.sentences(found):
        assert line in text.replace("&#x27;", "'")
    for name in ("parts", "phases", "layers", "steps", "densities", "map", "roofline"):
        assert f'<figure id="{name}">' in text


def test_page_escapes_what_was_typed() -> None:
    found = dc.replace(known(), asked={"prompt": "<script>alert(1)</script>"})
    assert "<script>" not in page(found)


def test_page_needs_nothing_else() -> None:
    text = page(with_map())
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', text)
    assert sources
    assert {source[:22] for source in sources} == {"data:image/png;base64,"[:20]}
    assert "http://" not in text
    assert "https://" not in text


def test_every_part_has_a_colour_of_its_own() -> None:
    assert set(plots.COLORS) == set(PARTS)
    assert len(set(plots.COLORS.values())) == len(PARTS)


def test_report_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = report.write(tmp_path, with_map())
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}
    before = {path: path.read_bytes() for path in paths}
    monkeypatch.setattr(report, "page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(tmp_path, known(rounds=1))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- in a browser ------------------------------------------------------------------------------------------------

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
LOOK = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const facts = {
    images: images.length,
    drawn: images.filter(x => x.complete && x.naturalWidth > 100).length,
    fits: document.documentElement.scrollWidth <= innerWidth,
    verdict: document.getElementById("verdict").innerText,
  };
  document.title = JSON.stringify(facts);
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is on the path")
@pytest.mark.parametrize("width", [1200, 500])
def test_chromium_shows_every_picture_and_nothing_sticks_out(width: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    found = with_map()
    text = page(found).replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", LOOK))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [
        CHROMIUM,
        *options,
        f"--window-size={width},900",
        "--virtual-time-budget=5000",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    facts = json.loads(html.unescape(title))
    assert facts == {"images": 7, "drawn": 7, "fits": True, "verdict": tables.sentences(found)[0]}
