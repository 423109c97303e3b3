"""Write the generated pages of docs/ and the tables of README.md: `python scripts/write_docs.py`."""

from __future__ import annotations

import json
from pathlib import Path

from doc_pages.methods import methods_page, ours, source
from doc_pages.quality import quality_page
from doc_pages.tables import ROOT, table
from doc_pages.training import needs_page

from vsparse.integrations.diffusers.hosts import HOSTS
from vsparse.measure.scaling_page import scaling_page

TEXT = {"none": "by cross-attention", "before": "before the video", "after": "after the video"}


def methods_table() -> str:
    rows = [[f"`{key}`", source(known), known.use, known.advice] for key, known in ours().items()]
    return table(["key", "method", "use", "when"], rows)


def hosts_table() -> str:
    rows = ["| models of diffusers | pipelines | text in the attention |", "|---|---|---|"]
    for host in HOSTS:
        models, pipelines = (", ".join(f"`{name}`" for name in names) for names in (host.models, host.pipelines))
        rows.append(f"| {models} | {pipelines} | {TEXT[host.side]} |")
    return "\n".join(rows)


def readme() -> str:
    """README.md with its tables renewed; everything outside the markers stays."""
    text = (ROOT / "README.md").read_text()
    for name, rows in (("methods", methods_table()), ("hosts", hosts_table())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"README.md has lost its markers {begin} ... {end}")
        text = f"{before}{begin}\n{rows}\n{end}{after}"
    return text


def documents() -> dict[Path, str]:
    """Every generated file with what it should hold."""
    return {
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "docs" / "finetune-memory.md": needs_page(),
        ROOT / "docs" / "quality.md": quality_page(),
        ROOT / "docs" / "scaling.md": scaling_page(json.loads((ROOT / "docs" / "scaling.json").read_text())),
        ROOT / "README.md": readme(),
    }


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
