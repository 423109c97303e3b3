"""Steps, branches, generations: loops and pipelines reach the right phases, and state does not outlive them."""

from __future__ import annotations

from typing import Any

import pytest
import rows
import torch
from rows import ADASPA, SHORT, heard

import vsparse

BLOCK = {"block": 4, "density": 0.3}


@pytest.mark.parametrize("host", rows.HOSTS)
def test_a_custom_loop_reaches_the_published_phases(host: str) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs)
    with vsparse.apply(model, "adaspa", **BLOCK) as patch:
        with heard(model) as phases:
            rows.generation(patch, model, values, steps=SHORT)
        assert phases == [(0, phase) for phase in ADASPA for _ in ("cond", "uncond")]
        assert patch.stats()["state_bytes"] == 0


def test_without_a_step_source_a_step_schedule_refuses() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "adaspa", **BLOCK) as patch:
        words = "depends on the denoising step, and nothing tells it.*patch.generation.*schedule=vsparse.Schedule"
        with pytest.raises(ValueError, match=words):
            rows.forward(model, values)
        with patch.generation(SHORT), pytest.raises(ValueError, match="depends on the denoising step"):
            rows.forward(model, values)
        rows.generation(patch, model, values, steps=SHORT)
    with vsparse.apply(model, "adaspa", schedule=vsparse.Schedule(), **BLOCK), heard(model) as phases:
        rows.forward(model, values)
        rows.forward(model, values)
    assert phases == [(0, "search"), (0, "search")]


def test_two_unnamed_branches_in_one_step_are_refused() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "adaspa", **BLOCK) as patch, patch.generation(SHORT), patch.step(0):
        rows.forward(model, values)
        rows.forward(model, values)  # a solver that evaluates a step twice reads what the first found
    with vsparse.apply(model, "adaspa", **BLOCK) as patch:
        patch._tracker.source = _Unnamed()
        rows.forward(model, values)
        words = r"two calls in step 0, and nothing tells their CFG branches apart.*patch.step\(i, branch="
        with pytest.raises(ValueError, match=words):
            rows.forward(model, values)


class _Unnamed:
    def where(self, root: str) -> Any:
        from vsparse.steps import Where

        return Where(step=0, steps=SHORT, generation=1)


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (lambda p: p.generation(0).__enter__(), ValueError, "num_steps must be an integer >= 1, got 0"),
        (lambda p: p.generation(2.0).__enter__(), ValueError, "num_steps must be an integer >= 1, got 2.0"),
        (lambda p: p.step(0).__enter__(), RuntimeError, r"open `with patch.generation\(num_steps\)` around the loop"),
        (lambda p: p.training_step(-1), ValueError, "i must be an integer >= 0, got -1"),
        (lambda p: p.training_step(True), ValueError, "i must be an integer >= 0, got True"),
    ],
)
def test_wrong_loops_are_refused(use: Any, error: type[Exception], words: str) -> None:
    with vsparse.apply(rows.build("wan")[0], "adaspa") as patch, pytest.raises(error, match=words):
        use(patch)


def test_steps_out_of_range_and_nested_generations_are_refused() -> None:
    with vsparse.apply(rows.build("wan")[0], "adaspa") as patch, patch.generation(3):
        for i in (-1, 3, 1.0, True):
            with pytest.raises(ValueError, match=rf"i must be an integer in \[0, num_steps=3\), got {i!r}"):
                patch.step(i).__enter__()
        with pytest.raises(RuntimeError, match="a generation is already open"):
            patch.generation(2).__enter__()


def test_a_solver_that_repeats_a_step_reads_and_never_writes() -> None:
    model, inputs = rows.build("wan")
    first, other = rows.prompt("wan", inputs), rows.prompt("wan", inputs, seed=5)
    with vsparse.apply(model, "adaspa", **BLOCK) as patch:
        with patch.generation(SHORT), heard(model) as phases:
            for i in range(3):
                with patch.step(i):
                    rows.forward(model, first)
                    known = [site.state.version("cond") for site in patch.sites]
                    rows.forward(model, other)  # Heun's second evaluation
                    assert [site.state.version("cond") for site in patch.sites] == known
        assert [phase for _, phase in phases] == ["search", "dense", "reuse", "reuse", "refresh", "reuse"]


def test_branches_keep_maps_of_their_own() -> None:
    """A step counter or a cache that lives in the class mixes the branches of CFG."""
    model, inputs = rows.build("wan")
    cond, uncond = rows.prompt("wan", inputs), rows.prompt("wan", inputs, seed=1)
    alone = {}
    with vsparse.apply(model, "adaspa", **BLOCK) as patch:
        for name, values in (("cond", cond), ("uncond", uncond)):
            with patch.generation(SHORT):
                for i in range(SHORT):
                    with patch.step(i, branch=name):
                        alone[name] = rows.forward(model, values)
        together = {}
        with patch.generation(SHORT):
            for i in range(SHORT):
                for name, values in (("cond", cond), ("uncond", uncond)):
                    with patch.step(i, branch=name):
                        together[name] = rows.forward(model, values)
            bits = [[site.state.version(name)["bits"] for site in patch.sites] for name in ("cond", "uncond")]
            assert not all(map(torch.equal, *bits))
    assert torch.equal(together["cond"], alone["cond"])
    assert torch.equal(together["uncond"], alone["uncond"])


@pytest.mark.parametrize("method", ["adaspa", "svg2", "unicp", "radial"])
def test_a_new_prompt_or_shape_starts_without_what_the_last_one_left(method: str) -> None:
    """LSE, maps, centroids, cached outputs and masks: one patch for three videos, as a patch for each."""
    model, inputs = rows.build("wan")
    videos = [rows.prompt("wan", inputs), rows.prompt("wan", inputs, seed=1), rows.prompt("wan", inputs, (3, 5, 4))]
    wanted = []
    for values in videos:
        with rows.sparse(model, method) as patch:
            wanted.append(rows.generation(patch, model, values, steps=4))
    with rows.sparse(model, method) as patch:
        for values, alone in zip(videos, wanted, strict=True):
            assert all(map(torch.equal, rows.generation(patch, model, values, steps=4), alone))


def test_a_map_of_another_grid_or_batch_is_never_reused() -> None:
    """Nor the LSE of its search: a step with neither searches exactly."""
    model, inputs = rows.build("wan")
    with vsparse.apply(model, "adaspa", **BLOCK) as patch, patch.generation(SHORT), heard(model) as phases:
        for i, (grid, batch) in enumerate([((2, 6, 7), 1), ((2, 6, 7), 1), ((2, 7, 6), 1), ((2, 7, 6), 2)]):
            with patch.step(i):
                rows.forward(model, rows.prompt("wan", inputs, grid, batch=batch))
    assert [phase for _, phase in phases] == ["search", "reuse", "search", "search"]
