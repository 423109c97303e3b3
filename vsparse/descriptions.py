"""Methods and schedules as TOML: the form in which adapters and profiles hold them."""

from __future__ import annotations

import dataclasses as dc
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from vsparse.optional import require
from vsparse.schedule import Schedule

__all__ = ["from_toml", "schedule_fields", "to_toml", "with_none"]

_NUMBERS = re.compile(r"\[\n(?: +-?[0-9.e+-]+,\n)+ *\]")
_WIDTH = 110


def schedule_fields(schedule: Schedule) -> dict[str, Any] | None:
    """The fields of a schedule but for its ramp, which belongs to a training run.

    None for a method's default of another kind: it says what fields do not, and is found again by not being there.
    """
    if type(schedule) is not Schedule:
        return None
    return {name: value for name, value in dc.asdict(schedule).items() if name != "ramp"}


def to_toml(config: Mapping[str, Any], what: str) -> str:
    """A description as text, which is read back to see that nothing was lost.

    Args:
        config: Numbers, strings, None, tuples and tables of them. what: whose it is, for the error.

    Raises:
        ValueError: something has no form in TOML, or would come back as something else.
    """
    tomli_w = require("tomli_w", "diffusers")
    try:
        text = _NUMBERS.sub(_in_one_line, tomli_w.dumps(_without_none(config)))
        same = from_toml(text) == config
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} has options with no form in TOML: {error}") from error
    if not same:
        raise ValueError(
            f"{what} has options that TOML would change: they must be numbers (not NaN), strings, None, tuples and "
            f"tables of them, got {config.get('options')!r}"
        )
    return text


def _in_one_line(found: re.Match[str]) -> str:
    """A list of numbers, which the writer gives a line each."""
    joined = f"[{', '.join(found[0][1:-1].replace(',', ' ').split())}]"
    return joined if len(joined) <= _WIDTH else found[0]


def from_toml(text: str) -> dict[str, Any]:
    """What `to_toml` wrote; lists as tuples.

    Raises:
        ValueError: it is not TOML.
    """
    found: dict[str, Any] = with_none(tomllib.loads(text))
    return found


def _without_none(value: Any) -> Any:
    """TOML has no None: it becomes the table ``{none = true}``, in tuples too."""
    if value is None:
        return {"none": True}
    if isinstance(value, Mapping):
        return {key: _without_none(x) for key, x in value.items()}
    return [_without_none(x) for x in value] if isinstance(value, tuple) else value


def with_none(value: Any) -> Any:
    """Tables ``{none = true}`` as None, lists as tuples."""
    if value == {"none": True}:
        return None
    if isinstance(value, Mapping):
        return {key: with_none(x) for key, x in value.items()}
    return tuple(with_none(x) for x in value) if isinstance(value, list) else value
