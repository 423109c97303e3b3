"""Compare the methods: `make compare`; writes out/compare/.

Recall of attention mass against density, every method beside random blocks; and on this machine the time of choosing a
map, as a share of the attention that is left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from vsparse.measure import recall_report
from vsparse.measure.compare import compare, embedded_samples, structured_sets, sweeps
from vsparse.measure.selection import GRID, selection_cost, selection_summary, selection_table
from vsparse.measure.video import check_folder

NOTE = (
    "Recall: share of the exact softmax of the video queries (float64) on the keys that are kept. Blocks of 16 tokens; "
    "means over heads and layers.\nOne forward each: no schedule, no training, no picture of quality. "
    "Random blocks: the same layout, as many tokens in every row."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/compare"), metavar="FOLDER")
    parser.add_argument("--record", type=Path, metavar="FILE", help="also put the summary into docs/measured.json")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder, console = check_folder(given.out), Console()
    with console.status("running the embedded model"):
        sets = {**structured_sets(given.seed), "embedded model": embedded_samples(seed=given.seed)}
    lines, found = sweeps(), {}
    with Progress(console=console) as progress:
        for name, samples in sets.items():
            task = progress.add_task(name, total=len(lines))
            found[name] = compare(samples, lines, seed=given.seed, began=lambda _, task=task: progress.advance(task))
    for name, points in found.items():
        console.print(recall_report.recall_table(name, points))
    command = ["python", "scripts/compare_methods.py", "--seed", str(given.seed)]
    with console.status("timing the choice of maps"):
        costs = selection_cost()
    console.print(selection_table(costs))
    report = recall_report.report(found, command)
    shape = {"slots": GRID.tokens, "heads": 4, "head_dim": 64, "dtype": "float32"}
    choice = {**shape, "lines": selection_summary(costs)}
    recall_report.write_text(folder / "recall.json", recall_report.as_json({**report, "selection": choice}))
    recall_report.write_text(folder / "recall.md", recall_report.markdown(found))
    recall_report.plot(folder / "recall.png", found, title="How much attention a map catches", note=NOTE)
    if given.record:
        recall_report.record(given.record, "recall", recall_report.summary(found, command))
        where = report["environment"]
        taken = {"command": report["command"], "date": where["date"], "torch": where["packages"]["torch"]}
        machine = {"cpu": where["cpu"], "threads": where["threads"]}
        recall_report.record(given.record, "selection", {**taken, **machine, **choice})
    console.print(f"recall.json, recall.md and recall.png are in {folder}/")


if __name__ == "__main__":
    main()
