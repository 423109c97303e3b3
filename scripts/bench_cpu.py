"""Block-sparse against dense attention on the CPU, as ratios in one run: `make bench`.

Times: sparse and dense calls take turns, the figure is the ratio of their medians. Memory: each case runs in a process
of its own; the figure is how far the call lifts the resident set above where it stood (Linux). Dense is
`scaled_dot_product_attention` on tensors in the layout that it likes best, `[B, H, S, D]`; sparse runs through the
public op on `[B, S, H, D]`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
from pathlib import Path
from statistics import median
from typing import Any

import torch
from resident import clock, in_own_process, lift
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import vsparse
from vsparse import BlockMap, Grid, RasterLayout, TileLayout, select

BLOCK = 64
MAPS = ("uniform", "uneven", "full")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=9, help="calls of each kind; the median counts")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--memory", nargs=3, metavar=("KIND", "DTYPE", "PASS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def random_map(kind: str, heads: int, blocks: int, density: float) -> BlockMap:
    """Random lists: the same count in every row, counts from half to one and a half times as many, or full rows."""
    blocking = RasterLayout(Grid(t=1, h=blocks, w=BLOCK), block=BLOCK).bind()
    if kind == "full":
        return BlockMap.full(blocking)
    generator = torch.Generator().manual_seed(0)
    count = torch.full((1, heads, blocks), max(1, math.ceil(density * blocks)))
    if kind == "uneven":
        count = (count * (0.5 + torch.rand(count.shape, generator=generator))).round().long().clamp(1, blocks)
    scores = torch.rand(1, heads, blocks, blocks, generator=generator)
    return select.top_k(scores, blocking, count=count, capacity=int(count.max()))


class Case:
    """One sparse call and the dense one beside it."""

    def __init__(self, given: argparse.Namespace, kind: str, dtype: torch.dtype, *, train: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (1, given.slots, given.heads, given.head_dim)
        self.train = train
        self.inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_(train) for _ in range(3)]
        self.heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_(train) for x in self.inputs]
        self.gradient = torch.randn(shape, generator=generator).to(dtype)
        self.gradient_heads_first = self.gradient.transpose(1, 2).contiguous()
        self.blocks = random_map(kind, given.heads, given.slots // BLOCK, given.density)

    def sparse(self) -> Tensor:
        out, _ = vsparse.block_sparse_attention(*self.inputs, self.blocks)
        return self._backward(out, self.inputs, self.gradient)

    def dense(self) -> Tensor:
        out = F.scaled_dot_product_attention(*self.heads_first)
        return self._backward(out, self.heads_first, self.gradient_heads_first)

    def _backward(self, out: Tensor, inputs: list[Tensor], gradient: Tensor) -> Tensor:
        if self.train:
            torch.autograd.grad(out, inputs, gradient)
        return out


def ratios(given: argparse.Namespace, kind: str, dtype: torch.dtype, *, train: bool) -> dict[str, Any]:
    """Medians of interleaved calls."""
    case = Case(given, kind, dtype, train=train)
    with torch.set_grad_enabled(train):
        for call in (case.sparse, case.dense):
            call()
        times = [(clock(case.sparse), clock(case.dense)) for _ in range(given.rounds)]
    sparse, dense = (median(column) for column in zip(*times, strict=True))
    best = min(column[1] for column in times) / min(column[0] for column in times)
    return {"sparse_ms": sparse * 1e3, "dense_ms": dense * 1e3, "faster": dense / sparse, "faster_at_best": best}


def memory_child(given: argparse.Namespace, which: str, dtype: str, step: str) -> int:
    """Bytes by which one call lifts the resident set; a small call has warmed the process up."""
    small = argparse.Namespace(**{**vars(given), "slots": 8 * BLOCK})
    for size in (small, given):
        case = Case(size, "uniform", getattr(torch, dtype), train=step == "train")
        with torch.set_grad_enabled(case.train):
            found = lift(case.dense if which == "dense" else case.sparse)
    return found


def memory(given: argparse.Namespace, dtype: str, step: str) -> dict[str, int]:
    """Added peak of sparse and dense, each in a fresh process."""
    found = {}
    for which in ("sparse", "dense"):
        sizes = [
            f"--{name.replace('_', '-')}={getattr(given, name)}" for name in ("slots", "heads", "head_dim", "density")
        ]
        found[which] = int(in_own_process(Path(__file__), "--memory", which, dtype, step, *sizes))
    return found


def preparation(given: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """What a method spends around the kernel: choosing tiles, packing and unpacking, in ms."""
    side = round((given.slots / 8) ** 0.5 / 4) * 4
    grid = Grid(t=8, h=side, w=side)
    blocking = TileLayout(grid, tile=(4, 4, 4)).bind()
    x = torch.randn(1, grid.tokens, given.heads, given.head_dim).to(dtype)
    packed = blocking.pack(x)

    def choose() -> BlockMap:
        q, k = vsparse.block_pool(packed, blocking), vsparse.block_pool(packed, blocking)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
        count = max(1, math.ceil(given.density * blocking.blocks))
        return select.top_k(scores, blocking, count=count, capacity=count)

    calls = {
        "pool, score, top-k, map": choose,
        "pack": lambda: blocking.pack(x),
        "unpack": lambda: blocking.unpack(packed),
    }
    with torch.no_grad():
        return {name: median(clock(call) for _ in range(given.rounds)) * 1e3 for name, call in calls.items()}


def environment(given: argparse.Namespace) -> dict[str, Any]:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": {"slots": given.slots, "heads": given.heads, "head_dim": given.head_dim, "block": BLOCK},
        "density": given.density,
        "rounds": given.rounds,
    }


def main() -> None:
    given = arguments()
    if given.memory:
        print(memory_child(given, *given.memory))
        return
    console = Console()
    report: dict[str, Any] = {"environment": environment(given), "times": [], "memory": [], "preparation_ms": {}}
    console.print(report["environment"])
    cases = [(kind, dtype, train) for dtype in ("float32", "bfloat16") for kind in MAPS for train in (False, True)]
    for kind, dtype, train in track(cases, "timing", console=console, transient=True):
        found = ratios(given, kind, getattr(torch, dtype), train=train)
        report["times"].append({"map": kind, "dtype": dtype, "pass": "train" if train else "forward", **found})
    for dtype in track(("float32", "bfloat16"), "memory", console=console, transient=True):
        report["memory"] += [
            {"dtype": dtype, "pass": step, **memory(given, dtype, step)} for step in ("forward", "train")
        ]
        report["preparation_ms"][dtype] = preparation(given, getattr(torch, dtype))

    table = Table("map", "dtype", "pass", "sparse ms", "dense ms", "times as fast as dense", "at best", title="time")
    for row in report["times"]:
        figures = [f"{row[name]:.1f}" for name in ("sparse_ms", "dense_ms")]
        figures += [f"{row[name]:.2f}" for name in ("faster", "faster_at_best")]
        table.add_row(row["map"], row["dtype"], row["pass"], *figures)
    console.print(table)
    table = Table("dtype", "pass", "sparse MiB", "dense MiB", title=f"peak memory of a call, density {given.density}")
    for row in report["memory"]:
        table.add_row(row["dtype"], row["pass"], f"{row['sparse'] / 2**20:.1f}", f"{row['dense'] / 2**20:.1f}")
    console.print(table)
    for dtype, found in report["preparation_ms"].items():
        console.print(f"{dtype}: " + ", ".join(f"{name} {value:.2f} ms" for name, value in found.items()))
    if given.json:
        scratch = given.json.with_name(given.json.name + ".part")
        scratch.write_text(json.dumps(report, indent=2) + "\n")
        scratch.rename(given.json)


if __name__ == "__main__":
    main()
