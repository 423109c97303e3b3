"""Where the time goes when processes share a video: waiting for each other is a part of its own."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines
from processes import Get

import vsparse
from vsparse.measure.latency import report
from vsparse.measure.latency.timeline import COMMUNICATE, KERNEL
from vsparse.methods import get_method
from vsparse.parallel.context import ContextParallel, parse

ASKED = {"height": 32, "width": 32, "frames": 5, "steps": 2}


def _measured(setting: ContextParallel) -> dict[str, Any]:
    pipe, _ = tiny_pipelines.wan()
    pipe.set_progress_bar_config(disable=True)
    method = get_method("vsa")(density=0.5, tile=(1, 2, 2), block=4)
    found = report.measured(
        pipe, method, vsparse.Schedule(), ASKED, prompt="a cat", seed=0, seconds=1.0, rounds=2, parallel=setting
    )
    assert vsparse.patch_of(pipe.transformer) is None
    return {
        "parts": {kind: found.parts(kind) for kind in ("dense", "sparse")},  # type: ignore[arg-type]
        "whole": {kind: found.typical(kind).seconds for kind in ("dense", "sparse")},  # type: ignore[arg-type]
        "rounds": found.rounds,
        "asked": found.asked,
        "heads": len(found.executed.density[0][0]),
        "density": found.density,
    }


@pytest.mark.parametrize("setting", ["ulysses=2", "ring=2"])
def test_waiting_is_a_part(pair: Get, setting: str) -> None:
    shared = parse(setting)
    found = pair().run(_measured, shared)
    for one in found:
        assert one["rounds"] == 2
        assert one["asked"]["context_parallel"] == setting
        assert one["heads"] == 2 // shared.ulysses
        assert 0.4 < one["density"] < 0.7
        for kind in ("dense", "sparse"):
            parts = one["parts"][kind]
            assert parts[COMMUNICATE] > 0.0
            assert parts[KERNEL] > 0.0
            assert sum(parts.values()) == pytest.approx(one["whole"][kind], rel=1e-9)
