"""Reading what was typed on the command line."""

from __future__ import annotations

import ast
import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vsparse.measure.machines import INSIDE, assumed_cluster
from vsparse.measure.rates import read_rates
from vsparse.methods import Method, get_method
from vsparse.parallel.rates import Cluster
from vsparse.profile import Profile, is_profile
from vsparse.schedule import Schedule

__all__ = ["Several", "asked", "method", "methods", "schedule", "settings", "several", "shares", "sized", "sizes"]


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


def asked(key: str, pairs: Sequence[str]) -> Method | Profile:
    """A method as of `method`, or a profile by its file, with options as typed.

    Raises:
        ValueError: as of `method` and `Profile.read`. FileNotFoundError: there is no such profile.
    """
    if not is_profile(key):
        return method(key, pairs)
    profile = Profile.read(key)
    return dc.replace(profile, method=profile.method.replace(**settings(pairs))) if pairs else profile


def methods(keys: Sequence[str], pairs: Sequence[str]) -> list[Method | Profile]:
    """Several methods as of `asked`: ``density=0.5`` holds for all of them, ``vsa.density=0.3`` for one instead.

    Raises:
        ValueError: a key twice, an option of a method that is not among them, or as of `asked`.
        FileNotFoundError: as of `asked`.
    """
    if len(set(keys)) < len(keys):
        raise ValueError(f"--method names {next(key for key in keys if keys.count(key) > 1)!r} twice")
    shared: list[str] = []
    own: dict[str, list[str]] = {key: [] for key in keys}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        key, dot, field = name.partition(".")
        if not dot:
            shared.append(pair)
        elif key in own:
            own[key].append(f"{field}{equals}{value}")
        else:
            raise ValueError(f"--set {pair!r}: {key!r} is none of the methods {', '.join(keys)}")
    found: list[Method | Profile] = []
    for key in keys:
        named = {pair.partition("=")[0] for pair in own[key]}
        found.append(asked(key, [*(pair for pair in shared if pair.partition("=")[0] not in named), *own[key]]))
    return found


def schedule(
    chosen: Method | Profile, dense_steps: float | None, dense_layers: int | None, search_at: str | None
) -> Schedule:
    """The published schedule of a method, or that of a profile, changed where something was typed.

    Raises:
        ValueError: ``search_at`` is not numbers and commas, or the schedule contradicts itself.
    """
    method = chosen if isinstance(chosen, Method) else chosen.method
    given = None if isinstance(chosen, Method) else chosen.schedule
    published = method.default_schedule if given is None else given
    if dense_steps is None and dense_layers is None and search_at is None:
        return published
    searches = published.search_at if search_at is None else shares(search_at, "--search-at")
    return Schedule(
        dense_steps=published.dense_steps if dense_steps is None else dense_steps,
        dense_layers=published.dense_layers if dense_layers is None else dense_layers,
        search_at=searches,
        ramp=published.ramp,
    )


def sized(
    chosen: Method | Profile, height: int | None, width: int | None, frames: int | None, steps: int | None
) -> tuple[dict[str, int | None], int | None]:
    """The size as `vsparse.plan` takes it, and the denoising steps: as typed; nothing typed: those of a profile."""
    if isinstance(chosen, Profile) and height is width is frames is None:
        size = chosen.size
        height, width, frames, steps = size.height, size.width, size.frames, size.steps if steps is None else steps
    return {"height": height, "width": width, "num_frames": frames}, steps


def shares(text: str, name: str) -> tuple[float, ...]:
    """``0.2,0.6`` -> (0.2, 0.6).

    Raises:
        ValueError: not numbers and commas; ``name`` says whose value it was.
    """
    try:
        return tuple(float(share) for share in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name} must be shares such as 0.2,0.6; got {text!r}") from error


@dc.dataclass(frozen=True, kw_only=True)
class Several:
    """Several GPUs as typed: how many, what is known of them, and bytes of each where these were given."""

    gpus: int
    rates: Cluster | None
    links: str
    memory: float | None

    def cluster(self, *, dense: bool) -> Cluster:
        """What was measured; else what is assumed, of full attention or of sparse."""
        return self.rates or assumed_cluster(self.links, dense=dense)


def several(
    gpus: int | None, rates: Path | None, links: str | None, memory: float | None, *, sized: bool
) -> Several | None:
    """Several GPUs as typed, ``memory`` in GiB; None where nothing was.

    Raises:
        ValueError: an option that needs another, two that exclude each other, an unknown link, a memory that is not
            positive, or as of `read_rates`.
    """
    given = {"--rates": rates, "--links": links, "--gpu-memory": memory}
    if gpus is None:
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(named)} needs --gpus, the number of GPUs that share a video")
        return None
    if not sized:
        raise ValueError("--gpus needs --height, --width and --frames: what is best depends on the size of the video")
    if rates is not None and links is not None:
        raise ValueError("--links is assumed where nothing was measured: give it or --rates, not both")
    if links is not None and links not in INSIDE:
        raise ValueError(f"--links must be one of {', '.join(INSIDE)}, got {links!r}")
    if memory is not None and not 0 < memory < float("inf"):
        raise ValueError(f"--gpu-memory must be a positive number of GiB, got {memory!r}")
    return Several(
        gpus=gpus,
        rates=None if rates is None else read_rates(rates),
        links=links or next(iter(INSIDE)),
        memory=None if memory is None else memory * 2**30,
    )
