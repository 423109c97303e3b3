"""The tables that the ``vsparse`` command prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vsparse.measure import doctor
from vsparse.measure.facts import LETTERS, facts
from vsparse.optional import require

if TYPE_CHECKING:
    from vsparse.measure.demo import Run
    from vsparse.methods import Method
    from vsparse.planning import Plan

__all__ = ["demo_table", "method_pages", "methods_table", "ops_table", "packages_table", "plan_table", "stats_table"]

NONE = "\u2013"


def _table(title: str = "", *columns: str, numbers: Sequence[str] = ()) -> Any:
    table = require("rich.table", "cli").Table(title=title or None, title_justify="left", show_header=bool(columns))
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return table


def demo_table(runs: Sequence[Run]) -> Any:
    """Time, density and quality of the runs of a demo."""
    numbers = ("s", "density", "sparse", "PSNR", "SSIM", "seen")
    table = _table("Same prompt, same seed", "run", *numbers, numbers=numbers)
    table.columns[0].no_wrap = True
    for run in runs:
        sparse = None if run.stats is None else run.stats["sparse_density"]
        row = [run.name, f"{run.seconds:.1f}", f"{run.density:.3f}", NONE if sparse is None else f"{sparse:.3f}"]
        if run.quality is None:
            row += [NONE, NONE]
        elif run.quality.identical:
            row += ["equal", "1.000"]
        else:
            row += [f"{run.quality.psnr:.1f}", f"{run.quality.ssim:.3f}"]
        table.add_row(*row, NONE if run.shows is None else f"{run.shows.right}/5")
    table.caption = (
        "density: executed share of query-key pairs over all calls, dense steps included; sparse: of the sparse calls "
        "alone. PSNR (dB) and SSIM: against the dense run. floor: every pair computed, "
        "by the host and by our kernel. seen: of colour, shape, direction, ground and one steady object, those that a "
        "program finds in the clip as the prompt has them."
    )
    table.caption_justify = "left"
    return table


def stats_table(stats: Mapping[str, Any]) -> Any:
    """What a patch has run."""
    table = _table()
    density, sparse = stats["density"], stats["sparse_density"]
    fallbacks = [f"{why} ({count} calls)" for why, count in stats["fallbacks"].items()]
    table.add_row("density over all calls", NONE if density is None else f"{density:.4f}")
    table.add_row("density of sparse calls", "none ran" if sparse is None else f"{sparse:.4f}")
    table.add_row("calls by phase", ", ".join(f"{phase} {count}" for phase, count in stats["calls"].items()) or "none")
    table.add_row("kernel", str(stats["kernel"]))
    table.add_row("ran dense because of", "\n".join(fallbacks) or "nothing")
    return table


def plan_table(made: Plan, target: str) -> Any:
    """What a method would do to a target."""
    table = _table()
    table.title = f"{made.method.key} on {target}"
    shapes = ", ".join(f"{h} heads of {d}" for h, d in sorted({(site.heads, site.head_dim) for site in made.sites}))
    table.add_row("method", str(made.method))
    table.add_row("schedule", str(made.schedule))
    table.add_row("attention layers", f"{len(made.sites)} ({shapes})" if made.sites else "none")
    table.add_row("kernel here", made.kernel or "none")
    table.add_row("new parameters", f"{made.new_parameters:,}")
    if made.grid is not None and made.cost is not None:
        grid, cost = made.grid, made.cost
        text = f" + {grid.text} text" if grid.text else ""
        table.add_row("tokens", f"{grid.t} \u00d7 {grid.h} \u00d7 {grid.w} = {grid.video:,}{text}")
        table.add_row("density", f"{made.density:.4f} in a sparse call, {cost.density:.4f} over all calls")
        table.add_row("attention FLOPs, dense", f"{cost.dense:.3e}")
        table.add_row("sparse, padding included", f"{cost.sparse:.3e} ({cost.sparse / cost.dense:.1%})")
        table.add_row("of these, to find maps", f"{cost.search:.3e}")
        table.add_row("state kept", f"{(made.state_bytes or 0) / 2**20:.1f} MiB")
    return table


def methods_table(methods: Mapping[str, type[Method]]) -> Any:
    """The registry: what there is and when to use it."""
    table = _table("", "key", "use", "when")
    for key, method in methods.items():
        known = facts(key, method)
        table.add_row(f"[bold]{key}[/bold]", known.use, known.advice or NONE)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.caption = (
        "What one does and costs, its options and their defaults, its source and what its authors publish for which "
        "model: vsparse methods KEY"
    )
    table.caption_justify = "left"
    return table


def method_pages(key: str, method: type[Method]) -> list[Any]:
    """One method whole: what it does, its facts, its options, its settings on models, and what differs."""
    known = facts(key, method)
    text = require("rich.text", "cli").Text
    table = _table()
    rows = {
        "when": known.advice,
        "use": known.use,
        "source": f"{known.source} {known.link}".strip(),
        "options and defaults": "\n".join(f"{name} = {value}" for name, value in known.options.items()) or "none",
        "default schedule": known.schedule,
        "needs of a site": known.needs,
        "cost of a search": known.cost if known.cost.startswith("none") else f"{known.cost} FLOPs\n{LETTERS}",
        **{f"published, {model}": words or "not published" for model, words in known.published.items()},
    }
    for name, words in rows.items():
        table.add_row(name, text(words or NONE))
    parts = [text(known.summary), "", table]
    if known.arguments:
        parts += ["", text("Options", style="bold"), text(known.arguments)]
    return [*parts, "", text(known.notes)] if known.notes else parts


def packages_table(packages: Sequence[doctor.Package]) -> Any:
    """What is installed, and which extra brings what is not."""
    table = _table()
    for package in packages:
        hint = f'not installed: pip install "vsparse\\[{package.extra}]"' if package.extra else "not installed"
        table.add_row(package.name, package.version or f"[yellow]{hint}[/yellow]")
    return table


def ops_table(verdicts: Sequence[doctor.Verdict]) -> Any:
    """Which implementation serves each op on each kind of device."""
    kinds = list(dict.fromkeys(verdict.device for verdict in verdicts))
    table = _table("", "op", *kinds)
    for op in dict.fromkeys(verdict.op for verdict in verdicts):
        mine = [verdict for verdict in verdicts if verdict.op == op]
        table.add_row(op, *(doctor.summary([v for v in mine if v.device == kind]) for kind in kinds))
    return table
