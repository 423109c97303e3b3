"""What benchmarks share: a clock, and how far a call lifts the resident set of a process (Linux)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["clock", "in_own_process", "lift"]


def clock(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def lift(call: Callable[[], object]) -> int:
    """Bytes by which a call lifts the resident set above where it stood; something small must have run before."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def in_own_process(script: Path, *arguments: str) -> str:
    """What a script prints in a fresh process.

    There every tensor gets pages of its own and gives them back, so that a heap with holes cannot hide what a call
    takes.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
