"""A latency measurement as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vsparse.measure.draw import draw_block_map
from vsparse.measure.figures import as_uri
from vsparse.measure.latency import plots, tables
from vsparse.measure.latency.figures import Latency
from vsparse.measure.latency.intervals import WIDEST
from vsparse.measure.latency.layer import Layer
from vsparse.measure.latency.timeline import PARTS, SELF_ATTENTION
from vsparse.measure.page import document, environment_rows, paragraph, picture, png_uri, rows

__all__ = ["layer_page", "page"]


def page(found: Latency, more: Sequence[str] = ()) -> str:
    """The page.

    Args:
        found: A measurement. more: sections that stand before the environment, as HTML.
    """
    said = tables.sentences(found)
    asked = ", ".join(f"{name} {value}" for name, value in found.asked.items())
    parts = [
        f"<h1>Where the time goes: {html.escape(found.pipeline)}</h1>",
        paragraph("; ".join((found.method, found.schedule, asked, found.device))),
        paragraph(said[0], kind="lead", name="verdict"),
        *(paragraph(x, kind="missed" if x.startswith(("Missed", "Not shown")) else "") for x in said[1:]),
        "<h2>Whole generations</h2>",
        rows(["", *tables.KINDS], tables.whole_rows(found)),
        f"<p>{found.rounds} rounds. In each, a plain and a profiled generation, dense and sparse, take turns. Figures "
        f"are medians; the interval covers the median with a chance of {found.speed.coverage:.0%}. A speed-up is "
        f"quoted when its interval is at most {WIDEST:.0%} of it wide and does not hold 1.</p>",
        "<h2>Parts</h2>",
        picture(
            as_uri(plots.parts(found)),
            "The profiled generation of median length, dense and sparse.",
            name="parts",
        ),
        _parts(found),
        "<h2>Phases of the self-attention</h2>",
        picture(
            as_uri(plots.phases(found)),
            "One layer in one call, mean over the calls of that phase.",
            name="phases",
        ),
        "<h2>Layers and steps</h2>",
        picture(as_uri(plots.layers(found)), "Time in each layer over a generation.", name="layers"),
        picture(as_uri(plots.steps(found)), "Time inside all layers by denoising step.", name="steps"),
        "<h2>What was computed</h2>",
        *_computed(found),
        *_predicted(found),
        *more,
        "<h2>Environment</h2>",
        rows(["", ""], environment_rows(found.environment), kind="words"),
    ]
    return document(f"Latency: {found.pipeline}", parts)


def layer_page(found: Layer, environment: Mapping[str, Any]) -> str:
    """One attention layer as a page.

    Args:
        found: Predicted, and measured or not. environment: `vsparse.measure.demo.environment`.
    """
    head, body = tables.layer_rows(found)
    said = [f"{words}." for words in found.verdicts()] or [found.refused or "Predicted, not measured."]
    parts = [
        f"<h1>One attention layer: {html.escape(found.case.name)}</h1>",
        paragraph(found.method),
        *(paragraph(words, kind="" if i else "lead", name="" if i else "verdict") for i, words in enumerate(said)),
        rows(head, body, sums=[row[0] for row in body if not row[0].startswith(" ")]),
        paragraph(tables.layer_words(found)),
    ]
    if found.measured is not None:
        head, body = tables.baseline_rows(found.measured)
        parts += ["<h2>Dense attention on the same q, k and v, in the same rounds</h2>", rows(head, body)]
        parts += [paragraph(words) for words in tables.refused_lines(found.measured)]
    parts += ["<h2>Environment</h2>", rows(["", ""], environment_rows(environment), kind="words")]
    return document(f"One attention layer: {found.case.name}", parts)


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
    said = [picture(as_uri(plots.densities(executed)), words, name="densities")]
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
        picture(as_uri(plots.roofline(found)), words, name="roofline"),
    ]


def _map(found: Latency) -> str:
    assert found.executed.blocks is not None
    with tempfile.TemporaryDirectory() as folder:
        path = draw_block_map(Path(folder) / "map.png", found.executed.blocks, title="block map", heads=None)
        return png_uri(path)
