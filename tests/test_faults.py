"""docs/faults.md: every test that it names exists, and every row says what holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "faults.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| fault |", "| input |"))]


def test_every_test_that_the_page_names_exists() -> None:
    named = sorted(set(re.findall(r"`(tests/\S+\.py)(?:::(\w+))?`", PAGE)))
    assert len(named) > 60
    missing = []
    for path, name in named:
        file = ROOT / path
        tree = ast.parse(file.read_text()) if file.is_file() else ast.Module(body=[], type_ignores=[])
        if not file.is_file() or (name and name not in {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}):
            missing.append(f"{path}::{name}")
    assert not missing


def test_every_row_names_a_test_or_says_why_not() -> None:
    assert len(ROWS) > 70
    words = ("`tests/", "cannot: ", "open: ", "the contract", "the same")
    silent = [row for row in ROWS if row.count("|") != 4 or not any(word in row.split("|")[3] for word in words)]
    assert not silent
