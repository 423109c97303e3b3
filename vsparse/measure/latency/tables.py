"""A latency measurement as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vsparse.measure.latency.ahead import Times
from vsparse.measure.latency.figures import COST_GOAL, GAP_GOAL, Latency
from vsparse.measure.latency.intervals import Interval
from vsparse.measure.latency.layer import Layer, Measured
from vsparse.measure.latency.model import LOW
from vsparse.measure.latency.rates import Rates
from vsparse.measure.latency.rounds import Kind
from vsparse.measure.latency.timeline import PARTS, SELF_ATTENTION
from vsparse.optional import require

__all__ = [
    "KINDS",
    "baseline_rows",
    "baselines_table",
    "between",
    "layer_rows",
    "layer_table",
    "layer_words",
    "parts_table",
    "phases_table",
    "predicted_rows",
    "predicted_table",
    "rates_words",
    "refused_lines",
    "sentences",
    "times_table",
    "whole_rows",
    "whole_table",
]

KINDS: tuple[Kind, Kind] = ("dense", "sparse")
_NONE = "\u2013"


def between(found: Interval, form: str = ".2f") -> str:
    """``1.23 (1.20 to 1.27)``."""
    return f"{found.median:{form}} ({found.low:{form}} to {found.high:{form}})"


def _table(title: str, *columns: str) -> Any:
    table = require("rich.table", "cli").Table(title=title, title_justify="left", caption_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def whole_rows(found: Latency) -> list[list[str]]:
    """Whole generations, and how far the profile can be trusted: a name, dense, sparse."""
    executed, density = found.executed, found.executed.density
    steps, layers = len(density), len(density[0]) if density else 0
    peaks = [found.peak(kind) for kind in KINDS]
    rows = [
        ["generation, s", *(between(found.seconds(kind)) for kind in KINDS)],
        ["slowest less fastest", *(f"{found.spread(kind):.1%}" for kind in KINDS)],
        [f"claimed by no part (goal {GAP_GOAL:.0%})", *(between(found.gap(kind), ".1%") for kind in KINDS)],
        [f"cost of profiling (goal {COST_GOAL:.0%})", *(between(found.cost(kind), ".1%") for kind in KINDS)],
        ["executed density", "1", f"{found.density:.3f}"],
        ["dense steps", f"{steps} of {steps}", f"{executed.dense_steps} of {steps}"],
        ["dense layers", f"{layers} of {layers}", f"{executed.dense_layers} of {layers}"],
    ]
    if None not in peaks:
        rows.append(["most GPU memory, GiB", *(f"{(peak or 0) / 2**30:.2f}" for peak in peaks)])
    return rows


def whole_table(found: Latency) -> Any:
    """`whole_rows`."""
    table = _table(f"{found.pipeline}, {found.method}", "", *KINDS)
    for row in whole_rows(found):
        table.add_row(*row)
    table.caption = (
        f"{found.rounds} rounds in turn: median, and an interval that covers it with a chance of "
        f"{found.speed.coverage:.0%}"
    )
    return table


def parts_table(found: Latency) -> Any:
    """Seconds and share of each part of the typical run."""
    table = _table("Where the time goes", "seconds", "dense", "share", "sparse", "share", "sparse, all rounds")
    dense, sparse = (found.parts(kind) for kind in KINDS)
    whole = [found.typical(kind).seconds for kind in KINDS]

    def row(name: str, parts: Sequence[str], spread: str = "", style: str = "") -> None:
        a, b = (sum(x[part] for part in parts) for x in (dense, sparse))
        table.add_row(name, f"{a:.3f}", f"{a / whole[0]:.1%}", f"{b:.3f}", f"{b / whole[1]:.1%}", spread, style=style)

    row("self-attention", SELF_ATTENTION, style="bold")
    for part in PARTS:
        if dense[part] or sparse[part]:
            name = f"  {part}" if part in SELF_ATTENTION else part
            row(name, [part], between(found.part("sparse", part), ".3f"))
    row("sum", PARTS, style="bold")
    table.caption = (
        "The profiled generation of median length, whose parts add up to the clock around it. rest: what no part "
        "claims, such as guidance and Python between the models."
    )
    return table


def phases_table(found: Latency) -> Any:
    """One call of a layer by phase."""
    lines = [(kind, line) for kind in KINDS for line in found.phases(kind)]
    names = ["not patched" if kind == "dense" else line.phase for kind, line in lines]
    table = _table("Self-attention of one layer in one call", "ms", *names)
    table.add_row("calls in a generation", *(str(line.calls) for _, line in lines))
    table.add_row("self-attention", *(f"{1e3 * line.seconds:.2f}" for _, line in lines), style="bold")
    for part in SELF_ATTENTION:
        if any(part in line.parts for _, line in lines):
            cells = [f"{1e3 * line.parts[part]:.2f}" if part in line.parts else _NONE for _, line in lines]
            table.add_row(f"  {part}", *cells)
    return table


def predicted_rows(found: Latency) -> list[list[str]]:
    """Part by part: predicted, measured, and the error of the prediction, dense and sparse."""
    both = [{row.part: row for row in found.predictions(kind)} for kind in KINDS]
    lines = []
    for part in (*PARTS, "sum"):
        cells: list[str] = []
        for rows in both:
            row = rows.get(part)
            cells += [_NONE] * 3 if row is None else [f"{row.seconds:.3f}", f"{row.measured:.3f}", f"{row.error:+.0%}"]
        if any(cell != _NONE for cell in cells):
            lines.append([part, *cells])
    return lines


def predicted_table(found: Latency) -> Any:
    """`predicted_rows`."""
    head = ("dense", "measured", "error", "sparse", "measured", "error")
    table = _table("What the cost model predicts", "seconds", *head)
    for row in predicted_rows(found):
        table.add_row(*row, style="bold" if row[0] == "sum" else "")
    table.caption = rates_words(found)
    return table


def rates_words(found: Latency) -> str:
    """Where the rates come from."""
    return "" if found.rates is None else _measured_words(found.rates)


def _measured_words(rates: Rates) -> str:
    return (
        f"Rates of this machine in {rates.dtype}, measured {rates.date[:10]}: {rates.products.flops / 1e9:.3g} GFLOP/s "
        f"for products, {rates.dense.flops / 1e9:.3g} for full and {rates.sparse.flops / 1e9:.3g} for sparse "
        f"attention, {rates.memory / 1e9:.3g} GB/s of memory, {rates.call * 1e6:.2g} us for an operator."
    )


def sentences(found: Latency) -> list[str]:
    """What follows from the figures."""
    said = [found.verdict[0].upper() + found.verdict[1:] + "."]
    said.append(
        f"Bounds: the attention kernel is {found.attention_share:.0%} of a dense generation. At the executed density a "
        f"generation can be at most {found.amdahl:.2f} times as fast, without any attention {found.limit:.2f} times."
    )
    if found.floor is not None:
        said.append(f"Floor: a dense generation took {between(found.floor)} times as long as the one before it.")
    goals = (("what no part claims", found.gap, GAP_GOAL), ("the cost of profiling", found.cost, COST_GOAL))
    for kind in KINDS:
        for name, figure, goal in goals:
            seen = figure(kind)
            word = "" if seen.high <= goal else "Missed" if seen.low > goal else "Not shown"
            if word:
                said.append(f"{word}: {name} of the {kind} runs is {between(seen, '.1%')}, the goal is {goal:.0%}.")
    return said


def layer_rows(found: Layer) -> tuple[list[str], list[list[str]]]:
    """Head and rows of `layer_table`: the parts of a phase are indented."""
    machines = list(found.predicted)
    errors = found.errors(machines[0])
    rows = []
    for phase in found.predicted[machines[0]]:
        wholes = [_time(sum(found.predicted[x][phase].values())) for x in machines]
        measured = _NONE if found.measured is None else _times(found.measured.whole[phase])
        error = f"{errors[phase]:+.0%}" if phase in errors else _NONE
        rows.append(["full attention" if phase == "dense" else phase, *wholes, measured, error])
        for part in PARTS:
            cells = [found.predicted[x][phase].get(part) for x in machines]
            seen = None if found.measured is None else found.measured.parts[phase].get(part)
            if phase != "dense" and (any(cells) or seen is not None):
                told = [_NONE if x is None else _time(x) for x in cells]
                rows.append([f"  {part}", *told, _NONE if seen is None else _times(seen), ""])
    return ["one call", *machines, "measured", "error"], rows


def layer_words(found: Layer) -> str:
    """What was predicted and measured, in words."""
    grid = found.case.grid
    return (
        f"{grid.t} x {grid.h} x {grid.w} tokens{f' and {grid.text} of text' if grid.text else ''}, {found.case.heads} "
        f"heads of {found.case.head_dim}, one sample, {found.dtype} here; predicted density of a sparse call "
        f"{found.density:.3f}. Measured on noise, without what a method adds after the attention."
    )


def layer_table(found: Layer) -> Any:
    """One attention layer: predicted by machine, measured, and the error of the first prediction."""
    head, rows = layer_rows(found)
    table = _table(f"{found.case.name}: {found.method}", *head)
    for row in rows:
        table.add_row(*row, style="" if row[0].startswith(" ") else "bold")
    table.caption = layer_words(found)
    return table


def _assumed_words(rates: Rates) -> str:
    full, some = (x.origin.removeprefix("assumed: ").partition(";")[0] for x in (rates.dense, rates.sparse))
    return f"{rates.device}, never measured: for full attention {full}, for sparse {some}."


def times_table(found: Sequence[Times], method: str) -> Any:
    """A step of a plan: full attention and a method by machine, and what bounds the gain."""
    table = _table("Predicted time of a step, mean over the generation", "", *(one.machine.name for one in found))

    def row(name: str, seconds: Callable[[Times], tuple[float, float] | None], *, bold: bool = False) -> None:
        both = [seconds(one) for one in found]
        style = "bold" if bold else ""
        table.add_row(f"{name}, full attention", *(_NONE if x is None else _time(x[0]) for x in both), style=style)
        cells = [_NONE if x is None else f"{_time(x[1])} ({x[0] / x[1]:.2f} times)" for x in both]
        table.add_row(f"{name}, {method}", *cells, style=style)

    row("self-attention", lambda one: (one.dense, one.sparse))
    if any(one.rest is not None for one in found):
        table.add_row("the rest of the transformer", *(_NONE if one.rest is None else _time(one.rest) for one in found))
        row("step", lambda one: one.steps, bold=True)
        bounds = [_NONE if one.share is None else f"{1.0 / (1.0 - one.share):.2f} times" for one in found]
        table.add_row("step without any self-attention", *bounds)
    words = [_measured_words(x) if x.date else _assumed_words(x) for x in (one.machine.rates for one in found)]
    kernel, whole = LOW
    words.append(
        f"A lower estimate: on the embedded model the attention kernel came out {kernel[0]:.0%} (dense) and "
        f"{kernel[1]:.0%} (sparse) too low, the sum {whole[0]:.0%} and {whole[1]:.0%} (docs/latency.md). Uncompiled, "
        "without what a method adds after the attention."
    )
    table.caption = " ".join(words)
    return table


def baseline_rows(found: Measured) -> tuple[list[str], list[list[str]]]:
    """Head and rows of `baselines_table`."""
    rows = [
        [name, _times(one.seconds), between(one.ratio) if name != found.fastest else _NONE]
        for name, one in found.baselines.items()
        if one.seconds is not None and one.ratio is not None
    ]
    return ["", "one call", "over the fastest"], rows


def baselines_table(found: Measured) -> Any:
    """Every dense attention that ran: its time, and that over the time of the fastest."""
    head, rows = baseline_rows(found)
    table = _table("Dense attention on the same q, k and v, in the same rounds", *head)
    for row in rows:
        table.add_row(*row)
    return table


def refused_lines(found: Measured) -> list[str]:
    """Why each of the others was not measured."""
    return [f"{name}: not measured: {one.refused}" for name, one in found.baselines.items() if one.refused]


def _time(seconds: float) -> str:
    """In s from one second on, else in ms."""
    if seconds < 1.0:
        return f"{1e3 * seconds:.4g} ms"
    return f"{seconds:.4g} s" if seconds < 1e4 else f"{seconds:,.0f} s"


def _times(found: Interval) -> str:
    """``164 ms (163 to 235)`` in the unit of the median."""
    factor, unit = (1.0, "s") if found.median >= 1.0 else (1e3, "ms")
    middle, low, high = (f"{factor * x:.3g}" for x in (found.median, found.low, found.high))
    return f"{middle} {unit} ({low} to {high})"
