"""The profiles that come with vsparse, or one of your own: what each is for, does, and would compute."""

from __future__ import annotations

import dataclasses as dc
import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import vsparse
from vsparse.cost import phases
from vsparse.measure.embedded import embedded_path
from vsparse.measure.facts import facts
from vsparse.measure.skeleton import built, skeleton
from vsparse.methods import Method
from vsparse.optional import require
from vsparse.planning import Plan
from vsparse.profile import Model, Profile, shipped
from vsparse.schedule import Phase

__all__ = ["UNMEASURED", "Entry", "entries", "entry", "page", "profiles_table", "schedule_words", "usage"]

UNMEASURED = "published, not measured here"
_NONE = "\u2013"
_PHASES: dict[Phase, str] = {
    "dense": "full attention",
    "search": "the map is searched",
    "refresh": "the map is searched again",
    "reuse": "the last map is used again",
    "output": "the last output is given again",
}


@dc.dataclass(frozen=True, kw_only=True)
class Entry:
    """A profile and its plan on a model without weights.

    Args:
        file: What names it, after ``--method`` and in ``vsparse.apply``. models: the checkpoints that it names; the
            folder of the embedded one where it names none and has its shape.
    """

    profile: Profile
    plan: Plan
    file: str
    models: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the file, without the suffix."""
        return self.profile.name

    @property
    def figures(self) -> str:
        """Whether they were measured."""
        return "measured" if self.profile.measured else UNMEASURED


def entry(given: str, *, known: dict[str, Any] | None = None) -> Entry:
    """A profile by the name of a shipped one, or by its file.

    Args:
        known: Models without weights by name, to use again and to add to.

    Raises:
        FileNotFoundError: neither. ValueError: as of `Profile.read`, or it does not fit the model that it names.
    """
    file = f"profiles/{given}.toml" if given in shipped() else given
    profile = Profile.read(file)
    named = profile.provenance.get("models", ())
    models = tuple(str(name) for name in named) if isinstance(named, Sequence) and not isinstance(named, str) else ()
    if not models and _is_embedded(profile.model):
        models = (str(embedded_path()),)
    target = _target(profile.model, models, {} if known is None else known)
    return Entry(profile=profile, plan=vsparse.plan(target, profile), file=file, models=models)


def entries() -> list[Entry]:
    """All that come with vsparse."""
    known: dict[str, Any] = {}
    return [entry(name, known=known) for name in shipped()]


def _is_embedded(model: Model) -> bool:
    config = json.loads((embedded_path() / "transformer" / "config.json").read_text())
    shape = tuple(config[name] for name in ("_class_name", "num_layers", "num_attention_heads", "attention_head_dim"))
    return shape == (model.name, model.layers, model.heads, model.head_dim)


def _target(model: Model, models: Sequence[str], known: dict[str, Any]) -> Any:
    """The first model that it names; else its class with the layers and heads that it gives."""
    if not models:
        return built(model.name, layers=model.layers, heads=model.heads, head_dim=model.head_dim)
    if models[0] not in known:
        known[models[0]] = skeleton(models[0])
    return known[models[0]]


# ---- in words ----------------------------------------------------------------------------------------------------


def schedule_words(made: Plan, steps: int) -> list[str]:
    """What runs in which layers, from 0 as in the file, and in which steps, from 1: ``layers 1-39: steps 1-15 ...``."""
    root = made.sites[0].root
    ran = [(site, tuple(phases(made.method, made.schedule, site, steps=steps))) for site in made.sites]
    mine = [(site, found) for site, found in ran if site.root == root]
    lines = []
    for (found, method), group in itertools.groupby(mine, lambda one: (one[1], made.method.of(one[0]))):
        numbers = [site.layer for site, _ in group]
        lines.append(f"{_span('layer', numbers[0], numbers[-1])}: {_steps(found, method)}")
    return lines


def _steps(found: Sequence[Phase], method: Method) -> str:
    if set(found) == {"dense"}:
        return "full attention in every step"
    parts, first = [], 1
    for phase, group in itertools.groupby(found):
        last = first + len(list(group)) - 1
        words = _PHASES[phase]
        if phase == "search" and not method.state_phases:
            words = "sparse"
        elif phase != "dense" and phase in method.exact_phases:
            words = f"full attention, and {words}"
        parts.append(f"{_span('step', first, last)} {words}")
        first = last + 1
    return "; ".join(parts)


def _span(word: str, first: int, last: int) -> str:
    return f"{word} {first}" if first == last else f"{word}s {first}-{last}"


def _options(made: Plan) -> list[str]:
    """Options by layers where these differ, those that are not the method's default marked."""
    root = made.sites[0].root
    lines: list[str] = []
    mine = [site for site in made.sites if site.root == root]
    kinds = [(method, [*group]) for method, group in itertools.groupby(mine, made.method.of)]
    for method, sites in kinds:
        usual = type(method)()
        told = []
        for field in dc.fields(method):
            value = getattr(method, field.name)
            told.append(f"{field.name} = {value!r}" + ("" if value == getattr(usual, field.name) else " *"))
        if len(kinds) > 1:
            lines.append(f"{_span('layer', sites[0].layer, sites[-1].layer)}: {method.key}")
        lines += told or ["none"]
    return lines


def usage(found: Entry) -> list[str]:
    """The lines that use it: in Python, and on the command line."""
    model, size = (found.models or ("./my-model",))[0], found.profile.size
    pixels = f"--height {size.height} --width {size.width} --frames {size.frames} --steps {size.steps}"
    return [
        f"vsparse.apply(pipe, {json.dumps(found.file)})",
        f'vsparse generate {shlex.quote(model)} --prompt "..." --method {shlex.quote(found.file)} {pixels}',
    ]


# ---- tables ------------------------------------------------------------------------------------------------------


def _table(*columns: str) -> Any:
    table = require("rich.table", "cli").Table(show_header=bool(columns), caption_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def profiles_table(found: Sequence[Entry]) -> Any:
    """A line for each."""
    table = _table("profile", "video", "method", "density", "in all", "figures")
    table.box, table.padding, table.pad_edge = require("rich.box", "cli").SIMPLE_HEAD, (0, 1, 0, 0), False
    for one in found:
        cost, size = one.plan.cost, one.profile.size
        assert cost is not None
        table.add_row(
            f"[bold]{one.name}[/bold]",
            f"{size.height}x{size.width}x{size.frames}",
            ", ".join(sorted({one.plan.method.of(site).key for site in one.plan.sites})),
            f"{cost.sparse_density:.3f}",
            f"{cost.density:.3f}",
            "measured" if one.profile.measured else "published",
        )
    for column in table.columns:
        column.no_wrap = True
    table.caption = (
        "density: share of the query-key pairs that a sparse call computes, predicted; in all: over the generation, "
        "dense steps and layers included. What was published was not measured here. Everything of one, and how to use "
        "it: vsparse profiles NAME"
    )
    return table


def page(found: Entry) -> Any:
    """Everything of one."""
    profile, made = found.profile, found.plan
    method = type(made.method.of(made.sites[-1]))
    known, grid, cost = facts(method.key, method), made.grid, made.cost
    assert grid is not None
    assert cost is not None
    text = f" and {grid.text} of text" if grid.text else ""
    rows = {
        "what it does": profile.about,
        "for": "\n".join((str(profile.model), *found.models)),
        "video": f"{profile.size}: {grid.t} x {grid.h} x {grid.w} = {grid.video:,} tokens{text}",
        "method": f"{made.method.key}: {known.source} {known.link}".strip(),
        "options (*: not the default)": "\n".join(_options(made)),
        "schedule (layers from 0)": "\n".join(schedule_words(made, profile.size.steps)),
        "predicted density": f"{cost.sparse_density:.3f} of a sparse call, {cost.density:.3f} over the generation",
        "figures": found.figures,
        "where it is from": "\n".join(_lines({x: y for x, y in profile.provenance.items() if x != "models"})),
        "use it": "\n".join(usage(found)),
        "elsewhere": "Another model is refused. A video of another size is made, with a warning: densities are shares "
        "and carry over, windows and tiles stay as they are."
        + (" Other weights of this shape: a warning." if profile.model.weights else ""),
    }
    table, plain = _table(), require("rich.text", "cli").Text
    for name, words in rows.items():
        table.add_row(name, plain(words or _NONE))
    table.title, table.title_justify = found.name, "left"
    return table


def _lines(table: Mapping[str, Any], inside: str = "") -> list[str]:
    """A line for each value, those of tables after their names."""
    found = []
    for name, value in table.items():
        if isinstance(value, Mapping):
            found += _lines(value, f"{inside}{name}, ")
        else:
            found.append(f"{inside}{name}: {_plain(value)}")
    return found


def _plain(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "; ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)
