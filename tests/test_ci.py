"""What ``.ci/browser`` does where a browser is, where apt-get brings one, and where it cannot. Nothing is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "browser"
TOOLS = ("bash", "chmod", "dirname", "env", "grep", "tail", "timeout", "true")
BRINGS = 'case "$*" in *--no-download*) : > "$(dirname "$0")/chromium"; chmod +x "$(dirname "$0")/chromium";; esac'


class Machine:
    """A folder of programs that stands for a whole path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in TOOLS:
            found = shutil.which(name)
            assert found is not None
            (folder / name).symlink_to(found)
        self.program("id", "echo 0")

    def program(self, name: str, text: str) -> None:
        """A program whose calls are noted."""
        path = self.folder / name
        path.write_text(f'#!{shutil.which("bash")}\necho "{name} $*" >> "{self.folder}/calls"\n{text}\n')
        path.chmod(0o755)

    def says(self) -> str:
        done = subprocess.run(
            [str(SCRIPT)], env={"PATH": str(self.folder)}, capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        (line,) = done.stdout.splitlines()
        return line

    def calls(self, name: str) -> list[str]:
        path = self.folder / "calls"
        return [line for line in path.read_text().splitlines() if line.startswith(name)] if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    if os.name != "posix":
        pytest.skip("a script for bash")
    return Machine(tmp_path)


def test_a_browser_that_is_here_is_used(machine: Machine) -> None:
    machine.program("apt-get", BRINGS)
    machine.program("google-chrome", "")
    assert machine.says() == f"page tests: run, in {machine.folder}/google-chrome"
    assert not machine.calls("apt-get")


def test_apt_get_brings_one_without_recommended_packages(machine: Machine) -> None:
    machine.program("apt-get", BRINGS)
    assert machine.says() == f"page tests: run, in {machine.folder}/chromium"
    download, unpack = machine.calls("apt-get")
    assert "--no-install-recommends chromium --download-only" in download
    assert "--no-install-recommends chromium --no-download" in unpack


def test_lists_are_renewed_once_where_they_are_old(machine: Machine) -> None:
    old = '[ -e "$(dirname "$0")/new" ] || { case "$*" in *update) : > "$(dirname "$0")/new";; *) exit 100;; esac; }'
    machine.program("apt-get", f"{old}\n{BRINGS}")
    assert machine.says() == f"page tests: run, in {machine.folder}/chromium"
    assert len([line for line in machine.calls("apt-get") if line.endswith("update")]) == 1


def test_why_there_is_none(machine: Machine) -> None:
    assert machine.says() == "page tests: skipped, there is no browser, and no apt-get to install one"
    machine.program("apt-get", "echo 'E: Unable to locate package chromium' >&2\nexit 100")
    assert machine.says().endswith("and apt-get brought none: E: Unable to locate package chromium")
    machine.program("id", "echo 1000")
    assert machine.says().endswith("and apt-get needs root or sudo without a password")
    machine.program("sudo", 'shift\nexec "$@"')
    assert machine.says().endswith("and apt-get brought none: E: Unable to locate package chromium")


def test_it_looks_for_the_names_that_the_tests_look_for() -> None:
    page = (SCRIPT.parents[1] / "tests" / "measure" / "test_latency_page.py").read_text()
    names = next(line for line in page.splitlines() if line.startswith("NAMES = "))
    looked = next(line for line in SCRIPT.read_text().splitlines() if "for name in" in line)
    assert re.findall('"(.*?)"', names) == looked.strip().removeprefix("for name in ").removesuffix("; do").split()
