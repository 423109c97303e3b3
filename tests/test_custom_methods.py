"""docs/custom-methods.md: the package that it shows, installed from its own text, works like a method of ours."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rows
import tiny
import torch
from host_law import Standard, trained
from torch import Tensor
from typer.testing import CliRunner

import vsparse
from vsparse import cli
from vsparse.measure.compare import compare, sweeps
from vsparse.measure.synthetic import structured_sample

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "custom-methods.md").read_text()
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package of the page, without network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name, text in FILES.items():
        (source / name).write_text(text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def own_tile(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The key of the method, while its package can be imported."""
    assert "own_tile" not in vsparse.list_methods()
    with monkeypatch.context() as patched:
        patched.syspath_prepend(installed)
        importlib.invalidate_caches()
        yield "own_tile"
    sys.modules.pop("vsparse_own_tile", None)
    importlib.invalidate_caches()
    assert "own_tile" not in vsparse.list_methods()


def test_the_page_shows_two_files_of_a_size_to_read() -> None:
    assert set(FILES) == {"vsparse_own_tile.py", "pyproject.toml"}
    assert len([line for line in FILES["vsparse_own_tile.py"].splitlines() if line.strip()]) <= 42


@pytest.mark.parametrize("host", ["wan", "hunyuan_video", "cogvideox"])
def test_it_is_listed_applied_and_removed(host: str, own_tile: str) -> None:
    assert issubclass(vsparse.list_methods()[own_tile], vsparse.Method)
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs, (3, 6, 7))

    def run(hidden: Tensor) -> list[Tensor]:
        return [model(**{**values, "hidden_states": hidden})[0]]

    def law() -> dict[str, Tensor]:
        return trained(model, run, [values["hidden_states"]])

    standard = Standard.of(law, rows.tokens(model, values))
    before = law()
    with vsparse.apply(model, own_tile, density=0.3, tile=(2, 3, 3)) as patch:
        sparse = law()
        assert 0.2 < patch.stats()["sparse_density"] < 0.8
    assert max(standard.ratios(sparse).values()) > 100
    assert all(torch.isfinite(x).all() for x in sparse.values())
    with vsparse.apply(model, own_tile, density=1.0, tile=(2, 3, 3)):
        standard.check(law())
    assert vsparse.patch_of(model) is None
    after = law()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_command_and_the_comparison_know_it(own_tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "_width", 160)
    found = CliRunner().invoke(cli.app, ["methods", own_tile])
    assert found.exit_code == 0
    assert "itself and to the tiles" in found.output
    (line,) = [line for line in sweeps() if line.method == own_tile]
    (point,) = compare([structured_sample(vsparse.Grid(t=8, h=12, w=16))], [line])
    assert point.recall > point.random + 0.1


def test_a_wrong_option_is_refused_in_words(own_tile: str) -> None:
    with pytest.raises(ValueError, match="'own_tile' has no option 'densty'; its options: density, tile"):
        vsparse.apply(tiny.wan()[0], own_tile, densty=0.2)


def test_its_distribution_names_the_entry_point(own_tile: str) -> None:
    (point,) = importlib.metadata.entry_points(group="vsparse.methods", name=own_tile)
    assert point.dist is not None
    assert point.dist.name == "vsparse-own-tile"
