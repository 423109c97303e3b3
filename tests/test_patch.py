"""plan, stats, the registry, and what a Patch tells: predictions by hand, and executed pairs counted one by one."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import threading
import weakref
from collections.abc import Iterator

import pytest
import rows
import torch

import vsparse
from vsparse import reference
from vsparse.blocks import BlockMap
from vsparse.methods import SparseAttention

# ---- what ran ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, tuple[BlockMap, ...]]]]:
    """Site, batch and maps of every sparse call."""
    found: list[tuple[str, int, tuple[BlockMap, ...]]] = []
    stock = SparseAttention.tally

    def tally(self: SparseAttention, blocks: BlockMap, batch: int, *more: BlockMap) -> None:
        found.append((f"transformer.{self.site.name}", batch, (blocks, *more)))
        stock(self, blocks, batch, *more)

    with monkeypatch.context() as patched:
        patched.setattr(SparseAttention, "tally", tally)
        yield found


def _pairs(maps: tuple[BlockMap, ...], batch: int, heads: int) -> tuple[int, int]:
    """Computed and valid token pairs, counted in the mask of all pairs of slots."""
    slots = (
        maps[0].k.blocks * maps[0].k.block
        if maps[0].k.start is None
        else int((maps[0].k.start + maps[0].k.length).max())
    )
    masks = [reference._pairs(m, slots, slots).expand(batch, heads, -1, -1) for m in maps]
    union = torch.stack(masks).any(0)
    assert int(sum(int(m.sum()) for m in masks)) == int(union.sum()), "maps that are merged must be disjoint"
    valid = reference._pairs(BlockMap.full(maps[0].k), slots, slots).expand(batch, heads, -1, -1)
    return int(union.sum()), int(valid.sum())


@pytest.mark.parametrize(("host", "method"), rows.both)
def test_density_is_counted_pairs(host: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reported is what ran: blocks that are forced after the budget count, padding does not."""
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs, (3, 6, 7), batch=2)
    with vsparse.apply(model, method, **rows.METHODS[method].sparse) as patch, executed(monkeypatch) as maps:
        calls = len(rows.tour(patch, model, values))
        stats = patch.stats()
        grid, lengths = patch.sites[0].call.grid, patch.sites[0].call.text_length
    valid = [grid.tokens] * 2 if lengths is None else [grid.video + n for n in lengths.tolist()]
    computed: dict[str, list[tuple[int, int]]] = {}
    for site, batch, ran in maps:
        computed.setdefault(site, []).append(_pairs(ran, batch, 2))
    everything = 2 * sum(n * n for n in valid)
    assert {possible for pairs in computed.values() for _, possible in pairs} <= {everything}
    done = sum(mine for pairs in computed.values() for mine, _ in pairs)
    dense = calls * len(patch.sites) - len(maps)
    assert stats["calls"].get("dense", 0) == dense
    assert sum(stats["calls"].values()) == calls * len(patch.sites)
    assert stats["density"] == pytest.approx(
        (done + dense * everything) / (calls * len(patch.sites) * everything), abs=1e-12
    )
    assert stats["sites"].keys() == computed.keys()
    for site, pairs in computed.items():
        assert stats["sites"][site] == pytest.approx(sum(x for x, _ in pairs) / (everything * len(pairs)), abs=1e-12)
    if maps:
        assert stats["sparse_density"] == pytest.approx(done / (len(maps) * everything), abs=1e-12)
    else:
        assert stats["sparse_density"] is None


def test_stats_of_nothing() -> None:
    with vsparse.apply(rows.build("wan")[0], "vsa") as patch:
        assert patch.stats() == {
            "density": None,
            "sparse_density": None,
            "sites": {},
            "calls": {},
            "searches": 0,
            "fallbacks": {},
            "kernel": patch.plan.kernel,
            "state_bytes": 0,
        }
        assert patch.auxiliary_losses() == {}


def test_a_failed_call_is_not_counted() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "vsa") as patch:
        handle = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rows.forward(model, values)
        handle.remove()
        assert patch.stats()["calls"] == {}
        rows.forward(model, values)
        assert patch.stats()["calls"] == {"search": 2}


def test_parameters_follow_the_host_mode() -> None:
    model, _ = rows.build("wan")
    model.train()
    with vsparse.apply(model, "vsa") as patch:
        assert all(site.training for site in patch.sites)
        assert not any(site.training for site in vsparse.apply(rows.build("wan")[0], "vsa").sites)
        assert all(x.requires_grad for x in patch.parameters())
        assert [name for name, _ in patch.named_parameters()] == [
            f"transformer.blocks.{i}.attn1.to_gate_compress.{part}" for i in range(2) for part in ("weight", "bias")
        ]


@pytest.mark.parametrize("method", rows.METHODS)
def test_the_global_generator_does_not_move(method: str) -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    patch = vsparse.apply(model, method, **rows.METHODS[method].sparse)
    assert torch.equal(torch.get_rng_state(), before)
    rows.generation(patch, model, values)
    assert torch.equal(torch.get_rng_state(), before)
    model.train()
    with patch.generation(1), patch.step(0):
        model(**values)[0].sum().backward()
    patch.remove()
    assert torch.equal(torch.get_rng_state(), before)


# ---- the registry ------------------------------------------------------------------------------------------------


def test_every_method_has_a_row() -> None:
    """A new method joins the contracts: give it its options in tests/rows.py."""
    assert set(rows.METHODS) == set(vsparse.list_methods())


def test_every_host_has_a_row() -> None:
    """A new model joins the contracts: give it a builder in tests/tiny.py and a row in tests/rows.py."""
    from vsparse.integrations.diffusers.hosts import HOSTS

    assert {row.model for row in rows.HOSTS.values()} == {model for host in HOSTS for model in host.models}


@pytest.mark.parametrize("method", rows.METHODS)
def test_methods_are_frozen_and_equal_by_value(method: str) -> None:
    kind = vsparse.list_methods()[method]
    assert kind.key == method
    assert kind() == kind()
    fields = {k: v for k, v in rows.METHODS[method].sparse.items() if k != "schedule"}
    assert kind(**fields) == kind().replace(**fields)
    assert hash(kind()) == hash(kind())
    with pytest.raises(AttributeError):
        kind().density = 0.5  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        kind(0.5)  # type: ignore[call-arg]


class _Point:
    value = "somewhere:Thing"

    def __init__(self, name: str, thing: object) -> None:
        self.name, self.thing = name, thing

    def load(self) -> object:
        return self.thing


def test_third_parties_register(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = vsparse.list_methods()["dense"]

    class Mine(dense):  # type: ignore[misc, valid-type]
        key = "mine"

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [_Point("mine", Mine)])
    assert vsparse.list_methods()["mine"] is Mine
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "mine") as patch:
        rows.forward(model, values)
        assert patch.stats()["calls"] == {"dense": 2}
    for point, words in (
        (_Point("vsa", Mine), "the method key 'vsa' is taken"),
        (_Point("x", 3), "must name Method classes"),
    ):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, point=point: [point])
        with pytest.raises(RuntimeError, match=words):
            vsparse.list_methods()


# ---- leaving -----------------------------------------------------------------------------------------------------


def test_leaving_the_context_removes_even_after_an_error() -> None:
    model, _ = rows.build("wan")
    mark = rows.footprint(model)
    with pytest.raises(KeyError), vsparse.apply(model, "vsa"):
        raise KeyError
    assert rows.footprint(model) == mark


def test_a_dropped_patch_can_be_found_again() -> None:
    model, inputs = rows.build("wan")
    values, mark = rows.prompt("wan", inputs), rows.footprint(model)
    vsparse.apply(model, "vsa")
    rows.forward(model, values)
    found = vsparse.patch_of(model)
    assert found is not None
    assert found.stats()["calls"] == {"search": 2}
    found.remove()
    assert rows.footprint(model) == mark
    assert vsparse.patch_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("removed", [True, False])
def test_a_dead_model_is_freed(removed: bool) -> None:
    """A patch that is still held does not hold a model that it has left; a forgotten one holds nothing."""
    model, inputs = rows.build("wan")
    patch = vsparse.apply(model, "adaspa", block=16)
    with patch.generation(5), patch.step(0):
        rows.forward(model, rows.prompt("wan", inputs))
        held = weakref.ref(patch.sites[0].state.version("cond")["bits"])
    gone = weakref.ref(model)
    if removed:
        patch.remove()
    else:
        del patch
    del model
    gc.collect()
    assert gone() is None
    assert held() is None


def test_apply_in_a_thread_and_run_in_another() -> None:
    model, inputs = rows.build("wan")
    values = rows.prompt("wan", inputs)
    with vsparse.apply(model, "vsa", density=0.3):
        wanted = rows.forward(model, values)
    thread = threading.Thread(target=lambda: vsparse.apply(model, "vsa", density=0.3))
    thread.start()
    thread.join()
    assert torch.equal(rows.forward(model, values), wanted)
    patch = vsparse.patch_of(model)
    assert patch is not None
    patch.remove()
