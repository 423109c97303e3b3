"""A training step with sparse attention beside a dense one, in one run: `make bench-training`.

The model is a Wan transformer of diffusers with a few layers; a step is forward, backward and AdamW, under bfloat16
autocast as `vsparse finetune` runs it. Times: all cases take turns, figures are ratios of medians. Choosing maps is
timed in a step apart, recomputed calls included. Memory: each case runs in a process of its own; the figure is how far
a step lifts the resident set (on a GPU: the allocated bytes) above weights and optimiser. Beside it stands what
`vsparse.measure.meter` counts without running: the tensors alone, without what operators need for themselves.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from resident import clock, in_own_process, lift
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

import vsparse
from vsparse.measure import recall_report
from vsparse.measure.demo import environment
from vsparse.measure.meter import Meter
from vsparse.measure.options import sizes
from vsparse.measure.selection import watched
from vsparse.measure.video import check_folder

METHODS: Mapping[str, Callable[[float], dict[str, Any]]] = {
    "dense": lambda _: {},
    "vsa": lambda density: {"density": density},
    "vmoba": lambda density: {
        "select": "threshold", "threshold": density, "frames": 1, "patch": (8, 8), "cube": (4, 8, 8),
    },
    "sla": lambda density: {"density": density},
    "dsv": lambda density: {"density": density, "adaptive": False, "stage": "sparse"},
    "draft": lambda density: {"density": density},
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", default="8x32x32", metavar="TxHxW", help="latent frames, rows, columns of tokens")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], metavar="KEY")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each case; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-only", action="store_true", help="no times")
    parser.add_argument("--out", type=Path, default=Path("out/training"), metavar="FOLDER")
    parser.add_argument("--record", type=Path, metavar="FILE", help="also put the figures into docs/measured.json")
    parser.add_argument("--memory", nargs=3, metavar=("KEY", "DENSITY", "CHECKPOINTING"), help=argparse.SUPPRESS)
    return parser.parse_args()


class Case:
    """One model with its inputs and its optimiser."""

    def __init__(self, given: argparse.Namespace, key: str, density: float, *, checkpointing: bool) -> None:
        from diffusers import WanTransformer3DModel

        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        self.device = torch.device(given.device)
        width = given.heads * given.head_dim
        torch.manual_seed(0)
        with self.device:
            self.model = WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=given.heads,
                attention_head_dim=given.head_dim,
                text_dim=256,
                ffn_dim=6 * width,  # Wan 1.3B: 5.8
                num_layers=given.layers,
            ).train()
        if checkpointing:
            self.model.enable_gradient_checkpointing()
        self.patch = None
        if key != "dense":
            self.patch = vsparse.apply(self.model, key, schedule=vsparse.Schedule(), **METHODS[key](density))
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.grid = sizes(given.grid, "--grid")

    def loss(self, grid: tuple[int, int, int]) -> torch.Tensor:
        """Of a forward on a video of that many latent frames, rows and columns of tokens."""
        t, h, w = grid
        noise = functools.partial(torch.randn, device=self.device)
        values = {"hidden_states": noise(1, 16, t, 2 * h, 2 * w), "encoder_hidden_states": noise(1, 128, 256)}
        with torch.autocast(self.device.type, torch.bfloat16):
            found = self.model(**values, timestep=torch.full((1,), 500.0, device=self.device), return_dict=False)[0]
        loss = (found.float() - values["hidden_states"]).square().mean()
        return loss + sum(self.patch.auxiliary_losses().values()) if self.patch else loss

    def step(self, grid: tuple[int, int, int] | None = None) -> None:
        """Forward, backward, AdamW."""
        self.loss(grid or self.grid).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.wait()

    def wait(self) -> float:
        """The time when everything is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def choosing(self) -> float:
        """Seconds of a step that go into choosing maps."""
        with watched(self.patch.sites if self.patch else (), self.wait) as watch:
            self.step()
        return watch.select


def peak(given: argparse.Namespace, key: str, density: float, *, checkpointing: bool) -> int:
    """Bytes by which a step goes above weights and optimiser; a small step has made the optimiser's state."""
    case = Case(given, key, density, checkpointing=checkpointing)
    case.step((4, 8, 8))
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        case.step()
        return torch.cuda.max_memory_allocated(case.device) - before
    return lift(case.step)


def counted(given: argparse.Namespace, key: str, density: float, *, checkpointing: bool) -> int:
    """The most bytes of tensors that a step holds at once, without running it."""
    on_cpu = argparse.Namespace(**{**vars(given), "device": "cpu"})
    with FakeTensorMode(allow_non_fake_inputs=True):
        case = Case(on_cpu, key, density, checkpointing=checkpointing)
        with Meter() as meter:
            case.loss(case.grid).backward()
    return meter.peak


def memory(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Each method once: how many blocks it keeps hardly shows in the memory."""
    density = max(given.densities)
    cases = [(key, checkpointing) for checkpointing in (False, True) for key in given.methods]
    shape = [f"--{name.replace('_', '-')}={getattr(given, name)}" for name in ("grid", "layers", "heads", "head_dim")]
    rows = []
    for key, checkpointing in track(cases, "memory", console=console, transient=True):
        child = ("--memory", key, str(density), str(int(checkpointing)), f"--device={given.device}", *shape)
        rows.append(
            {
                "method": key,
                "checkpointing": checkpointing,
                "bytes": int(in_own_process(Path(__file__), *child)),
                "counted": counted(given, key, density, checkpointing=checkpointing),
            }
        )
    return rows


def times(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Medians of steps that take turns; the first of each case does not count."""
    rows = []
    for checkpointing in (False, True):
        chosen = [(key, density) for key in given.methods for density in given.densities if key != "dense"]
        lines = [("dense", 1.0), *chosen]
        cases = [Case(given, *line, checkpointing=checkpointing) for line in lines]
        name = "steps, recomputed" if checkpointing else "steps"
        rounds = [
            [clock(case.step) for case in cases]
            for _ in track(range(1 + given.rounds), name, console=console, transient=True)
        ][1:]
        seconds = [median(column) for column in zip(*rounds, strict=True)]
        for (key, density), case, mine in zip(lines, cases, seconds, strict=True):
            kept = case.patch.stats()["sparse_density"] if case.patch else 1.0
            row = {"method": key, "asked": density, "checkpointing": checkpointing, "density": round(kept, 3)}
            share = case.choosing() / mine if case.patch else 0.0
            rows.append({**row, "seconds": mine, "ratio": mine / seconds[0], "choosing": share})
    return rows


def show(console: Console, report: Mapping[str, Any]) -> None:
    table = Table(title="a training step: memory above weights and optimiser")
    for column in ("method", "recomputed", "MiB", "of dense", "counted MiB", "of dense"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in report["memory"]:
        same = [x for x in report["memory"] if x["checkpointing"] == row["checkpointing"] and x["method"] == "dense"]
        cells = [f"{row[name] / 2**20:.1f}" for name in ("bytes", "counted")]
        shares = [f"{row[name] / same[0][name]:.3f}" if same else "" for name in ("bytes", "counted")]
        table.add_row(row["method"], _yes(row), cells[0], shares[0], cells[1], shares[1])
    console.print(table)
    if not report["times"]:
        return
    table = Table(title="a training step: time")
    for column in ("method", "density", "recomputed", "s", "of dense", "choosing maps"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in report["times"]:
        figures = [f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['choosing']:.1%}"]
        table.add_row(row["method"], f"{row['density']:.3f}", _yes(row), *figures)
    console.print(table)


def _yes(row: Mapping[str, Any]) -> str:
    return "yes" if row["checkpointing"] else "no"


def main() -> None:
    given = arguments()
    if given.memory:
        key, density, checkpointing = given.memory
        print(peak(given, key, float(density), checkpointing=checkpointing == "1"))
        return
    folder, console = check_folder(given.out), Console()
    device = torch.cuda.get_device_name(given.device) if given.device.startswith("cuda") else ""
    names = ("grid", "layers", "heads", "head_dim", "densities", "rounds")
    report = {
        "environment": {**environment(), "device": device or "cpu"},
        "shape": {name: getattr(given, name) for name in names},
        "memory": memory(given, console),
        "times": [] if given.memory_only else times(given, console),
    }
    show(console, report)
    recall_report.write_text(folder / "bench_training.json", recall_report.as_json(report))
    if given.record:
        recall_report.record(given.record, "training", report)
    console.print(f"bench_training.json is in {folder}/")


if __name__ == "__main__":
    main()
