"""Which configurations were found right; nothing else is timed. Checks run in processes of their own.

A process for each few CPU cores compiles and checks in parallel, fills the compiler's cache for the timings that
follow, and may die of a bad memory access without taking the run with it.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch

from . import check
from .descriptors import VARIANT
from .samples import Case

PATIENCE = 120.0  # seconds that one case may take before its process is ended


class Verdicts:
    """Results of checks by case."""

    def __init__(self) -> None:
        self.found: dict[Case, dict[str, Any]] = {}

    def refusal(
        self, width: int, block: tuple[int, int], dtype: torch.dtype, step: str, kind: str = "attention"
    ) -> str:
        """Why this configuration may not be timed; "" when it may."""
        name = str(dtype).removeprefix("torch.")
        wanted = Case(kind, width, *block, name)
        if wanted not in self.found:
            return f"{wanted.key} was not checked"
        for case, result in self.found.items():
            if case.variant == VARIANT:  # says nothing about the others, see `descriptors`
                continue
            if dc.replace(case, variant="") == wanted and not (case.variant and result.get("skipped")):
                steps = ("forward",) if step == "forward" else ("forward", "backward")
                for each in steps:
                    if result[each]:
                        return f"{case.key}, {each}: {result[each]}"
        return ""

    def descriptors(self, width: int, block: tuple[int, int], dtype: torch.dtype) -> str:
        """Why the forward may not be timed with tensor descriptors; "" when it may."""
        wanted = Case("attention", width, *block, str(dtype).removeprefix("torch."), VARIANT)
        return str(self.found[wanted]["forward"]) if wanted in self.found else f"{wanted.key} was not checked"

    def rows(self) -> list[dict[str, Any]]:
        """One row for each case and pass."""
        found = []
        for case, result in self.found.items():
            for step in ("forward", "backward") if case.kind == "attention" else ("forward",):
                status = "fail" if result[step] else "pass"
                skipped = result.get("skipped")
                found.append(
                    {**dc.asdict(case), "pass": step, "status": "not measured" if skipped else status,
                     "words": result[step], "errors": result["errors"], "relative": result.get("relative", {})}
                )  # fmt: skip
        return found


def serve(device: torch.device, *, tiny: bool) -> None:
    """A worker: cases come in as lines of JSON, results go out as lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    for line in sys.stdin:
        result = check.run(Case(**json.loads(line)), device, tiny=tiny)
        print(json.dumps(result), file=answers, flush=True)


class _Worker:
    """One process; started again when it dies."""

    def __init__(self, command: list[str], device: torch.device) -> None:
        self.command, self.device = command, device
        self.process: subprocess.Popen[str] | None = None
        self.errors: IO[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        if self.process is None:
            self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
            )
        return self.process

    def ask(self, case: Case) -> dict[str, Any]:
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        assert self.errors is not None
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(dc.asdict(case)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            found: dict[str, Any] = json.loads(line)
            if "CUDA error" in line:  # then nothing that follows in that process can be right
                process.kill()
                self.close()
            return found
        code = process.wait()
        self.errors.seek(0)
        last = " ".join(self.errors.read().split())[-300:]
        self.close()
        words = f"the process of the check ended with {code}: {last}"
        return {"forward": words, "backward": words, "errors": {}}

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                if self.process.stdin is not None:
                    self.process.stdin.close()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
            self.process = None


def run(
    cases: Iterable[Case],
    verdicts: Verdicts,
    *,
    script: Path,
    device: torch.device,
    tiny: bool,
    workers: int,
    seconds: float,
    report: Callable[[Case, dict[str, Any]], None],
) -> None:
    """Check cases in their order until ``seconds`` are over; what is left is marked as not measured.

    Args:
        workers: Processes; 0: in this one.
    """
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        if case not in verdicts.found:
            waiting.put(case)
    end = time.monotonic() + seconds
    lock = threading.Lock()

    def work(ask: Callable[[Case], dict[str, Any]]) -> None:
        while True:
            try:
                case = waiting.get_nowait()
            except queue.Empty:
                return
            if time.monotonic() < end:
                result = ask(case)
            else:
                words = "the time for checks was over"
                result = {"forward": words, "backward": words, "errors": {}, "skipped": True}
            with lock:
                verdicts.found[case] = result
                report(case, result)

    if not workers:
        work(lambda case: check.run(case, device, tiny=tiny))
        return
    command = [sys.executable, str(script), "--worker", str(device), *(["--dry-run"] if tiny else [])]
    pool = [_Worker(command, device) for _ in range(workers)]
    threads = [threading.Thread(target=work, args=(worker.ask,)) for worker in pool]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in pool:
        worker.close()


def default_workers() -> int:
    return max(1, min(12, (os.cpu_count() or 2) - 2))
