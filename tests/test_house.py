"""The rules of the house: over each library file (the rules of house.py), and over the whole tree."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from house import (
    APART,
    EXTRAS,
    LIBRARY,
    MOST_ASSET_BYTES,
    MOST_LINES,
    PROJECT,
    ROOT,
    RULES,
    RUNTIME,
    SIDES,
    Rule,
    Source,
    declared,
    distribution,
    environment,
    floors,
    forbidden,
    names_by_string,
    open_options,
    size,
    spelling,
    third_parties,
    version_home,
)

LINKS = (*SIDES, "profiles")
KERNEL = "vsparse/kernels/cpu/forward.py"
HOST = "vsparse/integrations/diffusers/hosts.py"
VSA = "vsparse/methods/vsa.py"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_library_keeps(rule: Rule) -> None:
    complaints = [complaint for source in LIBRARY for complaint in rule(source)]
    assert not complaints, "\n".join([rule.__doc__ or "", *complaints])


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (floors, "vsparse/layouts.py", "from vsparse.blocks import BlockMap"),
        (floors, "vsparse/layouts.py", "from vsparse import blocks"),
        (floors, "vsparse/backend.py", "from vsparse.layouts import Blocking"),
        (floors, "vsparse/patterns.py", "import vsparse.select"),
        (floors, "vsparse/geometry.py", "def f():\n    from vsparse import apply"),
        (floors, "vsparse/geometry.py", "from .ops import merge_attention"),
        (floors, "vsparse/ops.py", "from vsparse.kernels.cpu import forward"),
        (floors, VSA, "from ..patch import apply"),
        (floors, "vsparse/parallel/ring.py", "from vsparse.methods import Call"),
        (floors, "vsparse/parallel/ring.py", "from vsparse.methods.base import Call"),
        (floors, "vsparse/helpers.py", ""),
        (floors, "vsparse/__init__.py", "from vsparse.cli import main"),
        (floors, KERNEL, "from vsparse.methods.base import Call"),
        (floors, KERNEL, "from ..gather import forward"),
        (floors, "vsparse/kernels/cpu/pool.py", "from vsparse.kernels.tiles import load_tile"),
        (floors, "vsparse/kernels/tiles/host.py", "from vsparse.kernels.block_sparse import launch"),
        (floors, "vsparse/kernels/block_sparse/launch.py", "from vsparse.kernels.gather import launch"),
        (floors, "vsparse/kernels/merge/launch.py", "from vsparse.kernels.block_sparse import launch"),
        (floors, KERNEL, "from vsparse.integrations.diffusers import hosts"),
        (floors, HOST, "from vsparse.kernels.cpu import forward"),
        (floors, HOST, "from vsparse.measure import latency"),
        (spelling, KERNEL, "from vsparse.kernels.cpu.launch import run"),
        (spelling, KERNEL, "from ...blocks import BlockMap"),
        (spelling, "vsparse/cli.py", "import kernels.cpu"),
        (third_parties, "vsparse/adapter.py", "import safetensors"),
        (third_parties, "vsparse/adapter.py", "def f():\n    import pandas"),
        (third_parties, "vsparse/adapter.py", "def f():\n    return require('matplotlib.figure', 'lora')"),
        (third_parties, KERNEL, "import diffusers"),
        (names_by_string, "vsparse/ops.py", "import importlib\nimportlib.import_module('vsparse.kernels.cpu')"),
        (names_by_string, "vsparse/ops.py", "def f(name):\n    return __import__(f'vsparse.integrations.{name}')"),
        (environment, "vsparse/ops.py", "import os\nos.environ['VSPARSE_FAST']"),
        (environment, "vsparse/ops.py", "import os\nos.environ.get('HOME', 'VSPARSE_LOG')"),
        (environment, "vsparse/ops.py", "import os\nos.getenv(name)"),
        (environment, "vsparse/ops.py", "from os import environ"),
        (open_options, "vsparse/ops.py", "def _f(**kwargs):\n    return 1"),
        (open_options, "vsparse/ops.py", "class A:\n    def f(self, **kwargs):\n        return kwargs"),
        (forbidden, KERNEL, "tl.make_block_ptr(x)"),
        (forbidden, "vsparse/adapter.py", "torch.load(path)"),
        (forbidden, "vsparse/adapter.py", "import pickle"),
        (version_home, "vsparse/__init__.py", f"__version__ = {PROJECT['version']!r}"),
        (size, "vsparse/layouts.py", "\n" * (MOST_LINES + 1)),
    ],
)
def test_rule_catches(rule: Rule, path: str, text: str) -> None:
    assert len(list(rule(Source(path, text)))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (VSA, "from vsparse.methods.base import Method\nfrom .base import Call"),
        (KERNEL, "import triton\nfrom .launch import run\nfrom vsparse import ops, reference"),
        (HOST, "import diffusers\nfrom vsparse.parallel import ring\nfrom . import steps"),
        ("vsparse/adapter.py", "def f():\n    from safetensors.torch import save_file"),
        ("vsparse/backend.py", "PROVIDERS = ('vsparse.kernels.cpu',)"),
        ("vsparse/ops.py", "'''See vsparse.kernels.'''\nimport os\nos.environ.get('VSPARSE_LOG', '')"),
        ("vsparse/patch.py", "def apply(target, **overrides):\n    return overrides"),
        ("vsparse/cli.py", "import rich\nfrom vsparse.measure import latency\nfrom vsparse.kernels.cpu import forward"),
    ],
)
def test_rules_allow(path: str, text: str) -> None:
    assert [complaint for rule in RULES for complaint in rule(Source(path, text))] == []


def test_links_are_relative_and_top_folders_are_no_packages() -> None:
    for name in LINKS:
        assert os.readlink(ROOT / "vsparse" / name) == f"../{name}"
        assert (ROOT / name).is_dir()
    loose = [path.name for name in SIDES for path in (ROOT / name).glob("*.py")]
    assert not loose, f"code lives in the folders below, and a package named kernels exists elsewhere: {loose}"


def test_assets_stay_small_and_hold_no_pickle() -> None:
    files = [path for path in (ROOT / "vsparse" / "assets").rglob("*") if path.is_file()]
    strange = [path.name for path in files if path.suffix not in (".safetensors", ".json") and path.name != "README.md"]
    assert not strange, f"assets are safetensors and json with a README beside them: {strange}"
    size_now = sum(path.stat().st_size for path in files)
    assert size_now <= MOST_ASSET_BYTES, f"assets hold {size_now / 2**20:.1f} MB"


def project_texts() -> dict[str, str]:
    """Every text file that git would take, or of an unpacked tree without the ignored folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        ignored = {".venv", ".git", "out", "build", "dist", "__pycache__"}
        files = [path for path in ROOT.rglob("*") if not ignored & set(path.relative_to(ROOT).parts)]
    texts = {}
    for path in files:
        if path.is_file() and not path.is_symlink() and b"\0" not in (content := path.read_bytes()):
            texts[path.relative_to(ROOT).as_posix()] = content.decode("utf-8", errors="replace")
    return texts


def test_no_file_names_a_place_on_one_machine() -> None:
    place = re.compile(r"(?<![\w.:/{}$-])/(home|root|Users|mnt|opt|srv|tmp|work|workspace)/\w|[A-Z]:\\+Users")
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in project_texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if place.search(line)
    ]
    assert not found, "\n".join(found)


def test_every_dependency_is_pinned_and_has_its_reason() -> None:
    extras = [extra for extra in EXTRAS if extra not in ("all", *APART)]
    assert EXTRAS["all"] == [f"vsparse[{','.join(extras)}]"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    malformed = [line for line in lines if not re.fullmatch(r"[\w.-]+==\d[\w.]*", line)]
    assert not malformed, f"constraints.txt holds name==version and nothing else: {malformed}"
    pinned = {distribution(line) for line in lines}
    assert len(pinned) == len(lines), "a name stands twice in constraints.txt"
    needed = declared(*extras)
    assert needed <= pinned, f"not pinned in constraints.txt: {sorted(needed - pinned)}"
    apart = declared(*APART) - declared()
    assert not apart & pinned, f"pinned, though nothing installs them: {sorted(apart & pinned)}"
    table = (ROOT / "CONTRIBUTING.md").read_text()
    unexplained = [name for name in sorted(needed | apart | {"triton"}) if f"| `{name}`" not in table]
    assert not unexplained, f"no row in the dependency table of CONTRIBUTING.md: {unexplained}"


def test_generated_documents_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = runpy.run_path(str(ROOT / "scripts" / "write_docs.py"))
    stale = [path.name for path, text in script["documents"]().items() if path.read_text() != text]
    assert not stale, f"run: .venv/bin/python scripts/write_docs.py ({stale})"


def run_python(code: str) -> Any:
    """Run code in a fresh interpreter that sees this tree; returns the JSON of its last line."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LEAN = """
import json, sys, time
import torch
before = set(sys.modules)
begin = time.perf_counter()
import vsparse
seconds = time.perf_counter() - begin
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([seconds, sorted(loaded - {"vsparse", "torch"} - set(sys.stdlib_module_names))]))
"""


def test_import_loads_torch_and_the_standard_library_only() -> None:
    most, fastest = 0.2, float("inf")
    for _ in range(5):  # the fastest run is the one that nothing disturbed
        seconds, foreign = run_python(LEAN)
        assert foreign == [], f"`import vsparse` also loads {foreign}"
        fastest = min(fastest, seconds)
        if fastest <= most:
            break
    assert fastest <= most, f"`import vsparse` costs {fastest:.2f} s over `import torch`, at most {most} s"


PUBLIC = """
import json, sys
import torch
before = set(sys.modules)
import vsparse
for name in vsparse.__all__:
    getattr(vsparse, name)
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def test_public_names_load_no_optional_package() -> None:
    optional = declared(*RUNTIME) - {"torch"} | {"triton", "numpy"}
    loaded = optional.intersection(run_python(PUBLIC))
    assert not loaded, f"looking at the public names loads {sorted(loaded)}"


def test_public_names_resolve_and_are_documented() -> None:
    import vsparse

    names = list(vsparse.__all__)
    assert len(names) == len(set(names))
    assert set(names) <= set(dir(vsparse)), "dir(vsparse) hides public names"
    bare = []
    for name in names:
        text = getattr(getattr(vsparse, name), "__doc__", None) or ""
        generated = text.startswith(f"{name}(")  # what dataclasses write by themselves
        if not name.startswith("__") and (not text.strip() or generated):
            bare.append(name)
    assert not bare, f"without a docstring: {bare}"


EVERYTHING = """
import importlib, json, os, sys
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "vsparse").partition(".")[0] == "vsparse":
            raise
files = {{name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}}
print(json.dumps([(name, os.path.realpath(file)) for name, file in files.items() if os.path.isabs(file)]))
"""


def test_no_file_is_imported_under_two_names() -> None:
    names = [".".join(("vsparse", *source.parts)) for source in LIBRARY if source.parts[-1:] != ("__main__",)]
    loaded = [(name, Path(file)) for name, file in run_python(EVERYTHING.format(names=names))]
    ours = [(name, file) for name, file in loaded if any(ROOT / side in file.parents for side in ("vsparse", *SIDES))]
    assert ours, "nothing was imported from this tree"
    strangers = [name for name, _ in ours if name.partition(".")[0] != "vsparse"]
    assert not strangers, f"imported past vsparse: {strangers}"
    assert len({file for _, file in ours}) == len(ours)


def test_wheel_holds_kernels_integrations_and_profiles(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("vsparse", *LINKS):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "profiles" / "probe.toml").touch()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "-w", str(tmp_path), str(tree)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {source.path for source in LIBRARY} | {"vsparse/py.typed", "vsparse/profiles/probe.toml"}
    wanted |= {f"vsparse/profiles/{path.name}" for path in (ROOT / "profiles").glob("*.toml")}
    assert wanted <= packed, f"missing from the wheel: {sorted(wanted - packed)}"
    homes = ("vsparse/", f"vsparse-{PROJECT['version']}.dist-info/")
    outside = sorted(name for name in packed if not name.startswith(homes))
    assert not outside, f"the wheel installs outside vsparse: {outside}"
