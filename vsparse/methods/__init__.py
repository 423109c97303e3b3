"""The registry of methods: ours by name, third parties through the entry point group "vsparse.methods"."""

from __future__ import annotations

import importlib
import importlib.metadata

from vsparse.methods.base import Call, Method, Paper, Site, SparseAttention

__all__ = ["Call", "Method", "Paper", "Site", "SparseAttention", "get_method", "list_methods"]

_OURS = {
    "dense": ("vsparse.methods.dense", "Dense"),
    "vsa": ("vsparse.methods.vsa", "VSA"),
    "adaspa": ("vsparse.methods.adaspa", "AdaSpa"),
    "vmoba": ("vsparse.methods.vmoba", "VMoBA"),
    "dsv": ("vsparse.methods.dsv", "DSV"),
    "sta": ("vsparse.methods.sta", "STA"),
    "radial": ("vsparse.methods.radial", "Radial"),
    "svg": ("vsparse.methods.svg", "SVG"),
    "svg2": ("vsparse.methods.svg2", "SVG2"),
    "attention_tile": ("vsparse.methods.attention_tile", "AttentionTile"),
    "sla": ("vsparse.methods.sla", "SLA"),
    "nabla": ("vsparse.methods.nabla", "NABLA"),
    "sparge": ("vsparse.methods.sparge", "SpargeAttn"),
    "xattention": ("vsparse.methods.xattention", "XAttention"),
    "draft": ("vsparse.methods.draft", "DraftAttention"),
    "jenga": ("vsparse.methods.jenga", "Jenga"),
    "unicp": ("vsparse.methods.unicp", "UniCP"),
    "by_layer": ("vsparse.methods.by_layer", "ByLayer"),
    "pattern": ("vsparse.methods.pattern", "StaticPattern"),
}


def list_methods() -> dict[str, type[Method]]:
    """All methods that can be applied, by registry key.

    Raises:
        RuntimeError: a third-party entry point takes a key that exists, or is not a `Method`.
    """
    found = {key: getattr(importlib.import_module(module), name) for key, (module, name) in _OURS.items()}
    for point in importlib.metadata.entry_points(group="vsparse.methods"):
        method = point.load()
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise RuntimeError(f"entry point {point.value!r}: vsparse.methods must name Method classes, got {method!r}")
        if point.name in found:
            raise RuntimeError(f"entry point {point.value!r}: the method key {point.name!r} is taken")
        found[point.name] = method
    return found


def get_method(key: str) -> type[Method]:
    """The method with a registry key.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    methods = list_methods()
    if key not in methods:
        raise ValueError(f"unknown method {key!r}; there are: {', '.join(methods)}")
    return methods[key]
