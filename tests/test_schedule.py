"""Schedule: step fractions, layers, searches, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vsparse
from vsparse import Schedule

ADASPA = vsparse.list_methods()["adaspa"].default_schedule


def phases(schedule: Schedule, steps: int, layer: int = 0) -> list[str]:
    """Phases of one layer over a run that fills its state where it searches."""
    found: list[str] = []
    for step in range(steps):
        filled = bool({"search", "refresh"} & set(found))
        found.append(schedule.phase(step=step, steps=steps, layer=layer, filled=filled))
    return found


def test_adaspa_searches_where_the_paper_does() -> None:
    """Steps 10 and 30 of 50, counted from one; the first search is the last dense step."""
    assert ADASPA.searches(50) == (9, 29)
    assert phases(ADASPA, 50) == ["dense"] * 9 + ["search"] + ["reuse"] * 19 + ["refresh"] + ["reuse"] * 20


@pytest.mark.parametrize(("steps", "reuses"), [(1, None), (2, ()), (3, (2,)), (5, (1, 3, 4))])
def test_short_runs_still_search(steps: int, reuses: tuple[int, ...] | None) -> None:
    found = phases(ADASPA, steps)
    if reuses is None:
        assert found == ["search"]
    else:
        assert [step for step in range(steps) if found[step] == "reuse"] == list(reuses)
        assert [phase for phase in found if phase != "reuse"] == ["search", "refresh"]


@given(share=st.fractions(0, 1, max_denominator=100), steps=st.integers(1, 100))
def test_dense_steps_round_down(share: Any, steps: int) -> None:
    """By the step alone: a limit on the timestep would depend on the scheduler and its shift."""
    found = phases(Schedule(dense_steps=float(share)), steps)
    dense = steps * share.numerator // share.denominator
    assert found == ["dense"] * dense + ["search"] * (steps - dense)


@given(share=st.fractions(0, 1, max_denominator=100), steps=st.integers(1, 100))
def test_searches_round_up_to_the_last_step_of_their_share(share: Any, steps: int) -> None:
    """AdaSpa's paper numbers its steps for runs of 50."""
    exact = -(-steps * share.numerator // share.denominator) - 1
    assert Schedule(search_at=(float(share),)).searches(steps) == (max(0, exact),)


def test_a_lost_map_is_searched_again() -> None:
    for step in (10, 20, 29, 40):
        assert ADASPA.phase(step=step, steps=50, layer=0, filled=False) == "search"
    assert ADASPA.phase(step=29, steps=50, layer=0, filled=True) == "refresh"
    assert ADASPA.phase(step=3, steps=50, layer=0, filled=False) == "dense"


def test_a_refreshed_run_that_starts_over_searches_exactly() -> None:
    assert ADASPA.phase(step=9, steps=50, layer=0, filled=True) == "search"


def test_layers() -> None:
    first, some = Schedule(dense_layers=2), Schedule(dense_layers=(0, 3))
    assert [first.phase(step=None, steps=None, layer=i, filled=False) for i in range(4)] == ["dense"] * 2 + [
        "search"
    ] * 2
    assert [some.dense_layer(i) for i in range(5)] == [True, False, False, True, False]
    assert phases(Schedule(dense_layers=1, search_at=(0.2,)), 5) == ["dense"] * 5
    assert phases(Schedule(dense_steps=1.0), 3) == ["dense"] * 3


def test_needs_steps() -> None:
    assert not Schedule().needs_steps
    assert not Schedule(dense_steps=1.0, dense_layers=3).needs_steps
    assert Schedule(dense_steps=0.1).needs_steps
    assert Schedule(search_at=(0.0,)).needs_steps
    for known in ({"step": None, "steps": 5}, {"step": 1, "steps": None}):
        with pytest.raises(ValueError, match="depends on the denoising step, and nothing tells it: patch the pipeline"):
            Schedule(dense_steps=0.5).phase(layer=0, filled=False, **known)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dense_steps": 1.1}, r"dense_steps must lie in \[0, 1\], got 1.1"),
        ({"dense_steps": -0.1}, r"dense_steps must lie in \[0, 1\], got -0.1"),
        ({"dense_steps": float("nan")}, r"dense_steps must lie in \[0, 1\], got nan"),
        ({"dense_steps": "half"}, r"dense_steps must lie in \[0, 1\], got 'half'"),
        ({"dense_steps": None}, r"dense_steps must lie in \[0, 1\], got None"),
        ({"dense_layers": -1}, "dense_layers must be a count or indices >= 0, got -1"),
        ({"dense_layers": True}, "dense_layers must be a count or indices >= 0, got True"),
        ({"dense_layers": 1.5}, "dense_layers must be a count or indices >= 0, got 1.5"),
        ({"dense_layers": (0, -2)}, "dense_layers must be a count or indices >= 0"),
        ({"dense_layers": (0, True)}, "dense_layers must be a count or indices >= 0"),
        ({"search_at": ()}, r"search_at must be increasing shares in \[0, 1\], got \(\)"),
        ({"search_at": 0.2}, r"search_at must be increasing shares in \[0, 1\], got 0.2"),
        ({"search_at": (0.6, 0.2)}, "search_at must be increasing shares"),
        ({"search_at": (0.2, 0.2)}, "search_at must be increasing shares"),
        ({"search_at": (0.2, 1.2)}, "search_at must be increasing shares"),
        ({"search_at": (float("nan"),)}, "search_at must be increasing shares"),
        ({"dense_steps": 0.5, "search_at": (0.2, 0.6)}, "first search must not lie before the end of the dense steps"),
        ({"dense_steps": 1.0, "search_at": (0.2, 0.6)}, "first search must not lie before the end of the dense steps"),
        ({"ramp": 0.5}, "ramp must map a training step to a density, got 0.5"),
    ],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(**options)
