"""The timing of launch configurations: its dry run, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "tune_kernels.py"
DRY = "dry run, no meaning"

# The script with a forward kernel that spoils a number when its tile has 32 query rows.
SPOILED = """
import sys
import tune_kernels as tune

kernel = tune.launch.attend

class Spoiled:
    def __getitem__(self, grid):
        def run(*args, **options):
            made = kernel[grid](*args, **options)
            if options["BM"] == 32:
                args[3][0, 5, 0, 0] += 1.0
            return made
        return run

tune.launch.attend = Spoiled()
tune.FINAL = 0  # all in turns, then the shipped one alone
sys.exit(tune.main())
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A Python without a GPU that sees the tree and the scripts."""
    path = os.pathsep.join(map(str, (ROOT, SCRIPT.parent)))
    variables = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=120
    )


def found(folder: Path) -> Any:
    return json.loads((folder / "tune_kernels.json").read_text())


@pytest.mark.slow
def test_dry_run_times_every_kernel_and_says_what_it_is_worth(tmp_path: Path) -> None:
    done = run(str(SCRIPT), "--dry-run", "--widths", "64", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tune_kernels.json", "tune_kernels.txt"}
    report = found(tmp_path)
    assert (report["dry_run"], report["timings"]) == (True, DRY)
    assert "--dry-run" in report["environment"]["command"]
    assert [row["step"] for row in report["rows"]] == ["attend", "grad_queries", "grad_keys"]
    for row in report["rows"]:
        assert (row["status"], row["width"], row["block"]) == ("measured", 64, 64)
        assert row["ratio"] == pytest.approx(row["shipped"]["ms"] / row["best"]["ms"])
        assert row["ratio"] >= 1.0
        assert row["behind"] == (row["ratio"] > 1.03) == bool(row["write"])
    assert {trial["status"] for trial in report["trials"]} == {"timed"}
    assert {trial["step"] for trial in report["trials"] if trial["tma"]} == {"attend"}
    assert all(0.0 <= share <= 1.0 for trial in report["trials"] for share in trial["errors"].values())
    table = (tmp_path / "tune_kernels.txt").read_text()
    assert table in done.stdout
    figures = [line for line in done.stdout.splitlines() if line.startswith(("attend", "grad", "[", "  _"))]
    assert len(figures) >= 3 + 12 + 3
    assert all(DRY in line for line in figures)


@pytest.mark.slow
def test_a_wrong_candidate_is_never_timed(tmp_path: Path) -> None:
    options = ("--dry-run", "--steps", "attend", "--widths", "64", "--workers", "0", "--out", str(tmp_path))
    done = run("-c", SPOILED, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = found(tmp_path)
    states = {(trial["bm"], trial["bn"], trial["tma"]): trial["status"] for trial in report["trials"]}
    right = {(64, 64, False): True, (64, 64, True): False, (64, 32, False): False, (64, 32, True): False}
    assert states == dict.fromkeys(right, "timed") | dict.fromkeys([(32, 64, False), (32, 64, True)], "refused")
    wrong = [trial for trial in report["trials"] if trial["status"] == "refused"]
    assert all(trial["words"].startswith("out: error ") and "ms" not in trial for trial in wrong)
    finals = {(x["bm"], x["bn"], x["tma"]): x["final"] for x in report["trials"] if x not in wrong}
    assert finals == right
    assert report["rows"][0]["best"] == report["rows"][0]["shipped"]


def test_without_a_gpu_it_refuses_in_words() -> None:
    done = run(str(SCRIPT))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "--dry-run" in done.stderr
