"""Which implementation of an op runs, and every reason why another does not."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Implementation", "implementations", "lookup", "ops", "reasons", "register"]

# Modules that register implementations, by device type. Imported by name on first use, so that `import vsparse` stays
# light and a missing compiler is a reason, not an import error.
_PROVIDERS: dict[str, tuple[str, ...]] = {
    "cpu": ("vsparse.kernels.cpu",),
    "cuda": (
        "vsparse.kernels.block_sparse",
        "vsparse.kernels.gather",
        "vsparse.kernels.block_mass",
        "vsparse.kernels.block_pool",
        "vsparse.kernels.merge",
        "vsparse.kernels.select",
        "vsparse.kernels.reorder",
    ),
}


class Implementation(NamedTuple):
    """One way to run an op on one kind of device.

    Args:
        name: Shown by ``vsparse doctor`` and ``Patch.stats``.
        device: ``torch.device.type`` it serves.
        run: The callable; its signature is the op's.
        unsupported: Called with the same arguments, returns the reasons why this call cannot run (empty: it can).
            It must not read tensor values.
        notes: Called likewise for a call that can run: what it does without, and why. ``vsparse doctor`` prints it.
    """

    name: str
    device: str
    run: Callable[..., Any]
    unsupported: Callable[..., list[str]]
    notes: Callable[..., list[str]] | None = None


_TABLE: dict[str, list[tuple[int, Implementation]]] = {}


def register(op: str, implementation: Implementation, *, priority: int) -> None:
    """Add an implementation; among those that can run, the highest priority does.

    Raises:
        RuntimeError: the name is taken for that op and device. Importing a kernel file under two module names would
            otherwise register it twice without a word.
    """
    rows = _TABLE.setdefault(op, [])
    if any((row.name, row.device) == (implementation.name, implementation.device) for _, row in rows):
        raise RuntimeError(
            f"{op}: an implementation {implementation.name!r} for {implementation.device!r} is already registered"
        )
    rows.append((priority, implementation))
    rows.sort(key=lambda row: -row[0])


@functools.cache
def _load(device: str) -> tuple[str, ...]:
    """Import the providers of a device; returns the reasons of those that could not be imported."""
    failures = []
    for module in _PROVIDERS.get(device, ()):
        try:
            importlib.import_module(module)
        except ImportError as error:
            failures.append(f"{module}: {error}")
    return tuple(failures)


def ops(device: str) -> list[str]:
    """Ops that some implementation serves on a device type."""
    _load(device)
    return [op for op, rows in _TABLE.items() if any(row.device == device for _, row in rows)]


def implementations(op: str, device: str) -> list[Implementation]:
    """Implementations of ``op`` for a device type, best first."""
    _load(device)
    return [row for _, row in _TABLE.get(op, []) if row.device == device]


def reasons(op: str, device: str, *args: Any, **options: Any) -> list[str]:
    """Why no implementation can run this call; empty when one can."""
    found = list(_load(device))
    rows = implementations(op, device)
    if not rows:
        served = sorted({row.device for _, row in _TABLE.get(op, [])} | set(_PROVIDERS))
        found.append(f"{op}: no implementation for device {device!r}; there is one for {', '.join(served)}")
    for row in rows:
        against = row.unsupported(*args, **options)
        if not against:
            return []
        found += [f"{row.name}: {reason}" for reason in against]
    return found


def lookup(op: str, device: str, *args: Any, **options: Any) -> Implementation:
    """The best implementation that can run this call.

    Raises:
        NotImplementedError: none can; the message lists every reason.
    """
    for row in implementations(op, device):
        if not row.unsupported(*args, **options):
            return row
    raise NotImplementedError(f"{op} cannot run here:\n  - " + "\n  - ".join(reasons(op, device, *args, **options)))
