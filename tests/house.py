"""The rules of the house over one library file. Each yields its complaints; ``test_house.py`` runs them."""

from __future__ import annotations

import ast
import dataclasses as dc
import functools
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
APART = ("xformers",)  # the extras that are asked for by name only: not in `all`, not pinned, not installed by `make`
RUNTIME = ("diffusers", "cli", "lora", "train", *APART)  # the extras that library code may import

IMPORTED_AS = {"yaml": "pyyaml"}  # the others have the names of their distributions

# Bottom up. A module sees the floors below its own, never its own floor.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("optional",),
    ("geometry",),
    ("backend",),
    ("layouts",),
    ("blocks",),
    ("patterns",),
    ("reference",),
    ("ops",),
    ("select", "schedule", "state", "steps", "fingerprint", "wrapping"),
    ("parallel",),
    ("methods",),
    ("descriptions",),
    ("profile", "adapter", "cost", "reasons"),
    ("forms",),
    ("runtime",),
    ("host",),
    ("planning",),
    ("stats",),
    ("patch",),
)
RANK = {unit: rank for rank, floor in enumerate(FLOORS) for unit in floor}
KERNELS_SEE = frozenset({"optional", "geometry", "layouts", "blocks", "reference", "backend", "ops"})
TILES = "kernels/tiles"  # the ground floor of the Triton kernels
STANDS_ON = {
    "kernels/block_mass": frozenset({"kernels/block_sparse"}),  # the search is attention and its mass
    "kernels/gather": frozenset({"kernels/block_sparse"}),  # the transpose of a map, and what a backward prepares
}
ROOF = frozenset({"training", "measure", "cli", "__main__"})
SIDES = ("kernels", "integrations")
LOADERS = frozenset({"vsparse/backend.py", "vsparse/host.py"})  # the two that import kernels and hosts by string

MOST_LINES = 450
LONGER: dict[str, int] = {}  # files older than the rule: these may shrink, not grow
MOST_ASSET_BYTES = 10 * 2**20
ENVIRONMENT = "VSPARSE_LOG"
OPEN_OPTIONS = frozenset(
    {
        ("vsparse/patch.py", "apply", "overrides"),  # fields of the method, checked
        ("vsparse/planning.py", "plan", "overrides"),
        ("vsparse/methods/base.py", "replace", "overrides"),
        ("vsparse/backend.py", "reasons", "options"),  # handed to the implementation as they came
        ("vsparse/backend.py", "lookup", "options"),
        ("vsparse/training/teachers.py", "forward", "kwargs"),  # what the host's model takes
    }
)


@dc.dataclass(frozen=True)
class Source:
    """One library file under the name it is imported by: ``vsparse/kernels/cpu/forward.py``, not ``kernels/...``."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def parts(self) -> tuple[str, ...]:
        """``("kernels", "cpu", "forward")``; empty for ``vsparse/__init__.py``."""
        parts = self.path.removesuffix(".py").split("/")[1:]
        return tuple(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def unit(self) -> str:
        """What has a floor: a module, a package, or one folder of kernels or integrations."""
        return unit_of(self.parts)

    @property
    def beside(self) -> bool:
        """Does it live in kernels or integrations?"""
        return self.parts[:1] in [(side,) for side in SIDES]


def unit_of(parts: tuple[str, ...]) -> str:
    if not parts:
        return "__init__"
    return "/".join(parts[:2]) if parts[0] in SIDES else parts[0]


def library() -> list[Source]:
    """Every library file, the linked folders once."""
    found = {}
    for folder in ("vsparse", *SIDES):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            found[name if folder == "vsparse" else f"vsparse/{name}"] = path.read_text()  # followed links: same key
    return [Source(name, text) for name, text in found.items()]


LIBRARY = library()
TOP = frozenset({*RANK, *ROOF, *SIDES, "parallel", *(source.parts[0] for source in LIBRARY if source.parts)})


@dc.dataclass(frozen=True)
class Import:
    line: int
    name: str  # absolute and dotted, the imported attribute included
    level: int  # dots of a relative import
    deferred: bool  # inside a function or `if TYPE_CHECKING`

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    @property
    def unit(self) -> str:
        """The unit of ours it reaches; a name of the package root counts as the root."""
        inner = tuple(self.name.split(".")[1:])
        return unit_of(inner) if inner and inner[0] in TOP else "__init__"


@functools.cache
def imports(source: Source) -> tuple[Import, ...]:
    """All of a file: several rules look at them."""
    package = source.path.split("/")[:-1]

    def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, 0, deferred)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, f"{base}.{alias.name}", node.level, deferred)
        checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        inside = deferred or checking or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return tuple(walk(source.tree, False))


def may_see(unit: str) -> frozenset[str] | None:
    """Units that a unit may import; None where the unit has no floor."""
    if unit in RANK:
        return frozenset(other for other, rank in RANK.items() if rank < RANK[unit])
    if unit == "parallel":
        return frozenset(other for other, rank in RANK.items() if rank <= RANK["ops"])
    if unit.startswith("kernels/"):
        return KERNELS_SEE if unit in (TILES, "kernels/cpu") else KERNELS_SEE | {TILES} | STANDS_ON.get(unit, set())
    if unit == "__init__" or unit.startswith("integrations/"):
        return frozenset({*RANK, "parallel"})
    return None


def distribution(requirement: str) -> str:
    """The normalised name in a requirement or a pin."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def declared(*extras: str) -> frozenset[str]:
    """What pyproject.toml asks for;"""
    listed = [requirement for extra in extras for requirement in EXTRAS[extra]]
    return frozenset(distribution(requirement) for requirement in [*PROJECT["dependencies"], *listed])


def floors(source: Source) -> Iterator[str]:
    """A module imports only from floors below its own."""
    if source.unit in ROOF:
        return
    seen = may_see(source.unit)
    if seen is None:
        yield f"{source.path}: {source.unit!r} has no floor; give it one in tests/house.py"
        return
    for found in imports(source):
        if found.top == "vsparse" and found.unit not in (source.unit, *seen):
            yield f"{source.path}:{found.line}: {source.unit} must not import {found.unit}"


def spelling(source: Source) -> Iterator[str]:
    """Kernels and hosts import their own folder relatively and everything below absolutely, never by the bare name."""
    for found in imports(source):
        if found.top in SIDES:
            yield f"{source.path}:{found.line}: import {found.name} as vsparse.{found.name}"
        if not source.beside or found.top != "vsparse":
            continue
        inside = found.unit == source.unit
        if inside and found.level == 0:
            yield f"{source.path}:{found.line}: import your own folder relatively"
        if not inside and found.level > 0:
            yield f"{source.path}:{found.line}: the relative import leaves {source.unit}; import absolutely"


def third_parties(source: Source) -> Iterator[str]:
    """On import: torch, a kernel's compiler, a host's package, the command's two. In functions: what is declared."""
    head = {"typer", "rich"} if source.unit == "cli" else set()
    if source.beside:
        head = {"triton"} if source.unit.startswith("kernels/") else {source.unit.partition("/")[2]}
    for found in imports(source):
        if found.top in ("vsparse", "torch", *SIDES, *head) or found.top in sys.stdlib_module_names:
            continue
        if not found.deferred:
            yield f"{source.path}:{found.line}: {found.top} is optional; import it where it is used"
        elif distribution(found.top) not in declared(*RUNTIME):
            yield f"{source.path}:{found.line}: {found.top} is not declared in pyproject.toml"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "require":
            given = [value.value for value in node.args if isinstance(value, ast.Constant)]
            if len(given) != 2 or given[0].startswith("vsparse."):
                continue
            top = given[0].split(".")[0]
            if given[1] not in RUNTIME or distribution(IMPORTED_AS.get(top, top)) not in declared(given[1]):
                yield f"{source.path}:{node.lineno}: the extra {given[1]!r} does not bring {given[0]}"


def names_by_string(source: Source) -> Iterator[str]:
    """Below the roof only the two loaders name kernels or integrations in a string."""
    if source.path in LOADERS or source.unit in ROOF or source.beside:
        return
    tree = source.tree
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    documentation = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in documentation:
            continue
        if re.search(r"\bvsparse\.(kernels|integrations)\b|^\.(kernels|integrations)\b", node.value):
            yield f"{source.path}:{node.lineno}: only {', '.join(sorted(LOADERS))} may name {node.value!r}"


def environment(source: Source) -> Iterator[str]:
    """No environment variable but VSPARSE_LOG."""
    tree = source.tree
    allowed = set()
    for node in ast.walk(tree):
        key = node.args[:1] if isinstance(node, ast.Call) else [node.slice] if isinstance(node, ast.Subscript) else []
        if any(isinstance(value, ast.Constant) and value.value == ENVIRONMENT for value in key):
            reader = node.func if isinstance(node, ast.Call) else node.value
            allowed |= {id(child) for child in ast.walk(reader)}
    for node in ast.walk(tree):
        read = isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb")
        if read and id(node) not in allowed:
            yield f"{source.path}:{node.lineno}: the only environment variable is {ENVIRONMENT}"
    for found in imports(source):
        if found.name in ("os.environ", "os.getenv", "os.environb"):
            yield f"{source.path}:{found.line}: write os.environ out, so that this rule sees it"


def open_options(source: Source) -> Iterator[str]:
    """Public functions name their options; whoever takes ``**options`` uses them."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.args.kwarg is None:
            continue
        name = node.args.kwarg.arg
        if not any(isinstance(child, ast.Name) and child.id == name for child in ast.walk(node)):
            yield f"{source.path}:{node.lineno}: {node.name} swallows **{name}"
        elif not node.name.startswith("_") and (source.path, node.name, name) not in OPEN_OPTIONS:
            yield f"{source.path}:{node.lineno}: public {node.name} takes **{name}; name the options"


def forbidden(source: Source) -> Iterator[str]:
    """No block pointers, which Triton is giving up; nothing that reads a pickle."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr == "make_block_ptr":
            yield f"{source.path}:{node.lineno}: make_block_ptr; use plain pointers or a tensor descriptor"
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            yield f"{source.path}:{node.lineno}: torch.load reads pickles; use safetensors"
    for found in imports(source):
        if found.top in ("pickle", "shelve", "marshal", "dill", "joblib"):
            yield f"{source.path}:{found.line}: {found.top} runs what it reads"


def version_home(source: Source) -> Iterator[str]:
    """The version stands in pyproject.toml only."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and node.value == PROJECT["version"]:
            yield f"{source.path}:{node.lineno}: read the version through importlib.metadata"


def size(source: Source) -> Iterator[str]:
    """A file that nobody can hold in mind is two files."""
    lines = source.text.count("\n")
    most = LONGER.get(source.path, MOST_LINES)
    if lines > most:
        yield f"{source.path}: {lines} lines, at most {most}"


Rule = Callable[[Source], Iterator[str]]
RULES: tuple[Rule, ...] = (
    floors,
    spelling,
    third_parties,
    names_by_string,
    environment,
    open_options,
    forbidden,
    version_home,
    size,
)
