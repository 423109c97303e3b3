"""What every stage of a run shares: device, clock, verdicts, screen and the report."""

from __future__ import annotations

import dataclasses as dc
import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .report import Report
from .verdicts import Verdicts


class Screen:
    """Progress on standard output, one line at a time: the seconds since the start, and what a dry run is worth."""

    def __init__(self, note: str = "") -> None:
        self.begin = time.monotonic()
        self.note = f" {note}" if note else ""

    def say(self, words: str) -> None:
        print(f"[{time.monotonic() - self.begin:5.0f} s{self.note}] {words}", flush=True)


@dc.dataclass
class Session:
    """One run.

    Args:
        dry: Tiny shapes on the CPU, timings without meaning. budget: seconds for everything. script: for child
            processes. workers: processes that check; 0: none but this one.
    """

    device: torch.device
    dry: bool
    budget: float
    script: Path
    workers: int
    report: Report
    screen: Screen
    verdicts: Verdicts = dc.field(default_factory=Verdicts)
    dtype: torch.dtype = torch.bfloat16

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.screen.begin)

    @property
    def turn(self) -> float:
        """Seconds that one set of interleaved candidates is timed for."""
        return 0.02 if self.dry else 2.5

    def ceiling(self, name: str) -> float:
        """FLOP/s ("matrix") or B/s ("copy") as measured in this run; NaN when that stage did not run."""
        return float(self.report.data["ceilings"].get(name, {}).get("value", float("nan")))

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device, script: Path) -> dict[str, Any]:
    """Where and with what the figures were taken."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "commit": _output("git", "-C", str(script.parent), "rev-parse", "HEAD"),
        "command": shlex.join(["bench_kernels.py", *sys.argv[1:]]),
        "gpu": None,
        "driver": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "driver": driver.splitlines()[0] if driver else None,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found
