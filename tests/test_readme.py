"""README.md: its files exist, its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_pipelines

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not link.startswith("https://") and not (ROOT / link).is_file()]
    assert not missing


def test_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import diffusers

    pipe, call = tiny_pipelines.wan()

    class Tiny:
        """The example's pipeline, in small."""

        components = pipe.components
        scheduler = pipe.scheduler

        @classmethod
        def from_pretrained(cls, name: str) -> Tiny:
            return cls()

        def __call__(self, prompt: str, height: int, width: int) -> object:
            return pipe(**{**call, "prompt": prompt})

    monkeypatch.setattr(diffusers, "WanPipeline", Tiny)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "'sparse_density'" in capsys.readouterr().out
