"""Reading what was typed on the command line."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from vsparse.methods import Method, get_method
from vsparse.schedule import Schedule

__all__ = ["method", "schedule", "settings", "sizes"]


def sizes(text: str, name: str) -> tuple[int, int, int]:
    """``5x16x16`` -> (5, 16, 16).

    Raises:
        ValueError: it is not three whole numbers; ``name`` says whose value it was.
    """
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"{name} must be 3 whole numbers such as 5x16x16, got {text!r}")
    t, h, w = (int(part) for part in parts)
    return t, h, w


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``["density=0.2", "tile=4x4x4"]`` -> the fields of a method; values are Python literals, lattices or words.

    Raises:
        ValueError: not of the form name=value, or a name twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set takes name=value, such as density=0.2; got {pair!r}")
        if name in found:
            raise ValueError(f"--set {name} is given twice")
        found[name] = _value(text)
    return found


def _value(text: str) -> Any:
    lattice = text.lower().split("x")
    if len(lattice) > 1 and all(part.isdigit() for part in lattice):
        return tuple(int(part) for part in lattice)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "nan": float("nan"), "inf": float("inf")}.get(text.lower(), text)


def method(key: str, pairs: Sequence[str]) -> Method:
    """The method of a registry key with options as typed.

    Raises:
        ValueError: no such method or option, or a value out of range.
    """
    return get_method(key)().replace(**settings(pairs))


def schedule(chosen: Method, dense_steps: float | None, dense_layers: int | None, search_at: str | None) -> Schedule:
    """The method's published schedule, changed where something was typed.

    Raises:
        ValueError: ``search_at`` is not numbers and commas, or the schedule contradicts itself.
    """
    published = chosen.default_schedule
    if dense_steps is None and dense_layers is None and search_at is None:
        return published
    searches = published.search_at
    if search_at is not None:
        try:
            searches = tuple(float(share) for share in search_at.split(","))
        except ValueError as error:
            raise ValueError(f"--search-at must be shares such as 0.2,0.6; got {search_at!r}") from error
    return Schedule(
        dense_steps=published.dense_steps if dense_steps is None else dense_steps,
        dense_layers=published.dense_layers if dense_layers is None else dense_layers,
        search_at=searches,
        ramp=published.ramp,
    )
