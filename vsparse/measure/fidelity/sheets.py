"""Contact sheets of the clips that tell most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from vsparse.measure.fidelity.result import Fidelity, Outcome
from vsparse.measure.fidelity.vbench import Wanted
from vsparse.measure.sheet import SheetRow, contact_sheet
from vsparse.measure.video import read_video

__all__ = ["sheets", "telling"]

_COLUMNS = 6


def telling(found: Fidelity) -> Mapping[str, Wanted]:
    """What to look at: the clip that lies furthest from dense in any method, and the one in the middle."""
    least = {}
    for clip in found.clips:
        values = [found.values(run, "psnr").get(clip.name) for run in found.others if run.kind == "sparse"]
        least[clip.name] = min((x for x in values if x is not None), default=math.inf)
    ordered = sorted(found.clips, key=lambda clip: least[clip.name])
    if len(ordered) == 1:
        return {"only": ordered[0]}
    return {"furthest": ordered[0], "middle": ordered[len(ordered) // 2]}


def sheets(folder: Path, found: Fidelity) -> dict[str, Path]:
    """Draw `telling` clips from their files.

    Returns:
        The same keys, and the PNG of each in the folder.
    """
    drawn = {}
    for why, clip in telling(found).items():
        rows = []
        for run in [found.runs[0], *found.others]:
            if clip.name in run.videos:
                facts = _facts(run.outcomes[clip.name])
                rows.append(SheetRow(name=run.name, facts=facts, frames=read_video(run.videos[clip.name])))
        if rows:
            path = folder / f"{why}.png"
            drawn[why] = contact_sheet(path, rows, title=f"\u201c{clip.prompt}\u201d", columns=_COLUMNS)
    return drawn


def _facts(outcome: Outcome) -> list[str]:
    lines = []
    if outcome.distance is not None:
        far = outcome.distance
        lines.append("equal to the bit" if math.isinf(far.psnr) else f"PSNR {far.psnr:.1f} dB, SSIM {far.ssim:.3f}")
    if outcome.ran is not None:
        lines.append(f"density {outcome.ran.density:.3f}, {outcome.ran.dense_steps} of {outcome.ran.steps} steps dense")
    if outcome.seen is not None:
        lines.append(f"seen: {outcome.seen.right} of 5 properties")
    return lines
