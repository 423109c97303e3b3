"""RunState: versions that are read, staged and committed, one line of them for each branch."""

from __future__ import annotations

import copy

import torch

from vsparse.state import RunState


def filled() -> RunState:
    state = RunState()
    state.bind(state.version("cond"))
    state.stage("bits", torch.ones(4, dtype=torch.uint8))
    state.stage("lse", torch.ones(3))
    state.commit("cond", 1)
    return state


def test_a_version_never_changes() -> None:
    state = filled()
    first = state.version("cond")
    state.bind(first)
    state.stage("bits", torch.zeros(4, dtype=torch.uint8))
    assert state.version("cond") is first
    state.commit("cond", 5)
    second = state.version("cond")
    assert first["bits"].tolist() == [1] * 4
    assert second["bits"].tolist() == [0] * 4
    assert second["lse"] is first["lse"]
    assert state.stamp("cond") == 5
    state.bind(first)
    assert state.read("bits") is first["bits"]


def test_binding_drops_what_a_recomputation_staged() -> None:
    state = filled()
    state.stage("pairs", torch.ones(2))
    state.bind(state.version("cond"))
    state.commit("cond", 2)
    assert set(state.version("cond")) == {"bits", "lse"}


def test_branches_are_apart() -> None:
    state = filled()
    assert not state.version("uncond")
    assert state.stamp("uncond") is None
    state.bind(state.version("uncond"))
    state.stage("bits", torch.zeros(4, dtype=torch.uint8))
    state.commit("uncond", 1)
    assert state.version("cond")["bits"].tolist() == [1] * 4
    assert state.nbytes() == 4 + 12 + 4
    state.clear()
    assert state.nbytes() == 0
    assert not state.version("cond")
    assert state.stamp("cond") is None


def test_nothing_that_is_kept_is_of_a_graph_or_of_inference_mode() -> None:
    state = RunState()
    state.stage("grown", torch.ones(2, requires_grad=True) * 2)
    with torch.inference_mode():
        state.stage("found", torch.ones(2) * 2)
        state.commit("cond", 0)
    version = state.version("cond")
    assert not version["grown"].requires_grad
    assert not version["found"].is_inference()
    assert version["found"].tolist() == [2.0, 2.0]


def test_a_copy_starts_empty() -> None:
    twin = copy.deepcopy(filled())
    assert twin.nbytes() == 0
    assert not twin.version("cond")
