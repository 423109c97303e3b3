"""The compile gate: the shipped kernels pass it, and it says in words what it finds."""

from __future__ import annotations

import dataclasses as dc
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vsparse.kernels.block_sparse import tuning
from vsparse.kernels.tiles import Width

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "kernel_gate.py"


sys.path.insert(0, str(SCRIPT.parent))
gate = importlib.import_module("kernel_gate")
cases, figures, limits = (importlib.import_module(f"kernel_code.{name}") for name in ("cases", "figures", "limits"))

CASE = cases.Case("attend", 90, "bf16", 128, 64, 64)
GOOD = figures.Figures(
    bm=64, bn=64, warps=4, stages=3, registers=168, spill=0, shared=112 * 1024, tensor_columns=0, occupancy=2, wgmma=12,
    mma=0, tcgen=0, serial=False, tma=0, copies=48, narrow=0, local=0, slack=3, seconds=0.5,
)  # fmt: skip
LIMITS = tuning.Limits(occupancy=2, slack=2)


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("which", [["--quick"], pytest.param([], marks=pytest.mark.full)], ids=["quick", "all"])
def test_the_shipped_kernels_pass(which: list[str]) -> None:
    told = run(*which)
    assert told.returncode == 0, told.stdout + told.stderr


def test_a_changed_source_is_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("kernels/attend", "scripts/kernel_code"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "code.py").write_text("x = 1\n")
    monkeypatch.setattr(gate, "BASELINE", tmp_path / "scripts" / "kernel_gate.json")
    first = gate.digest()
    assert gate.digest() == first
    (tmp_path / "kernels/attend/notes.md").write_text("x\n")
    assert gate.digest() == first
    (tmp_path / "kernels/attend/code.py").write_text("x = 2\n")
    assert gate.digest() != first


def test_in_turn_every_kernel_is_compiled_once() -> None:
    both = cases.shipped((80, 90), False)
    found = gate.in_turn(both)
    forms = [dc.replace(case, arch=0) for case in found]
    assert len(set(forms)) == len(forms)
    assert set(forms) == {dc.replace(case, arch=0) for case in both}
    counts = [sum(case.arch == arch for case in found) for arch in (80, 90)]
    assert min(counts) >= len(found) // 3, counts


def test_interpreted_kernels_are_refused() -> None:
    told = run(interpret=True)
    assert told.returncode == 1
    assert "TRITON_INTERPRET is set" in told.stdout


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "kilobytes", "columns", "programs"),
    [
        (90, 128, 4, 40, 0, 4),  # registers
        (90, 129, 4, 40, 0, 3),  # allocated in units of 8
        (90, 128, 8, 96, 0, 2),
        (90, 129, 8, 96, 0, 1),
        (90, 255, 4, 0, 0, 2),
        (90, 32, 4, 113, 0, 2),  # 1 KB of each program's share is the system's
        (90, 32, 4, 114, 0, 1),
        (89, 32, 4, 56, 0, 1),  # 100 KB there
        (89, 16, 4, 0, 0, 12),  # threads
        (80, 16, 1, 0, 0, 32),  # programs
        (100, 64, 4, 8, 256, 2),  # tensor memory
    ],
)
def test_occupancy(arch: int, registers: int, warps: int, kilobytes: int, columns: int, programs: int) -> None:
    assert figures.occupancy(arch, registers, warps, kilobytes * 1024, columns) == programs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"shared": 228 * 1024}, "needs 228.0 KB of shared memory, and a program can have 227 KB"),
        ({"occupancy": 1}, "1 programs fit a multiprocessor with 168 registers and 112.0 KB"),
        ({"spill": 8}, "a thread spills 8 bytes, at most 0"),
        ({"local": 2}, "2 loads and stores of local memory"),
        ({"wgmma": 0}, "no wgmma instructions"),
        ({"mma": 4}, "4 products of single warps (HMMA)"),
        ({"serial": True}, "a wait behind every product of a warp group"),
        ({"narrow": 1}, "1 copies in a loop step move fewer than 16 bytes, at most 0"),
        ({"slack": 0}, "the loop waits until 0 groups of copies are under way, where 2 may stay so"),
    ],
)
def test_breaches_are_told_in_words(change: dict[str, Any], words: str | None) -> None:
    found = list(limits.breaches(CASE, dc.replace(GOOD, **change), LIMITS))
    assert len(found) == (words is not None)
    if words is not None:
        assert words in found[0]


def test_descriptors_must_be_there_where_they_are_asked_for() -> None:
    case = dc.replace(CASE, variant="tma")
    asked = limits.limits_of(case)
    assert asked.tma
    assert not limits.limits_of(CASE).tma
    good = dc.replace(GOOD, occupancy=asked.occupancy, copies=0, slack=0, tma=2)
    assert limits.judged(case, good) == []
    assert limits.judged(case, dc.replace(good, tma=0)) == ["no copies by tensor descriptors (UTMALDG)"]


def test_limits_can_allow() -> None:
    loose = tuning.Limits(occupancy=1, spill=32, narrow=1, serial=True)
    worse = dc.replace(GOOD, occupancy=1, spill=32, local=9, narrow=1, serial=True, slack=0)
    assert not list(limits.breaches(CASE, worse, loose))
    assert list(limits.breaches(CASE, dc.replace(worse, local=17), loose)) == [
        "17 loads and stores of local memory, at most 16"
    ]


def test_float32_is_held_to_resources_only() -> None:
    case = dc.replace(CASE, dtype="fp32")
    assert not list(limits.breaches(case, dc.replace(GOOD, wgmma=0, slack=0), tuning.Limits()))
    assert list(limits.breaches(case, dc.replace(GOOD, wgmma=0, spill=4), tuning.Limits()))


def test_small_tiles_are_for_single_warps() -> None:
    small = dc.replace(GOOD, bn=32, wgmma=0, mma=8)
    assert not list(limits.breaches(dc.replace(CASE, step="grad_keys", d=256), small, LIMITS))
    assert list(limits.breaches(CASE, small, LIMITS))


OTHERS = {case.name: case for case in cases.shipped((80, 90), False) if case.step not in cases.STEPS}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("merge sm_90 bf16 D128 64x64", {"wgmma": 0, "slack": 0, "spill": 32, "local": 16}, []),
        ("merge sm_90 bf16 D128 64x64", {"spill": 36}, ["a thread spills 36 bytes, at most 32"]),
        ("pool sm_80 bf16 D128 64x64", {"shared": 164 * 1024}, ["needs 164.0 KB of shared memory"]),
        ("select/reach sm_90", {"wgmma": 0, "spill": 40, "local": 17}, ["spills 40 bytes", "17 loads and stores"]),
        ("pair_mass/all sm_90 bf16 D128 64x64", {"wgmma": 0, "mma": 8}, ["no wgmma instructions", "8 products"]),
        ("grad_blocks sm_90 bf16 D128 1x64", {"wgmma": 0}, ["no wgmma instructions"]),
        ("attend_rows/full sm_80 bf16 D128 1x64", {"wgmma": 0, "mma": 8}, []),
        ("attend_rows/full sm_80 bf16 D128 1x64", {"wgmma": 0}, ["no mma instructions"]),
    ],
)
def test_other_kernels_have_limits_too(name: str, change: dict[str, Any], words: list[str]) -> None:
    found = limits.judged(OTHERS[name], dc.replace(GOOD, **change))
    assert len(found) == len(words)
    for line, expected in zip(found, words, strict=True):
        assert expected in line


@pytest.mark.parametrize("name", limits.EXEMPTIONS)
def test_exemptions_are_of_shipped_cases_have_a_reason_and_end(name: str) -> None:
    names = {case.name: case for case in cases.shipped(cases.ARCHITECTURES, False)}
    exemption = limits.EXEMPTIONS[name]
    assert exemption.reason
    assert exemption.limits.keys() <= {field.name for field in dc.fields(tuning.Limits)}
    found = limits.judged(names[name], dc.replace(GOOD, occupancy=99, slack=99))
    assert found == ["keeps to its limits without the exemption that is made for it, which can go"]


def test_an_exemption_is_of_one_limit() -> None:
    case = dc.replace(CASE, variant="skip")
    assert limits.judged(case, dc.replace(GOOD, slack=1)) == []
    assert len(limits.judged(case, dc.replace(GOOD, slack=0))) == 1
    assert len(limits.judged(case, dc.replace(GOOD, slack=1, spill=4, local=1))) == 2


def test_every_triton_kernel_that_a_launcher_starts_is_compiled() -> None:
    started = {
        name
        for path in (SCRIPT.parents[1] / "kernels").glob("*/*.py")
        for name in re.findall(r"^ +(\w+)\[\(.*\)\]\($", path.read_text(), re.MULTILINE)
    }
    assert started == {*cases.STEPS, *cases.KERNELS}


def test_names_tell_cases_apart() -> None:
    shipped = cases.shipped(cases.ARCHITECTURES, False)
    assert len({case.name for case in shipped}) == len(shipped)


def test_drift_counts_only_for_the_worse() -> None:
    assert not list(limits.drift(GOOD, {"registers": 168, "occupancy": 2}))
    assert not list(limits.drift(GOOD, {"registers": 170, "occupancy": 1}))
    assert not list(limits.drift(GOOD, {"registers": 168 - limits.RIPPLE, "occupancy": 2}))
    assert list(limits.drift(GOOD, {"registers": 152, "occupancy": 3})) == [
        "168 registers, 152 in the baseline",
        "2 programs per multiprocessor, 3 in the baseline",
    ]
    assert "no baseline" in next(limits.drift(GOOD, None))


SASS = """
.L_x_0:
        /*0000*/  LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0010*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/  @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/  DEPBAR.LE SB0, 0x3 ;
        /*0040*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/  @P1 BRA `(.L_x_2) ;
        /*0070*/  STL [R1], R2 ;
.L_x_2:
        /*0080*/  DEPBAR.LE SB0, 0x2 ;
        /*0090*/  LDGSTS.E [R1], desc[UR4][R2.64] ;
        /*00a0*/  LDGSTS.E.BYPASS.128 [R1+0x10], desc[UR4][R2.64] ;
        /*00b0*/  @P0 BRA `(.L_x_1) ;
        /*00c0*/  EXIT ;
.L_x_3:
        /*00d0*/  BRA `(.L_x_3) ;
"""


def test_instructions_are_counted_in_the_loop_of_the_products() -> None:
    assert figures.code_figures(SASS) == {
        "wgmma": 2, "mma": 1, "tcgen": 0, "tma": 0, "copies": 3, "narrow": 1, "local": 1, "slack": 3,
    }  # fmt: skip
    assert figures.main_loop("EXIT ;") == ""


def test_the_baseline_holds_what_a_default_run_needs() -> None:
    kernels = json.loads(gate.BASELINE.read_text())["kernels"]
    assert {case.name for case in cases.shipped((80, 90), False)} <= set(kernels)
    text = gate.baseline_text("3.6.0", "abc", kernels)
    assert text.count("registers") == len(kernels)
    assert json.loads(text) == {"triton": "3.6.0", "sources": "abc", "kernels": kernels}


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    gate.write_file(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", tuning.PASSES)
@pytest.mark.parametrize("arch", [0, 75, 80, 86, 89, 90, 100, 103, 120])
def test_every_size_has_a_configuration(step: str, arch: int) -> None:
    for d in (8, 16, 40, 64, 72, 80, 96, 112, 128, 192, 256):
        for q_block, k_block in ((1, 1), (16, 64), (48, 200), (64, 64), (128, 128), (384, 384)):
            for itemsize in (2, 4):
                sizes = step, arch, Width.of(d), q_block, k_block, itemsize
                chosen, limits = tuning.config(*sizes), tuning.limits(*sizes)
                assert {chosen.bm, chosen.bn} <= {16, 32, 64, 128}
                assert chosen.bm < max(32, 2 * q_block)
                assert chosen.bn < max(32, 2 * k_block)
                assert chosen.warps in (4, 8)
                assert chosen.stages in (1, 2, 3)
                assert limits.occupancy >= 1
