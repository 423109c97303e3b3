"""Published models on 1 to 64 GPUs, predicted: writes docs/scaling.json and its picture for `write_docs.py`.

Nothing is downloaded; maps come from static patterns and from methods on data that is made from a seed. The recorded
densities are those of the embedded model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import track

from vsparse.measure import machines, recall_report, scaling, scaling_report
from vsparse.measure.demo import environment

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "scaling.json", metavar="FILE")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "scaling.png", metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", action="store_true", help="only the picture, from what the file holds")
    given = parser.parse_args()
    if not given.draw:
        console = Console()
        with console.status("recording densities of the embedded model"):
            densities = scaling.recorded_densities()
        rows = []
        for model in scaling.MODELS:
            with console.status(f"making and searching heads of {model.name}"):
                maps = scaling.maps_of(scaling.LINES, model, seed=given.seed)
            for line in track(scaling.LINES, model.name, console=console, transient=True):
                clusters = machines.clusters(line.name == "dense")
                rows.append(scaling.case(line, model, maps.pop(line.name), clusters))
        where = environment()
        report = {
            "command": "python scripts/plan_parallel.py" + (f" --seed {given.seed}" if given.seed else ""),
            "date": where["date"],
            "packages": {"torch": where["packages"]["torch"]},
            "assumed": machines.assumed(),
            "densities": [[round(x, 4) for x in row] for row in densities],
            "balance": scaling.balance_figures(densities, seed=given.seed),
            "cases": rows,
        }
        recall_report.write_text(given.out, recall_report.as_rows(report))
    scaling_report.plot(given.image, json.loads(given.out.read_text()))


if __name__ == "__main__":
    main()
