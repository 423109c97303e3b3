"""A latency measurement as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vsparse.measure.draw import draw_block_map
from vsparse.measure.latency import plots, tables
from vsparse.measure.latency.figures import Latency
from vsparse.measure.latency.intervals import WIDEST
from vsparse.measure.latency.timeline import PARTS, SELF_ATTENTION

__all__ = ["page", "picture", "rows"]

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


def page(found: Latency, more: Sequence[str] = ()) -> str:
    """The page.

    Args:
        found: A measurement. more: sections that stand before the environment, as HTML.
    """
    said = tables.sentences(found)
    asked = ", ".join(f"{name} {value}" for name, value in found.asked.items())
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        # Nothing may come from elsewhere: a browser enforces it.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>Latency: {html.escape(found.pipeline)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Where the time goes: {html.escape(found.pipeline)}</h1>",
        f"<p>{html.escape('; '.join((found.method, found.schedule, asked, found.device)))}</p>",
        f'<p class="lead" id="verdict">{html.escape(said[0])}</p>',
        *(
            f'<p class="{"missed" if x.startswith(("Missed", "Not shown")) else ""}">{html.escape(x)}</p>'
            for x in said[1:]
        ),
        "<h2>Whole generations</h2>",
        rows(["", *tables.KINDS], tables.whole_rows(found)),
        f"<p>{found.rounds} rounds. In each, a plain and a profiled generation, dense and sparse, take turns. Figures "
        f"are medians; the interval covers the median with a chance of {found.speed.coverage:.0%}. A speed-up is "
        f"quoted when its interval is at most {WIDEST:.0%} of it wide and does not hold 1.</p>",
        "<h2>Parts</h2>",
        picture(
            plots.as_uri(plots.parts(found)),
            "The profiled generation of median length, dense and sparse.",
            name="parts",
        ),
        _parts(found),
        "<h2>Phases of the self-attention</h2>",
        picture(
            plots.as_uri(plots.phases(found)),
            "One layer in one call, mean over the calls of that phase.",
            name="phases",
        ),
        "<h2>Layers and steps</h2>",
        picture(plots.as_uri(plots.layers(found)), "Time in each layer over a generation.", name="layers"),
        picture(plots.as_uri(plots.steps(found)), "Time inside all layers by denoising step.", name="steps"),
        "<h2>What was computed</h2>",
        *_computed(found),
        *_predicted(found),
        *more,
        "<h2>Environment</h2>",
        rows(["", ""], _environment(found.environment), kind="words"),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _sentence(words: str) -> str:
    chosen = "missed" if words.startswith(("Missed", "Not shown")) else ""
    return f'<p class="{chosen}">{html.escape(words)}</p>'


def _parts(found: Latency) -> str:
    dense, sparse = (found.parts(kind) for kind in tables.KINDS)
    whole = [found.typical(kind).seconds for kind in tables.KINDS]
    body = []
    for name, chosen in [("self-attention", SELF_ATTENTION), *((part, (part,)) for part in PARTS), ("sum", PARTS)]:
        a, b = (sum(x[part] for part in chosen) for x in (dense, sparse))
        if a or b:
            spreads = ["", ""]
            if len(chosen) == 1:
                spreads = [tables.between(found.part(kind, name), ".3f") for kind in tables.KINDS]
            label = f"  {name}" if name in SELF_ATTENTION else name
            body.append(
                [label, f"{a:.3f}", f"{a / whole[0]:.1%}", spreads[0], f"{b:.3f}", f"{b / whole[1]:.1%}", spreads[1]]
            )
    head = ["seconds", "dense", "share", "all rounds", "sparse", "share", "all rounds"]
    return rows(head, body, sums=("self-attention", "sum"))


def _computed(found: Latency) -> list[str]:
    executed = found.executed
    if not executed.density:
        return ["<p>No step was told apart, so there is no density by step.</p>"]
    words = (
        f"Executed share of token pairs by layer, head and step, mean over the branches of guidance; over everything "
        f"{found.density:.3f}. {executed.dense_steps} of {len(executed.density)} steps and {executed.dense_layers} of "
        f"{len(executed.density[0])} layers computed every pair."
    )
    said = [picture(plots.as_uri(plots.densities(executed)), words, name="densities")]
    if executed.blocks is not None:
        told = f"One map that ran: layer {executed.layer}, step {executed.step}."
        said.append(picture(_map(found), told, name="map", kind="map"))
    return said


def _predicted(found: Latency) -> list[str]:
    """The cost model beside what was measured."""
    if found.rates is None or not found.work:
        return []
    head = ["seconds", *(x for kind in tables.KINDS for x in (f"{kind}, predicted", "measured", "error"))]
    words = (
        "What each part reaches against what this machine can. The line: products and a copy; the dashed ones: "
        "attention, as measured apart. Bytes are those of all tensors that operators take and give, in a cache or not."
    )
    return [
        "<h2>Prediction and limits</h2>",
        rows(head, tables.predicted_rows(found), sums=("sum",)),
        f"<p>{html.escape(tables.rates_words(found))} Products and attention at their rates, other operators by the "
        "bytes they move, and a little for each call. The scheduler and the rest are not predicted.</p>",
        picture(plots.as_uri(plots.roofline(found)), words, name="roofline"),
    ]


def _map(found: Latency) -> str:
    assert found.executed.blocks is not None
    with tempfile.TemporaryDirectory() as folder:
        path = draw_block_map(Path(folder) / "map.png", found.executed.blocks, title="block map", heads=None)
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _environment(values: Mapping[str, Any]) -> list[list[str]]:
    flat = {**values, **values.get("packages", {})}
    flat.pop("packages", None)
    return [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in flat.items()]
