"""The life of a patch over every host and method: in, out, refused, disturbed, copied, in two threads."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import rows
import torch
from torch import nn

import vsparse

HOST_METHOD = pytest.mark.parametrize(("host", "method"), rows.both)
THIN = pytest.mark.parametrize(("host", "method"), rows.thin)
METHOD = pytest.mark.parametrize("method", rows.METHODS)
HOST = pytest.mark.parametrize("host", rows.HOSTS)


# ---- out ---------------------------------------------------------------------------------------------------------


@HOST_METHOD
def test_remove_leaves_no_trace(host: str, method: str) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs, batch=2)
    before, generator = rows.forward(model, values), torch.get_rng_state()
    mark = rows.footprint(model)
    with vsparse.apply(model, method, **rows.METHODS[method].sparse) as patch:
        assert rows.footprint(model) != mark
        rows.generation(patch, model, values, steps=4)
        assert vsparse.patch_of(model) is patch
    assert rows.footprint(model) == mark
    assert vsparse.patch_of(model) is None
    assert torch.equal(rows.forward(model, values), before)
    assert torch.equal(torch.get_rng_state(), generator)
    patch.remove()
    assert rows.footprint(model) == mark


@HOST
def test_sparse_attention_shows(host: str) -> None:
    """What the other tests compare would not agree by accident."""
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs, (4, 6, 7))  # of two frames, one global frame leaves nothing out
    before = rows.forward(model, values)
    for method in rows.SPARSE:
        with rows.sparse(model, method) as patch:
            after = rows.generation(patch, model, values, steps=4)[-1]
            assert patch.stats()["sparse_density"] < 0.8
        assert float((after - before).abs().max() / before.abs().max()) > 1e-3, method


@HOST
def test_print_shows_the_patch(host: str) -> None:
    model, _ = rows.build(host)
    with vsparse.apply(model, "vsa") as patch:
        assert f"vsa, layer 1 of {len(patch.sites)}" in repr(model)
        assert repr(patch) == f"<vsparse.Patch vsa: {len(patch.sites)} sites>"
    assert repr(patch) == "<vsparse.Patch vsa: removed>"


@METHOD
def test_state_dict_has_ours_only_while_patched(method: str) -> None:
    model, _ = rows.build("wan")
    stock = list(model.state_dict())
    with vsparse.apply(model, method) as patch:
        ours = {f"transformer.{name.replace('.vsparse.', '.')}" for name in model.state_dict() if name not in stock}
        assert ours == {name for name, _ in patch.named_tensors()}
        assert [name for name in model.state_dict() if name in stock] == stock


def test_backend_chosen_while_patched_stays() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "vsa"):
        model.set_attention_backend("_native_math")
        rows.forward(model, values)
    chosen = {processor._attention_backend.value for processor in model.attn_processors.values()}
    model.set_attention_backend("native")
    assert chosen == {"_native_math"}


# ---- undisturbed -------------------------------------------------------------------------------------------------


@THIN
def test_prompts_and_resolutions_do_not_disturb_each_other(host: str, method: str) -> None:
    model, inputs = rows.build(host)
    first, second = rows.prompt(host, inputs), rows.prompt(host, inputs, seed=1)
    other = rows.prompt(host, inputs, (3, 5, 4))
    with rows.sparse(model, method) as patch:
        expected = []
        for values in (first, second, other, first):
            expected.append(rows.generation(patch, model, values, steps=4))
            patch.reset()
    for values, wanted in zip((first, second, other, first), expected, strict=True):
        with rows.sparse(model, method) as patch:
            assert all(map(torch.equal, rows.generation(patch, model, values, steps=4), wanted))


@THIN
def test_a_suspended_call_is_dense_and_leaves_no_trace(host: str, method: str) -> None:
    """Dense calls in between, of the same and of another prompt and size: a generation does not notice them."""
    model, inputs = rows.build(host)
    values, other = rows.prompt(host, inputs), rows.prompt(host, inputs, (3, 5, 4), seed=1)
    with vsparse.apply(model, "dense"):
        stock = [rows.forward(model, x) for x in (values, other)]
    with rows.sparse(model, method) as patch:
        wanted = rows.generation(patch, model, values, steps=4)
        told = patch.stats()
    with rows.sparse(model, method) as patch, patch.generation(4):
        found = []
        for step, branch in itertools.product(range(4), ("cond", "uncond")):
            with patch.step(step, branch=branch):
                with patch.suspended():
                    assert all(map(torch.equal, (rows.forward(model, x) for x in (values, other)), stock))
                found.append(rows.forward(model, values))
        assert patch.stats() == told | {"state_bytes": patch.stats()["state_bytes"]}
    assert all(map(torch.equal, found, wanted))


@THIN
def test_an_exception_in_mid_generation_leaves_nothing(host: str, method: str) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs)
    with rows.sparse(model, method) as patch:
        wanted = rows.generation(patch, model, values, steps=4)
    second = [module for name, module in model.named_modules() if name.endswith("blocks.0")][-1]
    with rows.sparse(model, method) as patch:

        def fails(*_: object) -> None:
            raise KeyboardInterrupt

        def run() -> None:
            with patch.generation(4):
                for i in range(3):
                    with patch.step(i):
                        if i == 2:
                            handles.append(second.register_forward_hook(fails))
                        rows.forward(model, rows.prompt(host, inputs, seed=1))

        handles: list[Any] = []
        with pytest.raises(KeyboardInterrupt):
            run()
        handles[0].remove()
        assert patch.stats()["state_bytes"] == 0
        assert all(map(torch.equal, rows.generation(patch, model, values, steps=4), wanted))
        assert all(site.hidden is None for site in patch.sites)


def test_after_an_exception_another_thread_may_go_on() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with rows.sparse(model, "vsa") as patch:
        wanted = rows.forward(model, values)
        handle = model.blocks[0].attn1.to_q.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rows.forward(model, values)
        handle.remove()
        assert all(site.hidden is None for site in patch.sites)
        thread, found = _in_thread(lambda: rows.forward(model, values))
        thread.join(60)
        assert torch.equal(found[0], wanted)


@METHOD
def test_two_patched_models_share_nothing(method: str) -> None:
    (one, inputs), (two, _) = rows.build("wan"), rows.build("wan", seed=3)
    a, b = rows.prompt("wan", inputs), rows.prompt("wan", inputs, (3, 5, 4), seed=1)
    with rows.sparse(one, method) as patch:
        wanted_one = rows.generation(patch, one, a, steps=4)
    with rows.sparse(two, "vsa") as patch:
        wanted_two = rows.generation(patch, two, b, steps=4)
    with rows.sparse(one, method) as first, rows.sparse(two, "vsa") as second:
        found = []
        with first.generation(4), second.generation(4):
            for i in range(4):
                for branch in ("cond", "uncond"):
                    with first.step(i, branch=branch), second.step(i, branch=branch):
                        found.append((rows.forward(one, a), rows.forward(two, b)))
        assert all(map(torch.equal, [x for x, _ in found], wanted_one))
        assert all(map(torch.equal, [x for _, x in found], wanted_two))
        second.remove()
        assert all(map(torch.equal, rows.generation(first, one, a, steps=4), wanted_one))


@THIN
def test_a_deepcopy_is_patched_and_independent(host: str, method: str) -> None:
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs)
    stock, mark = rows.forward(model, values), rows.footprint(copy.deepcopy(model))
    patch = rows.sparse(model, method)
    wanted = rows.generation(patch, model, values, steps=4)
    twin = copy.deepcopy(model)
    own = vsparse.patch_of(twin)
    assert own is not None
    assert own is not patch
    assert vsparse.patch_of(twin) is own
    assert vsparse.patch_of(model) is patch
    assert not {id(x) for x in own.parameters()} & {id(x) for x in patch.parameters()}
    assert all(map(torch.equal, rows.generation(own, twin, values, steps=4), wanted))
    assert own.stats()["calls"] == patch.stats()["calls"]
    with patch.generation(2), own.generation(3):
        pass
    patch.remove()
    assert all(map(torch.equal, rows.generation(own, twin, values, steps=4), wanted))
    assert torch.equal(rows.forward(model, values), stock)
    own.remove()
    assert torch.equal(rows.forward(twin, values), stock)
    assert rows.footprint(twin).keys() == mark.keys()
    for name, (_, kind, attributes, hooks, children, own_tensors) in list(mark.items())[1:]:
        there = rows.footprint(twin)[name]
        assert there[1] is kind
        assert there[2].keys() == attributes.keys()
        assert {table: len(x) for table, x in there[3].items()} == {table: len(x) for table, x in hooks.items()}
        assert there[4].keys() == children.keys()
        assert there[5].keys() == own_tensors.keys()


# ---- threads -----------------------------------------------------------------------------------------------------


class _Gate:
    """Stops the first call of a block until it is told to go on."""

    def __init__(self, module: nn.Module) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.handle = module.register_forward_hook(self._hook)

    def _hook(self, *_: object) -> None:
        self.inside.set()
        assert self.go.wait(60)


def _in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001 the test looks at it
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_concurrent_calls_of_one_model_are_refused() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with rows.sparse(model, "vsa"):
        wanted = rows.forward(model, values)
        gate = _Gate(model.blocks[0])
        thread, found = _in_thread(lambda: rows.forward(model, values))
        assert gate.inside.wait(60)
        with pytest.raises(RuntimeError, match="still running; concurrent calls of one patched model"):
            rows.forward(model, values)
        gate.go.set()
        thread.join(60)
        assert torch.equal(found[0], wanted)
        gate.handle.remove()
        assert torch.equal(rows.forward(model, values), wanted)


@METHOD
def test_two_models_run_in_two_threads(method: str) -> None:
    (one, inputs), (two, other) = rows.build("wan"), rows.build("hunyuan_video")
    a, b = rows.prompt("wan", inputs), rows.prompt("hunyuan_video", other)
    with rows.sparse(one, method) as first, rows.sparse(two, method) as second:
        wanted = rows.generation(first, one, a, steps=4), rows.generation(second, two, b, steps=4)
        first.reset()
        second.reset()
        gates = _Gate(one.blocks[0].attn1.to_q), _Gate(two.transformer_blocks[0].attn.to_q)
        threads = [
            _in_thread(lambda: rows.generation(first, one, a, steps=4)),
            _in_thread(lambda: rows.generation(second, two, b, steps=4)),
        ]
        for gate in gates:  # both are inside their first attention now
            assert gate.inside.wait(60)
        for gate in gates:
            gate.go.set()
        for (thread, found), expected in zip(threads, wanted, strict=True):
            thread.join(60)
            assert all(map(torch.equal, found[0], expected))
