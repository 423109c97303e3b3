"""Where the files are, and a table in Markdown."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NONE = "\u2013"


def table(head: list[str], rows: list[list[str]], numbers: bool = False) -> str:
    rule = "|" + "|".join(["---", *(("---:" if numbers else "---") for _ in head[1:])]) + "|"
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])
