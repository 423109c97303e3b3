"""What the authors of the methods run on which model, as the options and the schedule one would pass."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

from vsparse.schedule import Schedule

__all__ = ["MODELS", "Setting", "published"]

MODELS = ("Wan 2.1 1.3B", "Wan 2.1 14B", "HunyuanVideo", "CogVideoX")
_SMALL, _LARGE, _HUNYUAN, _COG = MODELS


@dc.dataclass(frozen=True, kw_only=True)
class Setting:
    """Published options of a method on one model.

    Args:
        options: Fields of the method. schedule: None: the method's default schedule. note: what else belongs to it.
    """

    options: Mapping[str, Any] = dc.field(default_factory=dict)
    schedule: Schedule | None = None
    note: str = ""


_DRAFT = Setting(options={"density": 0.25}, note="size of the model not given; first layer, timesteps > 925 dense")

_SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    "vsa": {
        _SMALL: Setting(options={"density": 0.2}, note="FastWan, trained"),
        _LARGE: Setting(options={"density": 0.1}, note="FastWan, trained"),
    },
    "adaspa": {_HUNYUAN: Setting(options={"density": 0.2}), _COG: Setting(options={"density": 0.2}, note="1.5 5B")},
    "vmoba": {
        _SMALL: Setting(
            options={"frames": 3, "patch": (5, 13), "cube": (7, 5, 13), "top_k": (2, 6, 18)},
            note="81 x 480 x 832; at 720 x 1280 patch=(9, 10), cube=(7, 15, 20), top_k=(2, 10, 9)",
        )
    },
    "sta": {
        _HUNYUAN: Setting(options={"window": (5, 5, 5)}, note="117 frames at 768 x 1280; fine-tuned window=(3, 3, 3)")
    },
    "radial": {
        _LARGE: Setting(options={"decay_factor": 0.2, "adjacent": 0.5, "sink_frames": 1}),
        _HUNYUAN: Setting(
            options={"decay_factor": 0.95, "adjacent": 1.0, "sink_frames": 0},
            schedule=Schedule(dense_steps=0.24, dense_layers=0),
        ),
    },
    "svg": {
        _LARGE: Setting(options={"density": 0.3}, note="720p"),
        _HUNYUAN: Setting(
            options={"density": 0.25, "sink_frames": 0},
            schedule=Schedule(dense_steps=0.1, dense_layers=1),
            note="3 % of the layers dense",
        ),
    },
    "svg2": {
        _LARGE: Setting(options={"query_clusters": 300, "key_clusters": 1000}, note="scripts, 720p"),
        _HUNYUAN: Setting(
            options={"query_clusters": 400, "key_clusters": 1000}, schedule=Schedule(dense_steps=0.1, dense_layers=1)
        ),
    },
    "sla": {_SMALL: Setting(options={"density": 0.05, "linear": "marginal"}, note="paper, trained")},
    "nabla": {_LARGE: Setting(options={"mass": 0.4, "window": (11, 3, 3)}, note="fine-tuned mass=0.7, window=None")},
    "sparge": {_COG: Setting(note="tuned by head, relative L1 below 0.05, with skipping below 0.06")},
    "xattention": {_HUNYUAN: Setting(options={"mass": 0.9, "stride": 8}, note="or mass=0.95")},
    "draft": {_SMALL: _DRAFT, _LARGE: _DRAFT, _HUNYUAN: Setting(options={"density": 0.1})},
    "jenga": {
        _SMALL: Setting(options={"density": 0.25, "mass": 0.9}, note="then density=0.15"),
        _LARGE: Setting(options={"density": 0.3, "mass": 0.8}, note="then density=0.2"),
        _HUNYUAN: Setting(options={"density": 0.25, "mass": 0.3}, note="from half of the steps density=0.15"),
    },
}


def published(key: str) -> Mapping[str, Setting]:
    """Settings of a method by model, those of `MODELS` that its sources give."""
    return _SETTINGS.get(key, {})
