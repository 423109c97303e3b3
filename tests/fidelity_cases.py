"""A comparison whose every figure is known."""

from __future__ import annotations

import dataclasses as dc
import math

from vsparse.measure.adherence import Adherence
from vsparse.measure.fidelity.distance import Distance
from vsparse.measure.fidelity.result import Fidelity, Outcome, Ran, Run
from vsparse.measure.fidelity.vbench import Wanted, wanted_clips

PSNR = {"floor": (60.0, math.inf, 64.0), "vsa": (20.0, 30.0, 34.0), "dsv": (61.0, 70.0, 63.0)}
NO_LPIPS = "no network"


def far(psnr: float, *, temporal: float | None = 0.5, motion: float | None = 1.0) -> Distance:
    without = {"lpips": NO_LPIPS, **({} if motion is not None else {"motion": "the dense clip never changes"})}
    return Distance(
        psnr=psnr, ssim=0.75, worst_psnr=psnr - 2, worst_ssim=0.5, temporal=temporal, motion=motion, lpips=None,
        steps=(0.0, 1 / psnr), without=without,
    )  # fmt: skip


def ran(density: float, dense_steps: int = 1) -> Ran:
    heads = [[[1.0, 1.0]], [[density, 0.0]]]
    return Ran(density=density, steps=2, dense_steps=dense_steps, layers=1, dense_layers=0, heads=heads, tokens=99)


def seen(right: int) -> Adherence:
    held = [i < right for i in range(5)]
    return Adherence(
        color=held[0], shape=held[1], direction=held[2], background=held[3], coherent=held[4],
        seen=("red", "circle", "up", "dark"), overlap=0.9, travel=0.4,
    )  # fmt: skip


def known(clips: int = 3, *, floor: bool = True) -> Fidelity:
    """Three clips; the floor is equal to dense in the second; "dsv" is as near as the floor, "vsa" is not."""
    wanted = wanted_clips(["a cat", "a dog", "a <b>bird</b>"])[:clips]
    runs = [Run(name="dense", kind="dense", words="stock", outcomes={x.name: Outcome(seen=seen(5)) for x in wanted})]
    for name in ("vsa", "dsv", *(("floor",) if floor else ())):
        outcomes = {
            clip.name: Outcome(distance=far(PSNR[name][i]), seen=seen(5 - i), ran=ran(0.2 + 0.1 * i, 1 + i % 2))
            for i, clip in enumerate(wanted)
        }
        without = {"recall": "it is not told"} if name == "dsv" else {}
        runs.append(
            Run(
                name=name, kind="floor" if name == "floor" else "sparse", words=f"{name}()", outcomes=outcomes,
                recall=0.9 if name == "vsa" else None, without=without,
            )
        )  # fmt: skip
    return Fidelity(
        source="abacus", asked={"height": 16}, clips=wanted, runs=runs, environment={"torch": "2", "packages": {}}
    )


def only(found: Fidelity, clip: Wanted) -> Fidelity:
    """One clip of it."""
    return dc.replace(found, clips=[clip])
