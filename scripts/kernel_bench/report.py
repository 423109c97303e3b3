"""The report: JSON, Markdown and a plot, each written under a temporary name and then renamed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DRY = "dry run, no meaning"
LISTS = ("correctness", "properties", "forward", "backward", "parts", "moving", "search", "baselines", "dropped")


def _plain(value: Any) -> Any:
    """NaN and infinities as null, so that any reader of JSON takes it."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _put(path: Path, write: Callable[[Path], object]) -> None:
    scratch = path.with_name(f".{path.name}.part")
    write(scratch)
    scratch.rename(path)


def table(header: list[str], rows: Iterable[list[Any]]) -> list[str]:
    def cell(value: Any) -> str:
        words = ("–" if not math.isfinite(value) else f"{value:.4g}") if isinstance(value, float) else str(value)
        return words.replace("|", "/")

    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return [*lines, *(f"| {' | '.join(cell(value) for value in row)} |" for row in rows), ""]


class Report:
    """Everything one run found; ``data`` is what the JSON file holds."""

    def __init__(self, folder: Path, *, dry: bool) -> None:
        self.folder = folder
        self.data: dict[str, Any] = {
            "schema": 1, "dry_run": dry, "timings": DRY if dry else "measured", "environment": {}, "ceilings": {},
            "stages": {}, **{name: [] for name in LISTS},
        }  # fmt: skip

    @property
    def title(self) -> str:
        return "Block-sparse attention on a GPU" + (f" ({DRY})" if self.data["dry_run"] else "")

    def write(self) -> None:
        """JSON and Markdown; after every stage, so that a run that is ended leaves what it had."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(self.data), indent=1) + "\n"
        _put(self.folder / "bench_kernels.json", lambda path: path.write_text(text))
        _put(self.folder / "bench_kernels.md", lambda path: path.write_text(self.markdown()))

    def markdown(self) -> str:
        data = self.data
        lines = [f"# {self.title}", "", *([f"**{DRY}**", ""] if data["dry_run"] else [])]
        lines += [f"- {name}: {value}" for name, value in data["environment"].items()]
        lines += [f"- ceiling, {name}: {x['value'] / 1e12:.4g} T{x['unit']}" for name, x in data["ceilings"].items()]
        lines += ["", "## Correctness", "", *self._correctness(), "## Properties", ""]
        lines += table(
            ["property", "status", "what", "found"],
            ([x["name"], x["status"], x["what"], x["words"]] for x in data["properties"]),
        )
        for step in ("forward", "backward"):
            lines += [f"## {step.capitalize()}", "", *self._sweep(data[step])]
        lines += ["## Parts of a VSA call", "", *self._parts()]
        lines += ["## Moving tensors, and sharing with nobody", "", *self._moving()]
        lines += ["## Exact search, as shares of one dense forward", "", *self._search()]
        lines += ["## Baselines", "", *self._baselines()]
        lines += [f"## Not measured for lack of time: {len(data['dropped'])} groups", ""]
        lines += table(
            ["pass", "S", "H", "D", "block", "reason"],
            (
                [x["pass"], x["slots"], x["heads"], x["head_dim"], "x".join(map(str, x["block"])), x["reason"]]
                for x in data["dropped"]
            ),
        )
        return "\n".join(lines)

    def _correctness(self) -> list[str]:
        rows = self.data["correctness"]
        good = sum(x["status"] == "pass" for x in rows)
        worst = max((share for x in rows if x["status"] == "pass" for share in x["errors"].values()), default=math.nan)
        lines = [
            f"{good} of {len(rows)} pass, with errors of at most {worst:.2f} of what is allowed.",
            "The others are not timed.",
            "",
        ]
        bad = [x for x in rows if x["status"] != "pass"]
        return lines + table(
            ["kind", "D", "block", "dtype", "variant", "pass", "status", "found"],
            (
                [x["kind"], x["width"], f"{x['q_block']}x{x['k_block']}", x["dtype"], x["variant"], x["pass"],
                 x["status"], x["words"]]
                for x in bad
            ),
        )  # fmt: skip

    def _sweep(self, rows: list[dict[str, Any]]) -> list[str]:
        def cells(x: dict[str, Any]) -> list[Any]:
            head = [x["slots"], x["heads"], x["head_dim"], "x".join(map(str, x["block"])), x["asked_density"]]
            if x["status"] != "measured":
                return [*head, *["–"] * 7, f"{x['status']}: {x['words']}"]
            dense = ", ".join(
                f"{y['name']} {y['tflops']:.0f} ({y['timed_heads']} heads)"
                if not y["words"]
                else f"{y['name']}: failed"
                for y in x["dense"]
            )
            figures = [x["ms"], x["tflops"], x["of_matrix"], x["target"], x["floor_ms"] / x["ms"], x["times_dense"]]
            figures.append(x["descriptors"].get("ms", "–"))
            return [*head, *figures, dense]

        header = ["S", "H", "D", "block", "density", "ms", "TFLOP/s", "of ceiling", "target", "floor / time"]
        return table([*header, "x dense", "ms by descriptors", "dense TFLOP/s"], map(cells, rows))

    def _parts(self) -> list[str]:
        lines = []
        for x in self.data["parts"]:
            lines += [f"Grid {'x'.join(map(str, x['grid']))}, H={x['heads']}: {x['status']} {x['words']}".rstrip(), ""]
            lines += table(["piece", "ms"], ([name, value] for name, value in x["ms"].items()))
            lines += table(["share of the kernel", "found"], ([*pair] for pair in x.get("of_kernel", {}).items()))
            names = {"a": "kernel", "b": "+ selection", "c": "+ pack and unpack", "d": "+ coarse branch and gate"}
            lines += table(["sum", "ms"], ([names[name], ms] for name, ms in x.get("sums_ms", {}).items()))
        return lines

    def _moving(self) -> list[str]:
        lines = []
        for x in self.data["moving"]:
            lines += [f"Grid {'x'.join(map(str, x['grid']))}, H={x['heads']}: {x['status']} {x['words']}".rstrip(), ""]
            lines += table(
                ["piece", "ms", "GB/s", "of the copy ceiling"],
                ([name, y["ms"], y["rate"] / 1e9, y["of_copy"]] for name, y in x.get("moved", {}).items()),
            )
            if "alone" in x:
                lines += [f"Attention as the only one of a group: {x['alone']:+.4f} (target {x['target']}).", ""]
        return lines

    def _search(self) -> list[str]:
        lines = []
        for x in self.data["search"]:
            lines += [f"S={x['slots']}, H={x['heads']}, D={x['head_dim']}: {x['status']} {x['words']}".rstrip(), ""]
            lines += table(["stage", "share"], ([*pair] for pair in x.get("of_dense", {}).items()))
        return lines

    def _baselines(self) -> list[str]:
        lines = []
        for x in self.data["baselines"]:
            shape = f"S={x['slots']}, H={x['heads']}, D={x['head_dim']}, {'x'.join(map(str, x['block']))}"
            lines += [f"{shape}, density {x['asked_density']}: {x['status']} {x['words']}".rstrip(), ""]
            lines += table(
                ["kernel", "ms", "TFLOP/s", "found"],
                (
                    [y["name"], y.get("ms", "–"), y.get("tflops", "–"), y.get("engine", "") or y["words"]]
                    for y in x["rows"]
                ),
            )
        return lines

    def plot(self) -> str:
        """TFLOP/s over density, one line for each shape; returns why there is no picture, "" when there is one."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            return f"no plot: {error}"
        figure = Figure(figsize=(13, 6), layout="constrained")
        FigureCanvasAgg(figure)
        ceiling = self.data["ceilings"].get("matrix", {}).get("value", math.nan) / 1e12
        for axes, step in zip(figure.subplots(1, 2), ("forward", "backward"), strict=True):
            measured = [x for x in self.data[step] if x["status"] == "measured"]
            shapes: dict[str, list[dict[str, Any]]] = {}
            for x in measured:
                block = "x".join(map(str, x["block"]))
                shapes.setdefault(f"S={x['slots']} H={x['heads']} D={x['head_dim']} {block}", []).append(x)
            for name, rows in shapes.items():
                rows.sort(key=lambda x: x["density"])
                axes.plot([x["density"] for x in rows], [x["tflops"] for x in rows], marker="o", label=name)
            dense = [y["tflops"] for x in measured for y in x["dense"] if not y["words"]]
            if dense:
                axes.axhline(max(dense), color="black", linestyle=":", label="fastest dense attention")
            if math.isfinite(ceiling):
                axes.axhline(ceiling, color="black", linestyle="--", label="matrix product")
            axes.set(title=step, xlabel="density", ylabel="TFLOP/s of executed FLOPs", xscale="log", ylim=(0, None))
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
        gpu = self.data["environment"].get("gpu") or "CPU"
        figure.suptitle(f"{self.title}: {gpu}, torch {self.data['environment'].get('torch')}")
        self.folder.mkdir(parents=True, exist_ok=True)
        _put(self.folder / "bench_kernels.png", lambda path: figure.savefig(path, dpi=110, format="png"))
        return ""
