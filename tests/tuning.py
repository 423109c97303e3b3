"""What the tests of tuning share: a small video, clips to search and to verify with, candidates."""

from __future__ import annotations

from typing import Any

from vsparse.measure.tune.trials import Scene
from vsparse.methods import get_method

SIZE: dict[str, Any] = {"height": 32, "width": 32, "frames": 5, "steps": 2, "guidance": 1.5}
CLIPS = ([Scene("a cat", 0), Scene("a dog", 1)], [Scene("a fox", 100)])
METHODS = {
    "sparge": get_method("sparge")(select="density", block=8),
    "adaspa": get_method("adaspa")(head_adaptive=False, block=8),
}
DENSITIES = (0.25, 0.5, 1.0)
