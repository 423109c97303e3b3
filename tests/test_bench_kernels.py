"""The benchmark of the GPU kernels: its dry run, its refusals, its arithmetic."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vsparse import backend

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "bench_kernels.py"
STATES = {"pass", "fail", "not measured"}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """The script as it is run without an installation: the tree on the path and nothing else."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a module of the benchmark."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return lambda name: importlib.import_module(f"kernel_bench.{name}")


@pytest.fixture(scope="session")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of one dry run."""
    folder = tmp_path_factory.mktemp("bench")
    done = run("--dry-run", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("bench")
def test_dry_run_writes_what_it_promises_and_says_what_it_is_worth(dry: tuple[Path, str]) -> None:
    folder, screen = dry
    assert {path.name for path in folder.iterdir()} == {f"bench_kernels.{kind}" for kind in ("json", "md", "png")}
    report = json.loads((folder / "bench_kernels.json").read_text())
    assert report["dry_run"] is True
    assert report["timings"] == "dry run, no meaning"
    assert "dry run, no meaning" in (folder / "bench_kernels.md").read_text().splitlines()[0]
    assert (folder / "bench_kernels.png").read_bytes().startswith(b"\x89PNG")
    unmarked = [line for line in screen.splitlines() if " ms" in line and "dry run, no meaning" not in line]
    assert not unmarked


@pytest.mark.slow
@pytest.mark.xdist_group("bench")
def test_dry_run_goes_through_every_stage(dry: tuple[Path, str]) -> None:
    report = json.loads((dry[0] / "bench_kernels.json").read_text())
    wanted = ["ceilings", "correctness", "properties", "forward", "backward", "parts", "moving", "search", "baselines"]
    assert {name: stage["words"] for name, stage in report["stages"].items()} == dict.fromkeys(wanted, "")
    checked = {row["variant"]: row["status"] for row in report["correctness"]}
    assert {row["status"] for row in report["correctness"] if row["variant"] != "descriptors"} == {"pass"}
    assert checked == {"": "pass", "bias": "pass", "full": "pass", "descriptors": "not measured"}
    for name, words in (("forward", "needs a CUDA device"), ("backward", "the backward has none")):
        assert {row["descriptors"]["status"] for row in report[name]} == {"refused"}
        assert words in report[name][0]["descriptors"]["words"]
    assert all(
        row["status"] == "measured"
        for name in ("forward", "backward", "parts", "moving", "search")
        for row in report[name]
    )
    assert report["environment"]["torch"] == torch.__version__
    assert "--dry-run" in report["environment"]["command"]


@pytest.mark.slow
@pytest.mark.xdist_group("bench")
def test_every_property_has_a_state_and_its_reason(dry: tuple[Path, str]) -> None:
    rows = json.loads((dry[0] / "bench_kernels.json").read_text())["properties"]
    assert len(rows) == 7
    assert {row["status"] for row in rows} <= STATES
    assert all(row["words"] for row in rows if row["status"] != "pass")
    assert {row["name"] for row in rows if row["status"] == "pass"} == {"deterministic", "autocast"}


def test_without_a_gpu_it_refuses_in_words() -> None:
    done = run()
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "--dry-run" in done.stderr


@contextlib.contextmanager
def wrong(op: str, name: str) -> Iterator[None]:
    """Let the CPU implementation of an op spoil one number of its first output."""
    (row,) = [row for row in backend.implementations(op, "cpu") if row.name == name]

    def spoiled(*args: Any, **options: Any) -> Any:
        out, *rest = row.run(*args, **options)
        out = out.clone()
        out[0, 70, 0, 0] += 1.0
        return out, *rest

    entry = (1, row._replace(run=spoiled))
    backend._TABLE[op].insert(0, entry)
    try:
        yield
    finally:
        backend._TABLE[op].remove(entry)


def checked(bench: Any, folder: Path) -> Any:
    """A dry session in this process after the checks of attention."""
    session = bench("session").Session(
        torch.device("cpu"), True, 60.0, SCRIPT, 0, bench("report").Report(folder, dry=True), bench("session").Screen()
    )
    bench("verdicts").run(
        [case for case in bench("samples").tiny_cases() if case.kind == "attention"], session.verdicts,
        script=SCRIPT, device=session.device, tiny=True, workers=0, seconds=60.0, report=lambda case, result: None,
    )  # fmt: skip
    return session


@pytest.mark.parametrize("step", ["forward", "backward"])
def test_a_wrong_kernel_is_refused_for_timing(step: str, bench: Any, tmp_path: Path) -> None:
    op = "block_sparse_attention" + ("_backward" if step == "backward" else "")
    with wrong(op, "gathered"):
        session = checked(bench, tmp_path)
    session.verdicts.found = {case: found for case, found in session.verdicts.found.items() if case.width == 64}
    states = {row["pass"]: row["status"] for row in session.verdicts.rows() if not row["variant"]}
    assert states == {"forward": "fail" if step == "forward" else "pass", "backward": "fail"}
    bench("sweeps").sweep(session, step, 30.0)
    rows = session.report.data[step]
    assert rows
    assert {row["status"] for row in rows} == {"refused"}
    assert all("ms" not in row for row in rows)
    assert "error" in rows[0]["words"]
    assert "was not checked" in rows[-1]["words"]
    session.report.write()
    assert "refused" in (tmp_path / "bench_kernels.md").read_text()


def test_descriptors_are_timed_beside_the_shipped_kernel_once_they_are_right(bench: Any, tmp_path: Path) -> None:
    session, samples, sweeps = checked(bench, tmp_path), bench("samples"), bench("sweeps")
    case = samples.Case("attention", 64, 64, 64, "bfloat16", "descriptors")
    assert "needs a CUDA device" in session.verdicts.found[case]["forward"]
    group = bench("plan").tiny_groups()[0]
    session.report.data["ceilings"] = {name: {"value": 1e12, "unit": "/s"} for name in ("matrix", "copy")}
    assert {row["descriptors"]["status"] for row in sweeps.measure(session, group, "forward")} == {"refused"}
    session.verdicts.found[case] = {"forward": "", "backward": "", "errors": {}}
    rows = sweeps.measure(session, group, "forward")
    for row in rows:
        assert row["status"] == row["descriptors"]["status"] == "measured"
        assert row["descriptors"]["ratio"] == pytest.approx(row["ms"] / row["descriptors"]["ms"])
        assert "by descriptors" in sweeps.line(row)
    session.report.data["forward"] = rows
    assert "ms by descriptors" in session.report.markdown()
    session.verdicts.found[case] = {"forward": "out: error", "backward": "", "errors": {}}
    assert session.verdicts.refusal(64, (64, 64), torch.bfloat16, "forward") == ""
    assert session.verdicts.descriptors(64, (64, 64), torch.bfloat16) == "out: error"


def test_a_check_that_kills_its_process_is_a_verdict(bench: Any) -> None:
    verdicts, case = bench("verdicts"), bench("samples").tiny_cases()[0]
    worker = verdicts._Worker([sys.executable, "-c", "import os; input(); os._exit(9)"], torch.device("cpu"))
    for _ in range(2):  # the second time in a new process
        assert "ended with 9" in worker.ask(case)["forward"]
    worker.close()


def test_flops_of_a_map(bench: Any) -> None:
    plan, inputs = bench("plan"), bench("inputs")
    side = inputs.blocking(3 * 64 - 10, 64, torch.device("cpu"))
    everything = inputs.random_map(side, side, 2, 1.0, seed=0)
    pairs = inputs.executed_pairs(everything, 1, 2)
    assert pairs == 2 * 182**2
    assert plan.flops(pairs, 80, "forward") == 4 * 2 * 182**2 * 80
    assert plan.flops(pairs, 80, "backward") == 2.5 * plan.flops(pairs, 80, "forward")
    one = inputs.random_map(side, side, 2, 1 / 3, seed=0)
    assert one.count.unique().tolist() == [1]
    lengths = side.length[0, 0].double()
    assert inputs.executed_pairs(one, 1, 2) == float((lengths * lengths[one.index[0, :, :, 0].long()]).sum())


def test_kept_blocks_of_the_reference_shape(bench: Any) -> None:
    plan, inputs = bench("plan"), bench("inputs")
    first = plan.all_groups()[0]
    assert (first.slots, first.heads, first.width, first.block, first.must) == (109_632, 7, 128, (64, 64), True)
    side = inputs.blocking(first.slots, 64, torch.device("cpu"))
    assert inputs.random_map(side, side, 1, min(first.densities), seed=0).capacity == 64


@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("seconds", [0.0, 20.0, 60.0, 150.0, 1e9])
def test_cover_keeps_the_order_the_budget_and_what_must_be(step: Any, seconds: float, bench: Any) -> None:
    plan = bench("plan")
    groups = plan.all_groups()
    kept, dropped = plan.cover(groups, step, seconds)
    assert kept[0] is groups[0]
    assert sorted([*kept, *(x.group for x in dropped)], key=groups.index) == groups
    assert [groups.index(group) for group in kept] == sorted(groups.index(group) for group in kept)
    spent = sum(plan.estimate(group, step) for group in kept)
    assert spent <= seconds or kept == groups[:1]
    assert all(x.reason and x.step == step for x in dropped)
    assert bool(dropped) == (seconds < 1e9)


def test_all_shapes_are_in_the_plan(bench: Any) -> None:
    plan = bench("plan")
    groups = plan.all_groups()
    assert len({(g.slots, g.heads, g.width, g.block) for g in groups}) == len(groups)
    shapes = {(g.slots, g.heads, g.width) for g in groups if g.block == (64, 64)}
    assert shapes == {(s, h, d) for s in plan.SLOTS for h in plan.HEADS for d in plan.WIDTHS}
    assert {x for g in groups for x in g.densities} == set(plan.DENSITIES)


def test_dense_attention_is_timed_on_as_many_heads_as_fit(bench: Any) -> None:
    plan = bench("plan")
    small, large = (plan.Group(slots, 40, 128, (64, 64), (0.1,)) for slots in (4096, 118_800))
    assert plan.dense_heads(small, "forward") == 40
    assert 1 <= plan.dense_heads(large, "backward") < plan.dense_heads(large, "forward") < 40


def test_budget_is_divided_by_weight(bench: Any) -> None:
    assert bench("plan").shares(60.0, [("a", 2.0), ("b", 1.0)]) == {"a": 40.0, "b": 20.0}
    assert bench("plan").shares(-5.0, [("a", 1.0)]) == {"a": 0.0}


def test_law_sees_what_is_wrong(bench: Any) -> None:
    law = bench("law").law
    truth = torch.randn(4, 5, dtype=torch.float64)
    truth[0, 0] = -torch.inf
    working = truth.float()
    assert law("x", working.clone(), [working], truth)[0] == ""
    for place, value in (((1, 1), torch.nan), ((0, 0), 0.0), ((2, 2), torch.inf), ((3, 3), 100.0)):
        spoiled = working.clone()
        spoiled[place] = value
        assert law("x", spoiled, [working], truth)[0].startswith("x: ")
    assert "bfloat16" in law("x", working.bfloat16(), [working], truth)[0]
