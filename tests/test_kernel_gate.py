"""The compile gate: the shipped kernels pass it, and it says in words what it finds."""

from __future__ import annotations

import dataclasses as dc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vsparse.kernels.block_sparse import tuning
from vsparse.kernels.tiles import Width

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "kernel_gate.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_gate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_gate"] = module  # where dataclasses look for the annotations
    spec.loader.exec_module(module)
    return module


gate = load()
CASE = gate.Case("attend", 90, "bf16", 128, 64, 64)
GOOD = gate.Figures(
    bm=64, bn=64, warps=4, stages=3, registers=168, spill=0, shared=112 * 1024, tensor_columns=0, occupancy=2, wgmma=12,
    mma=0, tcgen=0, serial=False, tma=0, copies=48, narrow=0, local=0, slack=3, seconds=0.5,
)  # fmt: skip
LIMITS = tuning.Limits(occupancy=2, slack=2)


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_shipped_kernels_pass() -> None:
    told = run()
    assert told.returncode == 0, told.stdout + told.stderr


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
    assert gate.occupancy(arch, registers, warps, kilobytes * 1024, columns) == programs


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
    found = list(gate.breaches(CASE, dc.replace(GOOD, **change), LIMITS))
    assert len(found) == (words is not None)
    if words is not None:
        assert words in found[0]


def test_limits_can_allow() -> None:
    loose = tuning.Limits(occupancy=1, spill=32, narrow=1, serial=True)
    figures = dc.replace(GOOD, occupancy=1, spill=32, local=9, narrow=1, serial=True, slack=0)
    assert not list(gate.breaches(CASE, figures, loose))


def test_float32_is_held_to_resources_only() -> None:
    case = dc.replace(CASE, dtype="fp32")
    assert not list(gate.breaches(case, dc.replace(GOOD, wgmma=0, slack=0), tuning.Limits()))
    assert list(gate.breaches(case, dc.replace(GOOD, wgmma=0, spill=4), tuning.Limits()))


def test_small_tiles_are_for_single_warps() -> None:
    small = dc.replace(GOOD, bn=32, wgmma=0, mma=8)
    assert not list(gate.breaches(dc.replace(CASE, step="grad_keys", d=256), small, LIMITS))
    assert list(gate.breaches(CASE, small, LIMITS))


def test_drift_counts_only_for_the_worse() -> None:
    assert not list(gate.drift(GOOD, {"registers": 168, "occupancy": 2}))
    assert not list(gate.drift(GOOD, {"registers": 170, "occupancy": 1}))
    assert not list(gate.drift(GOOD, {"registers": 168 - gate.RIPPLE, "occupancy": 2}))
    assert list(gate.drift(GOOD, {"registers": 152, "occupancy": 3})) == [
        "168 registers, 152 in the baseline",
        "2 programs per multiprocessor, 3 in the baseline",
    ]
    assert "no baseline" in next(gate.drift(GOOD, None))


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
    assert gate.code_figures(SASS) == {
        "wgmma": 2, "mma": 1, "tcgen": 0, "tma": 0, "copies": 3, "narrow": 1, "local": 1, "slack": 3,
    }  # fmt: skip
    assert gate.main_loop("EXIT ;") == ""


def test_the_baseline_holds_what_a_default_run_needs() -> None:
    kernels = json.loads(gate.BASELINE.read_text())["kernels"]
    assert {case.name for case in gate.shipped((80, 90), False)} <= set(kernels)
    assert gate.baseline_text("3.6.0", kernels).count("registers") == len(kernels)
    assert json.loads(gate.baseline_text("3.6.0", kernels))["kernels"] == kernels


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
