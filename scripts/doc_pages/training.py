"""docs/finetune-memory.md: what fine-tuning needs, predicted and measured."""

from __future__ import annotations

import json
from typing import Any

from .tables import NONE, ROOT, table


def fits(row: dict[str, Any], device: int) -> bool:
    return bool(row["fits"][device])


def by_size(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of one model by size of video and what learns: dense, then falling densities."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((" x ".join(map(str, row["video"])), row["train"]), []).append(row)
    return found


def needs_table(rows: list[dict[str, Any]], devices: list[dict[str, Any]]) -> str:
    """Memory and seconds of one model, a line for each size and what learns."""
    lines = []
    for (size, train), group in by_size(rows).items():
        dense = [row for row in group if row["density"] is None]
        sparse = [row for row in group if row["density"] is not None]
        memory = [f"{row['memory'] / 2**30:.1f}" for row in (*dense[:1], max(sparse, key=lambda row: row["memory"]))]
        cells = []
        for i in range(len(devices)):
            times = [f"{row['seconds'][i]:.3g}" if fits(row, i) else NONE for row in group]
            cells.append(" / ".join([NONE] * (not dense) + times) if any(fits(row, i) for row in group) else NONE)
        lines.append([size, f"`{train}`", " / ".join([NONE] * (not dense) + memory), *cells])
    head = ["frames x height x width", "learns", "GiB: dense / `vsa`", *(f"{x['name']}, s" for x in devices)]
    return table(head, lines, numbers=True)


def choices(report: dict[str, Any]) -> str:
    """What fits on each GPU with the method in place."""
    lines = []
    for i, device in enumerate(report["devices"]):
        found: dict[str, list[str]] = {}
        for row in report["rows"]:
            if row["density"] == min(x["density"] or 1 for x in report["rows"]) and fits(row, i):
                found.setdefault(f"{row['model']} at {' x '.join(map(str, row['video']))}", []).append(
                    f"`{row['train']}`"
                )
        words = "; ".join(f"{name}: {', '.join(what)}" for name, what in found.items())
        lines.append(f"- **{device['name']}**: {words or 'none of these'}.")
    return "\n".join(lines)


def training_section(figures: dict[str, Any]) -> str:
    """What `make bench-training` has measured."""
    shape, where = figures["shape"], figures["environment"]
    dense = {row["checkpointing"]: row for row in figures["memory"] if row["method"] == "dense"}
    rows = []
    for row in figures["memory"]:
        cells = []
        for name in ("bytes", "counted"):
            cells += [f"{row[name] / 2**20:.0f}", f"{row[name] / dense[row['checkpointing']][name]:.3f}"]
        rows.append([f"`{row['method']}`", *_checkpointing(row), *cells])
    head = ["method", "checkpointing", "measured, MiB", "of dense", "counted, MiB", "of dense"]
    model = f"{shape['layers']} layers, {shape['grid']} tokens, {shape['heads']} heads of {shape['head_dim']}"
    device = where["cpu"] if where["device"] == "cpu" else where["device"]
    text = f"""## Measured

`make bench-training` on {where["date"][:10]}, torch {where["packages"]["torch"]}, {device}: {model}.

Memory of one step above weights and optimiser. Measured: each case in a process of its own, which repeats within two
hundredths. Counted: the bytes of tensors in the same step, as above.

What dense attention keeps for its backward, sparse attention keeps: queries, keys, values, the result and its
log-sum. `vsa` and `sla` keep the sum with their second branch as well. On the other side a patched attention runs the
norms of its queries and keys again in the backward, where the stock one keeps what they leave: under autocast two
float32 tensors of their size on a CPU, one where the norm is fused. In bfloat16 without autocast a fused norm leaves
nothing to win, and `vsa` and `sla` need that sum more than dense attention; not measured.

{table(head, rows, numbers=True)}
"""
    if not figures["times"]:
        return text
    head = ["method", "density", "checkpointing", "s", "of dense", "choosing maps"]
    rows = []
    for row in figures["times"]:
        cells = [f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['choosing']:.1%}"]
        rows.append([f"`{row['method']}`", f"{row['density']:.3f}", *_checkpointing(row), *cells])
    return f"""{text}
Time of a step: all cases in turn, medians of {shape["rounds"]}; choosing maps as a share of the step.

{table(head, rows, numbers=True)}
"""


def _checkpointing(row: dict[str, Any]) -> list[str]:
    return ["yes" if row["checkpointing"] else "no"]


def needs_page() -> str:
    report = json.loads((ROOT / "docs" / "predicted.json").read_text())
    measured = json.loads((ROOT / "docs" / "measured.json").read_text()).get("training")
    first, packages = report["devices"][0], report["packages"]
    peaks = ", ".join(f"{x['name']}: {x['peak'] / 1e12:.0f} TFLOP/s" for x in report["devices"])
    densities = " / ".join(f"{x:g}" for x in dict.fromkeys(row["density"] for row in report["rows"]) if x)
    taken = f"torch {packages['torch']}, diffusers {packages['diffusers']}, {report['date'][:10]}"
    head = f"""# What fine-tuning needs

Generated by `python scripts/write_docs.py`. For a run of your own,

    vsparse finetune run.toml --predict

reads the settings and the model's configuration, no weights and no data, and prints memory and time of a step.

## Predicted, not measured

No GPU was used. `{report["command"]}` runs one training step of each model on tensors without values: gradient
checkpointing, one clip in a batch, products in bfloat16, AdamW, LoRA of rank 32, frozen weights in bfloat16
({taken}).

Memory is the most bytes that tensors hold at once: weights, gradients, optimiser state, and what the step keeps. The
same count agrees to the byte with real steps of a tiny model on a CPU. Not in it: the encoders, which are off the GPU
during a step, what kernels need for themselves, and what a GPU dispatches otherwise than a CPU.

Time is FLOPs over a rate, and the rates are assumptions: {first["efficiency"]:.0%} of the data sheet's bfloat16 peak
for layers and full attention, {first["sparse"]:.0%} for sparse attention ({peaks}). {first["spare"]:.0%} of the memory
is left for what is not tensors.

Cells: seconds per step, dense / `vsa` at density {densities}; {NONE}: does not fit, or there is no such run.
"""
    tables = []
    for model in dict.fromkeys(row["model"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["model"] == model]
        tables.append(f"### {model}\n\n{needs_table(rows, report['devices'])}\n")
    reading = f"""## What fits

With `vsa`, gradient checkpointing and one clip in a batch, by these predictions:

{choices(report)}

Checkpointing keeps the inputs of the blocks, so memory grows with layers times tokens; a density changes time, hardly
memory. What a method adds is trained in float32 with two moments: the gates of `vsa`, as large as one of the four
projections of each attention, take more than LoRA does. Where it does not fit: fewer frames or a smaller size,
`train.shard = true` over several GPUs, or LoRA with a method that has no parameters (`vmoba`, `draft`).
"""
    return "\n".join([head, *tables, reading, *([training_section(measured)] if measured else [])])
