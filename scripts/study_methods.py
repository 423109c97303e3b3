"""What each method costs in quality on the embedded model: `make study`; writes out/study/.

Dense, then every method at density 0.5 and 0.25, training-free and after a short fine-tune of everything to what the
dense model predicts: loss on held-out clips, adherence of generated ones to their prompts, PSNR and SSIM to dense,
recall. A run that was stopped goes on; hours on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
from pathlib import Path

import torch
from rich.console import Console

from vsparse.measure.demo import environment
from vsparse.measure.recall_report import record, write_text
from vsparse.training.study import SUBJECTS, Study
from vsparse.training.study_report import markdown, plot, table


def main() -> None:
    known = [subject.method for subject in SUBJECTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/study"), metavar="FOLDER")
    parser.add_argument("--methods", nargs="*", choices=known, default=known, metavar="KEY")
    parser.add_argument("--steps", type=int, default=60, help="of each fine-tune")
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts to generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", type=Path, metavar="FILE", help="also put the rows into docs/measured.json")
    parser.add_argument("--image", type=Path, metavar="FILE", help="where the picture goes (default: with the rows)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.width = max(console.width, 130)  # of the table
    study = Study(given.out, steps=given.steps, prompts=given.prompts, seed=given.seed)
    chosen = [subject for subject in SUBJECTS if subject.method in given.methods]
    with console.status("") as status:
        rows = study.rows(chosen, lambda name: status.update(name))
    console.print(table(rows))
    write_text(given.out / "table.md", markdown(rows))
    image = plot(given.image or given.out / "loss.png", rows)
    if given.record:
        report = {"environment": environment(), "steps": given.steps, "clips": len(study.wanted), "seed": given.seed}
        record(given.record, "study", {**report, "rows": [dc.asdict(row) for row in rows]})
    console.print(f"written: {given.out}/table.md, {image}, one JSON file a row", highlight=False)


if __name__ == "__main__":
    main()
