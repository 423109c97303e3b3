"""The plots of a latency report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vsparse.measure.figures import FAINT, INK, axis_at, density_map, new_figure
from vsparse.measure.latency.executed import Executed
from vsparse.measure.latency.figures import Latency
from vsparse.measure.latency.rounds import Kind
from vsparse.measure.latency.timeline import (
    BLOCK,
    CHOOSE,
    COMBINE,
    COMMUNICATE,
    CROSS,
    FEED,
    KERNEL,
    PACK,
    PARTS,
    PROJECT,
    REST,
    SCHEDULER,
    SEARCH,
    SELF_ATTENTION,
    TEXT,
    TRANSFORMER,
    VAE,
)
from vsparse.optional import require

__all__ = ["COLORS", "densities", "layers", "parts", "phases", "roofline", "steps"]

KINDS: tuple[Kind, Kind] = ("dense", "sparse")
COLORS: Mapping[str, str] = {
    KERNEL: "#0b5cad",
    CHOOSE: "#c8500a",
    SEARCH: "#e8943a",
    PACK: "#8a3ab9",
    COMBINE: "#d6439a",
    COMMUNICATE: "#b3123f",
    PROJECT: "#7fb2e0",
    CROSS: "#17803d",
    FEED: "#8cc49b",
    BLOCK: "#c9d3a5",
    TRANSFORMER: "#dcd6c3",
    TEXT: "#8c6d1f",
    VAE: "#c9ad6a",
    SCHEDULER: "#4a4e57",
    REST: "#b8bec6",
}
_POINTS = (KERNEL, SEARCH, CHOOSE, PROJECT, CROSS, FEED, VAE)
"""Parts whose work is mostly products."""
_WIDTH = 9.6


def _legend(figure: Any, names: Sequence[str], left: float, top: float, columns: int) -> None:
    patches = require("matplotlib.patches", "cli")
    width, height = figure.get_size_inches()
    handles = [patches.Patch(color=COLORS[name], label=name) for name in names]
    place = {"bbox_to_anchor": (left / width, top / height), "loc": "upper left"}
    figure.legend(
        handles=handles, ncols=columns, frameon=False, fontsize=8.5, columnspacing=1.2, handlelength=1.0, **place
    )


def _shown(many: Sequence[Mapping[str, float]]) -> list[str]:
    return [part for part in PARTS if any(one.get(part) for one in many)]


def parts(found: Latency) -> Any:
    """Stacked bars: where a dense and a sparse generation spend their time."""
    both = [found.parts(kind) for kind in KINDS]
    names = _shown(both)
    rows = -(-len(names) // 5)
    height = 2.15 + 0.24 * rows
    figure = new_figure(_WIDTH, height)
    axis = axis_at(figure, (0.75, 0.55, _WIDTH - 1.55, 1.35), grid="x")
    for y, one in enumerate(both):
        left, whole = 0.0, sum(one.values())
        for name in names:
            axis.barh(y, one[name], 0.62, left=left, color=COLORS[name])
            if one[name] > 0.06 * whole:
                light = name in (KERNEL, CHOOSE, PACK, COMBINE, CROSS, TEXT, SCHEDULER)
                axis.text(left + one[name] / 2, y, f"{one[name] / whole:.0%}", ha="center", va="center", fontsize=8.5,
                          color="white" if light else INK)  # fmt: skip
            left += one[name]
        axis.text(left, y, f"  {whole:.3g} s", va="center", fontsize=9, color=INK)
    axis.set_yticks(range(2), KINDS)
    axis.tick_params(axis="y", labelsize=9.5, colors=INK, length=0)
    axis.invert_yaxis()
    axis.set_xlabel("seconds of one generation", fontsize=9, color=FAINT)
    _legend(figure, names, 0.68, height - 0.05, 5)
    return figure


def layers(found: Latency) -> Any:
    """Stacked bars by layer: the dense one and the sparse one side by side."""
    both = [found.layers(kind) for kind in KINDS]
    names = _shown([one for layer in both for one in layer.values()])
    rows = -(-len(names) // 5)
    height = 2.95 + 0.24 * rows
    figure = new_figure(_WIDTH, height)
    axis = axis_at(figure, (0.75, 0.55, _WIDTH - 0.95, 2.2))
    for shift, layer in zip((-0.21, 0.21), both, strict=True):
        bottom = dict.fromkeys(layer, 0.0)
        for name in names:
            values = [one.get(name, 0.0) for one in layer.values()]
            axis.bar([x + shift for x in layer], values, 0.38, bottom=list(bottom.values()), color=COLORS[name])
            bottom = {x: bottom[x] + value for x, value in zip(layer, values, strict=True)}
    axis.set_xlabel("layer: dense on the left, sparse on the right", fontsize=9, color=FAINT)
    axis.set_ylabel("seconds in a generation", fontsize=9, color=FAINT)
    axis.xaxis.set_major_locator(require("matplotlib.ticker", "cli").MaxNLocator(integer=True, nbins=20))
    axis.set_xlim(-0.6, max(both[0], default=0) + 0.6)
    _legend(figure, names, 0.68, height - 0.05, 5)
    return figure


def phases(found: Latency) -> Any:
    """Stacked bars by phase: the self-attention of one layer in one call."""
    lines = [(kind, line) for kind in KINDS for line in found.phases(kind)]
    names = [part for part in SELF_ATTENTION if any(line.parts.get(part) for _, line in lines)]
    height = 1.15 + 0.34 * len(lines) + 0.24 * (-(-len(names) // 6))
    figure = new_figure(_WIDTH, height)
    axis = axis_at(figure, (1.85, 0.55, _WIDTH - 2.75, 0.3 + 0.34 * len(lines)), grid="x")
    for y, (_, line) in enumerate(lines):
        left = 0.0
        for name in names:
            value = 1e3 * line.parts.get(name, 0.0)
            axis.barh(y, value, 0.66, left=left, color=COLORS[name])
            left += value
        axis.text(left, y, f"  {left:.3g} ms", va="center", fontsize=8.5, color=INK)
    words = [f"{'not patched' if kind == 'dense' else line.phase} ({line.calls} calls)" for kind, line in lines]
    axis.set_yticks(range(len(lines)), words)
    axis.tick_params(axis="y", colors=INK, length=0)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds of one layer in one call", fontsize=9, color=FAINT)
    _legend(figure, names, 0.1, height - 0.03, 6)
    return figure


def steps(found: Latency) -> Any:
    """Seconds inside the layers by denoising step."""
    figure = new_figure(_WIDTH, 2.3)
    axis = axis_at(figure, (0.75, 0.55, _WIDTH - 0.95, 1.45))
    for kind, color, mark in (("dense", "#7c8794", "o"), ("sparse", "#0b5cad", "s")):
        values = found.steps(kind)  # type: ignore[arg-type]
        axis.plot(range(len(values)), values, color=color, marker=mark, markersize=4, linewidth=1.5, label=kind)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("denoising step", fontsize=9, color=FAINT)
    axis.set_ylabel("seconds in layers", fontsize=9, color=FAINT)
    axis.xaxis.set_major_locator(require("matplotlib.ticker", "cli").MaxNLocator(integer=True))
    axis.legend(loc="lower right", frameon=False, fontsize=8.5, ncols=2)
    return figure


def densities(executed: Executed) -> Any:
    """A heat map: executed density by layer and head (rows) and denoising step (columns)."""
    count, heads = len(executed.density[0]), len(executed.density[0][0])
    rows = [[step[layer][head] for step in executed.density] for layer in range(count) for head in range(heads)]
    tall = max(1.6, min(7.0, 0.22 * len(rows)))
    written = ".2f" if len(executed.density) <= 24 and len(rows) <= 24 else ""
    figure, axis = density_map(rows, width=_WIDTH, tall=tall, written=written)
    for layer in range(1, count):
        axis.axhline(layer * heads - 0.5, color="white", linewidth=1.4)
    shown = range(0, count, max(1, -(-count // 20)))
    axis.set_yticks([layer * heads + (heads - 1) / 2 for layer in shown], [f"layer {layer}" for layer in shown])
    axis.set_xlabel(f"denoising step; {heads} heads in each layer", fontsize=9, color=FAINT)
    return figure


def roofline(found: Latency) -> Any:
    """What each part reaches, over the FLOPs it does for each byte that its operators read and write."""
    assert found.rates is not None
    rates = found.rates
    figure = new_figure(_WIDTH, 4.0)
    axis = axis_at(figure, (0.85, 0.6, _WIDTH - 3.3, 3.15), grid="both")
    seen: list[float] = []
    for kind, mark in (("dense", "o"), ("sparse", "s")):
        work, measured = found.work.get(kind, {}), found.parts(kind)  # type: ignore[arg-type]
        for part, flops in found.flops(kind).items():  # type: ignore[arg-type]
            touched = work[part].touched if part in work else 0.0
            if flops <= 0.0 or touched <= 0.0 or measured[part] <= 0.0 or part not in _POINTS:
                continue
            x = flops / touched
            label = f"{part}, {kind}"
            axis.plot([x], [flops / measured[part] / 1e9], marker=mark, color=COLORS[part], markersize=8,
                      linestyle="none", markeredgecolor=INK, markeredgewidth=0.6, label=label)  # fmt: skip
            seen.append(x)
    low, high = min([*seen, 0.5]) / 3, max([*seen, 50.0]) * 3
    top, slope = rates.products.flops / 1e9, rates.memory / 1e9
    axis.plot([low, top / slope, high], [low * slope, top, top], color=INK, linewidth=1.4, label="memory, products")
    for name, rate, color in (("full attention", rates.dense, "#7c8794"), ("sparse kernel", rates.sparse, "#0b5cad")):
        axis.axhline(rate.flops / 1e9, color=color, linewidth=1.0, linestyle=(0, (4, 3)), label=f"rate of {name}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_xlabel("FLOPs for each byte that operators read and write", fontsize=9, color=FAINT)
    axis.set_ylabel("GFLOP/s", fontsize=9, color=FAINT)
    handles, labels = axis.get_legend_handles_labels()
    place = ((_WIDTH - 2.35) / _WIDTH, 3.8 / 4.0)
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=place, frameon=False, fontsize=8.5)
    return figure
