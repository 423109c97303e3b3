"""Two threads at most, and hypothesis without surprises."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TRITON_INTERPRET"] = "1"  # decided when a kernel is defined; compiling them is tried in processes apart
torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))

settings.register_profile(
    "house", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")

_POOLS = frozenset({"pool", "pair", "four"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a folder that ask for processes run in one worker, which starts them once."""
    for item in items:
        if _POOLS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(item.path.parent.name))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What imports have made stays: a collection of garbage that looks through it all takes longer than most tests."""
    gc.collect()
    gc.freeze()
