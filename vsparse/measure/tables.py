"""The tables that the ``vsparse`` command prints."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vsparse.measure import doctor
from vsparse.optional import require

if TYPE_CHECKING:
    from vsparse.measure.demo import Run
    from vsparse.methods import Method
    from vsparse.planning import Plan

__all__ = ["demo_table", "methods_table", "ops_table", "packages_table", "plan_table", "stats_table"]

NONE = "\u2013"


def _table(title: str = "", *columns: str, numbers: Sequence[str] = ()) -> Any:
    table = require("rich.table", "cli").Table(title=title or None, title_justify="left", show_header=bool(columns))
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return table


def demo_table(runs: Sequence[Run]) -> Any:
    """Time, density and quality of the runs of a demo."""
    numbers = ("seconds", "density", "sparse calls", "PSNR dB", "worst frame", "SSIM")
    table = _table("Same prompt, same seed", "run", *numbers, numbers=numbers)
    for run in runs:
        sparse = None if run.stats is None else run.stats["sparse_density"]
        row = [run.name, f"{run.seconds:.1f}", f"{run.density:.3f}", NONE if sparse is None else f"{sparse:.3f}"]
        if run.quality is None:
            row += ["reference", "", ""]
        elif run.quality.identical:
            row += ["equal", "equal", "1.0000"]
        else:
            row += [f"{run.quality.psnr:.1f}", f"{run.quality.worst_psnr:.1f}", f"{run.quality.ssim:.4f}"]
        table.add_row(*row)
    table.caption = (
        "density: executed share of query-key pairs over all calls, dense steps included; beside it that of the sparse "
        "calls alone. PSNR and SSIM: against the dense run. floor: every pair computed, by the host and by our kernel."
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
    """The registry."""
    table = _table("", "key", "paper", "use", "options", "schedule")
    table.columns[3].no_wrap, table.show_lines = True, True
    for key, method in methods.items():
        paper, schedule = method.paper, method.default_schedule
        options = [f"{f.name} = {f.default!r}" for f in dc.fields(method)]
        values = [(f.name, getattr(schedule, f.name), f.default) for f in dc.fields(schedule)]
        told = [f"{name} = {value!r}" for name, value, default in values if value != default]
        needs = [f"needs {name}" for name in sorted(method.requires)]
        table.add_row(
            f"[bold]{key}[/bold]",
            f"{paper.title}\narXiv {paper.arxiv}" if paper.arxiv else paper.title,
            "\n".join(["trained" if paper.trained else "training-free", *needs]),
            "\n".join(options) or "none",
            "\n".join(told) or "always sparse",
        )
    table.caption = "options and schedule: with their defaults, as published"
    table.caption_justify = "left"
    return table


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
