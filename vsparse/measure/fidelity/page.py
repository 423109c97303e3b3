"""A comparison as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

from vsparse.measure.fidelity import plots, tables
from vsparse.measure.fidelity.result import Fidelity
from vsparse.measure.fidelity.sheets import telling
from vsparse.measure.figures import as_uri
from vsparse.measure.latency.executed import Executed
from vsparse.measure.latency.plots import densities
from vsparse.measure.page import document, environment_rows, paragraph, picture, png_uri, rows

__all__ = ["page"]

_WHY = {
    "only": "The only clip",
    "furthest": "The clip that lies furthest from dense",
    "middle": "The clip in the middle",
}


def page(found: Fidelity, sheets: Mapping[str, Path] | None = None) -> str:
    """The page.

    Args:
        found: A comparison. sheets: contact sheets, as `vsparse.measure.fidelity.sheets.sheets` draws them.
    """
    said = tables.sentences(found)
    asked = ", ".join(f"{name} {value}" for name, value in found.asked.items() if value is not None)
    grouped = [row[0] for row in tables.figure_rows(found) if not any(row[1:])]
    parts = [
        f"<h1>Quality: {html.escape(found.source)}</h1>",
        paragraph("; ".join(x for x in (f"{len(found.clips)} clips", asked) if x)),
        paragraph(said[0], kind="lead", name="verdict"),
        *(paragraph(x, kind="missed" if x.startswith("No floor") else "") for x in said[1:]),
        *_lost(found),
        "<h2>What ran</h2>",
        rows(tables.RAN_HEAD, tables.ran_rows(found)),
        paragraph(
            "Density is the executed share of the token pairs over all calls, forced blocks and dense calls included. "
            "Recall is the share of the dense model's own attention that falls on the keys a method keeps, when it "
            "chooses on the same q and k."
        ),
        rows(("", ""), [[run.name, run.words] for run in found.runs], kind="words"),
        "<h2>Against the dense clip of the same prompt and seed</h2>",
        rows(tables.FIGURE_HEAD, tables.figure_rows(found), sums=grouped, kind="grouped"),
        *(paragraph(x) for x in tables.missing(found)),
        paragraph(tables.CAPTION),
        picture(
            as_uri(plots.clips(found)),
            "A dot for each clip; the upright line is the mean, the level one its interval. A clip that is equal to "
            "the bit has no PSNR and no dot.",
            name="clips",
        ),
    ]
    if any(found.latents(run) for run in found.others):
        words = (
            "How far the latents lie from the dense ones after each denoising step: the mean, and least to most. Steps "
            "whose latents are equal are not drawn."
        )
        parts += ["<h2>Step by step</h2>", picture(as_uri(plots.latents(found)), words, name="latents")]
    parts += [*_densities(found), *_sheets(found, sheets or {})]
    named = [row[0] for row in tables.clip_rows(found) if not any(row[1:])]
    parts += [
        "<h2>Every clip</h2>",
        rows(tables.CLIP_HEAD, tables.clip_rows(found), sums=named),
        "<h2>Environment</h2>",
        rows(["", ""], environment_rows(found.environment), kind="words"),
    ]
    return document(f"Quality: {found.source}", parts)


def _lost(found: Fidelity) -> list[str]:
    if not found.lost:
        return []
    lines = [[path, why] for path, why in found.lost.items()]
    return [f"<h2>In no figure: {len(lines)} files</h2>", rows(("file", "why"), lines, kind="words")]


def _densities(found: Fidelity) -> list[str]:
    parts = []
    for run in found.others:
        heads = found.heads(run)
        if run.kind == "sparse" and heads:
            executed = Executed(density=heads, phases=[], stats={})
            words = f"{run.name}: executed density by layer, head and step, mean over the clips."
            parts.append(picture(as_uri(densities(executed)), words, name=f"densities-{run.name}"))
    return ["<h2>Density</h2>", *parts] if parts else []


def _sheets(found: Fidelity, sheets: Mapping[str, Path]) -> list[str]:
    parts = []
    for why, path in sheets.items():
        clip = telling(found)[why]
        seed = "" if clip.seed is None else f", seed {clip.seed}"
        words = f"{_WHY[why]}: \u201c{clip.prompt}\u201d{seed}. Frames are those of the files, after their codec."
        parts.append(picture(png_uri(path), words, name=f"sheet-{why}"))
    return ["<h2>To look at</h2>", *parts] if parts else []
