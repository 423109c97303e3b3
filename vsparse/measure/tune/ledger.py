"""What a search has found so far, on disk: a search that was stopped goes on, and ends as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vsparse.measure.recall_report import as_rows, write_text

__all__ = ["Ledger"]


class Ledger:
    """Figures by name in one JSON file, each computed once.

    Args:
        path: The file; its folder is made. settings: what all figures depend on, as JSON holds it.

    Raises:
        ValueError: the file is there with other settings, or cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.known: dict[str, Any] = {}
        if path.is_file():
            try:
                stored = json.loads(path.read_text())
                self.known, given = dict(stored["found"]), stored["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no ledger of a search ({error!r}); take another folder") from error
            if given != self.settings:
                others = sorted(name for name in {*given, *self.settings} if given.get(name) != self.settings.get(name))
                raise ValueError(
                    f"{path} is of a search with other settings ({', '.join(others)}); "
                    "take another folder, or remove it"
                )
        path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The figures of a name: those that are known, or computed now and written down.

        They come back as JSON gives them, whether computed now or read, so that both ways are alike to the bit.
        """
        if name not in self.known:
            self.known[name] = json.loads(json.dumps(compute()))
            write_text(self.path, as_rows({"settings": self.settings, "found": self.known}))
        return self.known[name]
