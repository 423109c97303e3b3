"""What there is to say about a method: the same words for the documents and for the ``vsparse methods`` command."""

from __future__ import annotations

import dataclasses as dc
import inspect
import re

from vsparse.methods import Method
from vsparse.methods.published import MODELS, Setting, published
from vsparse.schedule import Schedule

__all__ = ["LETTERS", "Facts", "facts", "setting_words"]

LETTERS = (
    "B samples, H heads, D head dimension, N tokens, V video tokens, S slots,\n"
    "K video tiles (svg2: key clusters), Q query clusters, P density of the static map"
)
"""What the letters of `Facts.cost` mean."""


@dc.dataclass(frozen=True, kw_only=True)
class Facts:
    """One method in words.

    Args:
        summary: What it does: the docstring up to its arguments. arguments, notes: the rest of the docstring, what its
            options mean, and its schedule and differences from the source.
        source, link: Title and address of the paper; the address may be empty. use: "trained" or "training-free".
        options: Fields with their defaults. schedule: the default one. needs: what a site must offer.
        cost: FLOPs of a search. advice: when to use it. published: setting on each model.
    """

    key: str
    summary: str
    arguments: str
    notes: str
    source: str
    link: str
    use: str
    options: dict[str, str]
    schedule: str
    needs: str
    cost: str
    advice: str
    published: dict[str, str]


def facts(key: str, method: type[Method]) -> Facts:
    """The facts of a method that is registered under a key."""
    summary, arguments, notes = _parts(inspect.getdoc(method) or "")
    paper, settings = method.paper, published(key) if method.__module__.startswith("vsparse.") else {}
    return Facts(
        key=key,
        summary=summary,
        arguments=arguments,
        notes=notes,
        source=paper.title,
        link=f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else "",
        use="trained" if paper.trained else "training-free",
        options={f.name: repr(f.default) for f in dc.fields(method)},
        schedule=_changed(method.default_schedule) or _unchanged(method.default_schedule),
        needs=", ".join(sorted(method.requires)) or "nothing",
        cost=_cost(method),
        advice=method.advice,
        published={model: setting_words(settings[model]) if model in settings else "" for model in MODELS},
    )


def _cost(method: type[Method]) -> str:
    """The formula of the search, or that there is none."""
    return "none: nothing is searched" if method.search_cost == "0" else method.search_cost


def setting_words(setting: Setting) -> str:
    """``density=0.2; dense_steps=0.1 (a note)``."""
    given = ", ".join(f"{name}={value!r}" for name, value in setting.options.items())
    parts = [given, "" if setting.schedule is None else f"Schedule({_changed(setting.schedule)})"]
    words = "; ".join(part for part in parts if part)
    return " ".join(part for part in (words, f"({setting.note})" if setting.note else "") if part)


def _changed(value: object) -> str:
    """The fields of a dataclass that differ from their defaults."""
    fields = {f.name: getattr(value, f.name) for f in dc.fields(value) if getattr(value, f.name) != f.default}  # type: ignore[arg-type]
    return ", ".join(f"{name}={given!r}" for name, given in fields.items())


def _unchanged(schedule: Schedule) -> str:
    return "sparse in every layer and step" if schedule == Schedule() else str(schedule)


def _parts(text: str) -> tuple[str, str, str]:
    """Paragraphs before the arguments, the arguments, paragraphs after them; without arguments all is summary."""
    head, found, rest = text.partition("\nArgs:\n")
    if not found:
        head, found, rest = text.partition("\nSchedule:")
        return head.strip(), "", (found + rest).strip()
    block = re.match(r"(?:(?:[ ]+[^\n]*)?(?:\n|$))*", rest)
    end = 0 if block is None else block.end()
    return head.strip(), inspect.cleandoc(rest[:end]), rest[end:].strip()
