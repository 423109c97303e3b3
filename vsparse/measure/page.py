"""What the HTML reports share: one page that loads nothing, its look, tables and pictures."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["document", "environment_rows", "paragraph", "picture", "png_uri", "rows"]

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1b1f24; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; background: white; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p, li, figcaption { color: #444c56; } .lead { font-size: 1.15rem; color: #1b1f24; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; font-size: .92rem; }
th, td { padding: .22rem .8rem; border-bottom: 1px solid #e4e8ec; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { color: #667080; font-weight: 600; }
tr.sum td { font-weight: 600; } td.in { padding-left: 2rem; }
figure { margin: .6rem 0 1.4rem; } img { width: 100%; height: auto; } img.map { max-width: 40rem; }
figcaption { font-size: .88rem; } table.words td { text-align: left; }
.missed { color: #b3123f; } .scroll { overflow-x: auto; }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: Of the window. parts: HTML, one after the other, as `rows`, `picture` and `paragraph` make it.
    """
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        # Nothing may come from elsewhere: a browser enforces it.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
    ]
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"


def paragraph(words: str, *, kind: str = "", name: str = "") -> str:
    """Plain words. ``kind``: "lead" or "missed"; ``name``: by which a program finds it."""
    told = (f' class="{kind}"' if kind else "") + (f' id="{name}"' if name else "")
    return f"<p{told}>{html.escape(words)}</p>"


def png_uri(path: Path) -> str:
    """A PNG file as the source of an image in a page that stands alone."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def picture(source: str, words: str, *, name: str, kind: str = "") -> str:
    """A figure with its caption; ``source`` is a data URI."""
    told = html.escape(words)
    return (
        f'<figure id="{name}"><img src="{source}" alt="{told}" class="{kind}"><figcaption>{told}</figcaption></figure>'
    )


def rows(head: Sequence[str], body: Sequence[Sequence[str]], *, sums: Sequence[str] = (), kind: str = "") -> str:
    """A table. Rows whose first cell is among ``sums`` stand out; a first cell that begins with spaces is indented.
    ``kind``: "words" where the cells are no numbers.
    """
    lines = ["<tr>" + "".join(f"<th>{html.escape(x)}</th>" for x in head) + "</tr>"]
    for row in body:
        inside = ' class="in"' if row[0].startswith(" ") else ""
        cells = f"<td{inside}>{html.escape(row[0].strip())}</td>" + "".join(
            f"<td>{html.escape(x)}</td>" for x in row[1:]
        )
        chosen = ' class="sum"' if row[0] in sums else ""
        lines.append(f"<tr{chosen}>{cells}</tr>")
    return f'<div class="scroll"><table class="{kind}">{"".join(lines)}</table></div>'


def environment_rows(values: Mapping[str, Any]) -> list[list[str]]:
    """What `vsparse.measure.demo.environment` tells, a name and a value in each row."""
    flat = {**values, **values.get("packages", {})}
    flat.pop("packages", None)
    return [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in flat.items()]
