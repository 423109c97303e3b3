"""A fine-tuning run in the terminal: what is encoded, how the loss goes, when it will end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vsparse.optional import require
from vsparse.training.data.clips import Problem
from vsparse.training.finetune import Told

__all__ = ["Shown"]


class Shown(Told):
    """Tells it to a console; a context manager.

    Args:
        console: Rich's, where to. steps: of the run.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self, console: Any, steps: int) -> None:
        bars = require("rich.progress", "cli")
        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=20),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[told]}"),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
        )
        self._bars = bars.Progress(*columns, console=console)
        self._console, self._steps = console, steps
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Shown:
        self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bars.stop()

    def encoding(self, what: str, done: int, of: int) -> None:
        """One bar for clips, one for captions."""
        self._advance(f"encoding {what}", done, of, "")

    def skipped(self, problems: Sequence[Problem]) -> None:
        """Each clip with its reason."""
        for problem in problems:
            self._console.print(f"left out: {problem.name}: {problem.reason}", style="yellow", markup=False)

    def stepped(self, done: int, figures: Mapping[str, float]) -> None:
        """The loss; its parts are in the log."""
        self._advance("training", done, self._steps, f"loss {figures['loss']:.4f}")

    def _advance(self, name: str, done: int, of: int, told: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=of, told=told)
        self._bars.update(self._tasks[name], completed=done, told=told)
