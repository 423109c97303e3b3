"""docs/quality.md: what sparsity costs on the embedded model, and what training gives back."""

from __future__ import annotations

import json
from typing import Any

from vsparse.training.study import Row
from vsparse.training.study_report import closed, markdown

from .tables import ROOT, table

REASONS: dict[str, str] = {
    "attention_tile 0.5": "its map is the same for all clips and keeps each frame's own keys and those of one frame "
    "for all; the recall of 0.63, where others have 0.88 to 0.94 at this density, says how much of what the model "
    "looks at is gone. What was there must be found anew by way of one frame, and sixty steps begin that: direction "
    "comes back, shapes and steadiness do not. More steps, or searched frames (`search_global_frames`), were not "
    "tried.",
    "jenga 0.5": "training took back 0.007 of a gap of 0.018. The error of its attention, probed by `vsparse tune` on "
    "two dense clips, falls slowest with the density: squared and summed over all heads it has 0.178 at 0.25, the "
    "least of adaspa, draft, jenga and sparge, but 0.042 at 0.5 and 0.007 at 0.75, where draft has 0.028 and 0.002. "
    "Three heads hold half of it (the first of layers 0 and 5, the second of layer 3), in which draft, whose cells lie "
    "within a frame, is off by half or less: blocks along a curve through space and time join what such heads tell "
    "apart, and training does not move the curve. More steps were not tried.",
}
"""Why a method closes less than half of the gap, by row of the study."""


def study_section(figures: dict[str, Any]) -> str:
    """What `make study` has measured."""
    rows = [Row(**row) for row in figures["rows"]]
    where, parts = figures["environment"], {i: closed(row, rows) for i, row in enumerate(rows)}
    known = [x for x in parts.values() if x is not None]
    less = [row for i, row in enumerate(rows) if parts[i] is not None and parts[i] < 0.5]
    names = [f"{row.method} {row.asked:g}" for row in less]
    reasons = "\n".join(f"- `{name}`: {REASONS[name]}" for name in names)
    return f"""## Every method, free and trained

`make study` on {where["date"][:10]}, torch {where["packages"]["torch"]}: the embedded model, {figures["clips"]} prompts
that it was not trained on, one seed. *Tuned*: {figures["steps"]} steps of eight clips, all weights, towards what the
dense model predicts from the same noisy latents (`distill.velocity` with `teacher = "start"`, no loss on the data).

{markdown(rows)}
- The number behind a name is the density that was asked for, *density* what was executed in a whole generation:
  patterns are rounded to blocks, and `attention_tile` has nothing below 0.52 for five frames. Every layer and step is
  sparse, but for `adaspa`, which searches in dense steps and is not trained. *s/step*: while other work ran.
- `unicp` computes all pairs in every second or fourth step and gives the outputs again in between. Loss and recall are
  taken on single calls, in which that is exact; what it costs shows in the clips alone. Training does not cache.
- `dsv` without training chooses by predictors of random weights, which is what its first rows show; published, they are
  trained while attention is still full.
- *loss*: on 48 held-out clips at fixed noise; *gap closed*: the share of what the loss rose by without training that
  the training took back, at least half in {sum(x >= 0.5 for x in known)} of {len(known)} rows.
- *colour* to *coherent*: how many of the generated clips show what the prompt says (`vsparse/measure/adherence.py`), by
  a program that was tried on drawn and on spoilt clips.
- *PSNR*, *SSIM*: against the dense model with the same prompt and seed. Another video that follows the prompt as well
  reads as a poor one here. *recall*: of the model's own q and k; empty where the choice needs more than these.

![held-out loss of every method](images/study.png)
""" + (
        f"""
Less than half was taken back by:

{reasons}
"""
        if less
        else ""
    )


def scratch_section(figures: dict[str, Any]) -> str:
    """What `make study-scratch` has measured."""
    where, curves = figures["environment"], figures["curves"]
    rows = []
    for name, seeds in curves.items():
        last = [seed[-1][1] for seed in seeds]
        rows.append([f"`{name}`", *(f"{x:.4f}" for x in last), f"{sum(last) / len(last):.4f}"])
    count = len(next(iter(curves.values())))
    head = ["method", *(f"seed {i}" for i in range(count)), "mean"]
    return f"""## From random weights

`make study-scratch` on {where["date"][:10]}: the embedded model's transformer from random weights, {figures["steps"]}
steps, equal data, loss on held-out clips at the end.

{table(head, rows, numbers=True)}

![held-out loss over training steps](images/scratch.png)

All of them still fall when they end: this is how training begins with a quarter of the blocks, and no order in which it
would end. The embedded model took 6 000 steps.
"""


def quality_page() -> str:
    measured = json.loads((ROOT / "docs" / "measured.json").read_text())
    head = """# What sparsity costs, and what training gives back

Generated by `python scripts/write_docs.py`. All of it on the embedded model: 1 280 tokens, six layers of two heads,
128 x 128 pixels, nine frames. Blocks have 16 tokens, so that there are 80 to choose among. A large model has more to
leave out at the same density; what stands here ranks nothing on it.
"""
    parts = [study_section(measured["study"]) if "study" in measured else ""]
    parts.append(scratch_section(measured["scratch"]) if "scratch" in measured else "")
    return "\n".join([head, *filter(None, parts)])
