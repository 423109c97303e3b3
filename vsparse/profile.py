"""Profiles: a method with its settings for one model and video size, and where its figures come from, as TOML."""

from __future__ import annotations

import dataclasses as dc
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from vsparse.descriptions import from_toml, schedule_fields, to_toml
from vsparse.fingerprint import Fingerprint, digest
from vsparse.geometry import Grid
from vsparse.methods import Method, get_method
from vsparse.methods.base import Site
from vsparse.methods.by_layer import ByLayer
from vsparse.schedule import Schedule

__all__ = ["Model", "Profile", "Size", "is_profile", "shipped"]

_FORMAT = 1
_TABLES = frozenset({"options", "schedule", "model", "size", "provenance"})
_KEYS = _TABLES | {"format", "about", "measured", "method", "layers"}
_SHIPPED = Path(__file__).parent / "profiles"


@dc.dataclass(frozen=True, kw_only=True)
class Model:
    """The model that a profile is for.

    Args:
        name: Class of the transformer. layers: attention layers that vsparse finds in it. heads, head_dim: of each.
        weights: `vsparse.fingerprint.digest` of the one that was measured; None: any weights of this shape.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    weights: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"[model] class must be the name of a transformer's class, got {self.name!r}")
        _whole("model", self, ("layers", "heads", "head_dim"))
        if self.weights is not None and not isinstance(self.weights, str):
            raise ValueError(f"[model] weights must be a digest or absent, got {self.weights!r}")

    def __str__(self) -> str:
        return f"{self.name} with {self.layers} attention layers of {self.heads} heads of {self.head_dim}"


@dc.dataclass(frozen=True, kw_only=True)
class Size:
    """The video that a profile is for: pixels, frames, denoising steps."""

    height: int
    width: int
    frames: int
    steps: int

    def __post_init__(self) -> None:
        _whole("size", self, ("height", "width", "frames", "steps"))

    def __str__(self) -> str:
        return f"{self.height} x {self.width}, {self.frames} frames, {self.steps} steps"


@dc.dataclass(frozen=True, kw_only=True)
class Profile:
    """A method with its settings for one model and video size.

    Args:
        method: What is applied; layers that differ are a `ByLayer`. schedule: None: the method's published one.
        model, size: What it is for. about: one sentence for people. name: of its file, without the suffix.
        measured: Whether ``provenance`` holds figures that were measured with it; False: as somebody published it.
        provenance: Where it comes from: numbers, strings, and lists and tables of them.
    """

    method: Method
    schedule: Schedule | None = None
    model: Model
    size: Size
    about: str
    measured: bool = False
    provenance: Mapping[str, Any] = dc.field(default_factory=dict)
    name: str = "profile"

    def __str__(self) -> str:
        return f"{self.name}: {self.about}"

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Profile:
        """A profile from its file, or one that ships with vsparse, by its file's name.

        Raises:
            FileNotFoundError: neither. ValueError: not TOML, another format, keys or values that mean nothing.
        """
        file = _found(Path(path))
        try:
            return cls._parsed(from_toml(file.read_text(encoding="utf-8")), file.stem)
        except (TypeError, ValueError) as error:
            raise ValueError(f"profile {file}: {error}") from error

    @classmethod
    def _parsed(cls, config: Mapping[str, Any], name: str) -> Profile:
        if config.get("format") != _FORMAT:
            raise ValueError(f"format is {config.get('format')!r}; this version reads format {_FORMAT}")
        _only("a profile", config, _KEYS)
        missing = sorted({"about", "method", "model", "size"} - set(config))
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        for key, kind in (("about", str), ("method", str), ("measured", bool), ("layers", tuple)):
            if not isinstance(config.get(key, kind()), kind):
                raise ValueError(f"{key} must be a {kind.__name__}, got {config[key]!r}")
        for key in sorted(_TABLES):
            if not isinstance(config.get(key, {}), Mapping):
                raise ValueError(f"{key} must be a table, got {config[key]!r}")
        model = dict(config["model"])
        _only("[model]", model, {"class", "layers", "heads", "head_dim", "weights"})
        _only("[size]", config["size"], {x.name for x in dc.fields(Size)})
        if "schedule" in config:
            _only("[schedule]", config["schedule"], {x.name for x in dc.fields(Schedule)} - {"ramp"})
        made = Model(name=model.pop("class", ""), **{"layers": 0, "heads": 0, "head_dim": 0, **model})
        return cls(
            method=_method(config, made),
            schedule=Schedule(**config["schedule"]) if "schedule" in config else None,
            model=made,
            size=Size(**{**dict.fromkeys(("height", "width", "frames", "steps"), 0), **config["size"]}),
            about=config["about"],
            measured=config.get("measured", False),
            provenance=config.get("provenance", {}),
            name=name,
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the file under a temporary name, then give it its name, which ends in ``.toml``.

        Raises:
            ValueError: another suffix, or something that has no form in TOML.
        """
        target = Path(path)
        if target.suffix != ".toml":
            raise ValueError(f"a profile's file ends in .toml, got {str(target)!r}")
        model = {("class" if key == "name" else key): x for key, x in dc.asdict(self.model).items() if x is not None}
        config = {
            "format": _FORMAT,
            "about": self.about,
            "measured": self.measured,
            **_settings(self.method, self.model.layers),
            **({} if self.schedule is None else {"schedule": _shown(self.schedule)}),
            "model": model,
            "size": dc.asdict(self.size),
            "provenance": dict(self.provenance),
        }
        text = to_toml(config, f"profile {target.stem!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=".toml")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, target)
        return target

    def check(self, root: str, model: str, sites: Sequence[Site]) -> None:
        """Refuse a model that it is not for.

        Args:
            root: Name of the model in its pipeline. model: its class. sites: of its attention layers.

        Raises:
            ValueError: another class, or other layers, heads or head dimensions.
        """
        mine, shapes = self.model, {(site.heads, site.head_dim) for site in sites}
        if (model, len(sites), shapes) == (mine.name, mine.layers, {(mine.heads, mine.head_dim)}):
            return
        others = " or ".join(f"{heads} heads of {width}" for heads, width in sorted(shapes)) or "no heads"
        raise ValueError(
            f"profile {self.name!r} is for {self.model}, and {root} is a {model} with {len(sites)} of {others}; choose "
            "another one (`vsparse profiles`), or give the method and its options yourself"
        )

    def check_weights(self, root: str, found: Fingerprint) -> None:
        """Warn where the figures were measured with other weights; weights that cannot be read are not compared."""
        other = digest(found)
        if self.model.weights is not None and other is not None and other != self.model.weights:
            warnings.warn(
                f"vsparse: profile {self.name!r} was measured with other weights than those of {root}; its settings "
                "are applied, its figures need not hold",
                stacklevel=4,
            )

    def notice(self, expected: Grid, found: Grid) -> None:
        """Warn when a video has another size than the one that it was made for."""
        if (expected.t, expected.h, expected.w) != (found.t, found.h, found.w):
            shapes = [f"{grid.t} x {grid.h} x {grid.w}" for grid in (expected, found)]
            warnings.warn(
                f"vsparse: profile {self.name!r} was made for {self.size}: a grid of {shapes[0]}, and this video has "
                f"{shapes[1]}. Densities are shares and carry over; windows and tiles stay as they are; its figures do "
                "not hold",
                stacklevel=4,
            )


def shipped() -> dict[str, Path]:
    """Name -> file of the profiles that come with vsparse."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.toml"))}


def is_profile(given: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether what stands for a method is the file of a profile."""
    return isinstance(given, os.PathLike) or (isinstance(given, str) and given.endswith(".toml"))


def _found(path: Path) -> Path:
    if path.is_file():
        return path
    here = shipped().get(path.name.removesuffix(".toml"))
    if here is not None and path.parent.name in ("", "profiles"):
        return here
    names = ", ".join(shipped()) or "none"
    raise FileNotFoundError(f"no profile {str(path)!r}, and none of that name is shipped: {names}")


def _method(config: Mapping[str, Any], model: Model) -> Method:
    base = get_method(config["method"])().replace(**config.get("options", {}))
    if not config.get("layers"):
        return base
    if isinstance(base, ByLayer):
        raise ValueError("[[layers]] go with a method of their own; by_layer has its parts in [options]")
    by_layer: list[Method] = [base] * model.layers
    given: dict[int, str] = {}
    for table in config["layers"]:
        if not isinstance(table, Mapping) or not isinstance(table.get("at"), str):
            raise ValueError(f'[[layers]] need at, a layer or range such as "3", "0-9" or "10-"; got {table!r}')
        ByLayer(parts=((table["at"], base),))  # its words for a range that is none
        mine = base.replace(**{key: x for key, x in table.items() if key != "at"})
        for layer in _layers(table["at"], model.layers):
            if layer in given:
                raise ValueError(f"layer {layer} is in two [[layers]]: {given[layer]!r} and {table['at']!r}")
            given[layer] = table["at"]
            by_layer[layer] = mine
    return ByLayer.joined(by_layer)


def _layers(text: str, count: int) -> range:
    first, dash, last = text.replace(" ", "").partition("-")
    stop = int(last) + 1 if last else count if dash else int(first) + 1
    if stop > count or int(first) >= count:
        raise ValueError(f"[[layers]] at = {text!r}, and the model has {count} attention layers")
    return range(int(first), stop)


def _settings(method: Method, layers: int) -> dict[str, Any]:
    """``method``, ``options`` and ``layers`` of the file: what differs from the defaults, and what differs by layer."""
    every = [method.of(Site.alone(heads=1, head_dim=1, layer=layer)) for layer in range(layers)]
    parts = ByLayer.joined(every).parts
    kinds = {type(part) for _, part in parts}
    if not isinstance(method, ByLayer) or len(kinds) != 1:
        return {"method": method.key, "options": _changed(method.options(), type(method)().options())}
    options = [part.options() for _, part in parts]
    common = {key: x for key, x in options[0].items() if all(one[key] == x for one in options)}
    usual = next(iter(kinds))().options()
    tables = tuple(
        {"at": text, **{key: x for key, x in one.items() if key not in common}}
        for (text, _), one in zip(parts, options, strict=True)
    )
    return {"method": parts[0][1].key, "options": _changed(common, usual), "layers": tables}


def _shown(schedule: Schedule) -> dict[str, Any]:
    """Fields of a schedule; what is absent is None."""
    return {key: x for key, x in (schedule_fields(schedule) or {}).items() if x is not None}


def _changed(options: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    return {key: x for key, x in options.items() if x != usual[key]}


def _only(what: str, table: Mapping[str, Any], known: set[str] | frozenset[str]) -> None:
    strange = sorted(set(table) - known)
    if strange:
        raise ValueError(f"{what} has no {', '.join(map(repr, strange))}; it has {', '.join(sorted(known))}")


def _whole(table: str, made: Any, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(made, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"[{table}] {name} must be a whole number of at least 1, got {value or 'none'!r}")
