"""Compiled and fake: graphs are few and shared, nothing recompiles, nothing reads a tensor on the host."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import rows
import tiny_pipelines
import torch
from compiling import Counted, compile_blocks
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vsparse

LAYERS = {"hunyuan_video": {"layers": 2, "single_layers": 2}}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, backend: Any) -> Any:
    """The backend of blocks that are one graph each."""
    compile_blocks(model, backend, fullgraph=True)
    return backend


def build(host: str) -> tuple[nn.Module, Any]:
    return rows.build(host, **LAYERS.get(host, {"layers": 3}))


def prompts(host: str, inputs: Any, grid: Any = rows.SMALL) -> list[dict[str, Any]]:
    """Prompts whose text lengths differ."""
    lengths = rows.HOSTS[host].lengths
    chosen = [None] * 3 if lengths is None else [[lengths[0]], [1], [lengths[1]], [lengths[0] - 1]]
    return [inputs(1, grid, n, seed=seed) for seed, n in enumerate(chosen)]


@functools.cache
def stock_graphs(host: str) -> int:
    """Graphs of an unpatched host, over all prompts."""
    model, inputs = build(host)
    count = compiled(model, Counted())
    for values in prompts(host, inputs):
        rows.forward(model, values)
    return count.graphs


@pytest.mark.parametrize(("host", "method"), rows.thin)
def test_graphs_are_bounded_and_nothing_recompiles(host: str, method: str) -> None:
    stock = stock_graphs(host)
    model, inputs = build(host)
    known = prompts(host, inputs)
    patch = rows.randomise(vsparse.apply(model, method, **rows.METHODS[method].sparse))
    wanted = [rows.tour(patch, model, values) for values in (known[0], known[-1])]
    count = compiled(model, Counted())
    assert all(map(torch.equal, rows.tour(patch, model, known[0]), wanted[0]))
    layouts = len({site.call.layout.key for site in patch.sites if site.call is not None})
    graphs = count.graphs
    assert 0 < graphs <= stock * len(rows.phases(method)) * layouts
    for values in known[1:]:
        last = rows.tour(patch, model, values)
    assert count.graphs == graphs, "another prompt recompiles"
    rows.generation(patch, model, known[0])
    assert count.graphs == graphs, "another step recompiles"
    assert all(map(torch.equal, last, wanted[1]))


def test_layers_with_patterns_of_their_own_share_the_graphs() -> None:
    """Static maps of one layout have one capacity, however long their rows are."""
    model, inputs = build("wan")
    values = rows.prompt("wan", inputs, (6, 4, 4))
    with vsparse.apply(model, "attention_tile", global_frames=(1, 4, 2), block=8) as patch:
        wanted = rows.forward(model, values)
        calls = [site.call for site in patch.sites]
        assert len({call.static.count.sum().item() for call in calls}) == 3
        assert len({call.static.capacity for call in calls}) == 1
        count = compiled(model, Counted())
        assert torch.equal(rows.forward(model, values), wanted)
        assert count.graphs == stock_graphs("wan")


def test_layers_with_densities_of_their_own_share_the_graphs() -> None:
    """A density for each head of each layer: tensors of one shape, and lists of one capacity."""
    model, inputs = build("wan")
    values = rows.prompt("wan", inputs, (6, 4, 4))
    common = {"tile": (1, 2, 2), "block": 4}
    parts = {
        str(layer): ("vsa", {"density": given, **common})
        for layer, given in enumerate(((0.1, 0.9), (0.4, 0.2), (1.0, 0.6)))
    }
    with vsparse.apply(model, "by_layer", parts=parts, schedule=vsparse.Schedule()) as patch:
        wanted = rows.forward(model, values)
        assert len(set(patch.stats()["sites"].values())) == len(patch.sites) == 3
        count = compiled(model, Counted())
        assert torch.equal(rows.forward(model, values), wanted)
        assert count.graphs == stock_graphs("wan")


@pytest.mark.parametrize("host", ["wan", "hunyuan_video"])
def test_densities_share_the_graphs(host: str) -> None:
    """A density ramp: one set of graphs, however many densities."""
    model, inputs = build(host)
    values = rows.prompt(host, inputs)
    model.train()
    ramp = vsparse.Schedule(ramp=lambda step: 1.0 - 0.3 * step)
    patch = rows.randomise(vsparse.apply(model, "vsa", tile=(2, 2, 2), block=8, schedule=ramp))
    count = compiled(model, Counted())
    densities, graphs = [], []
    for step in range(4):
        patch.training_step(step)
        rows.forward(model, values)
        densities.append(patch.stats()["density"])
        graphs.append(count.graphs)
    assert densities == sorted(set(densities), reverse=True)
    assert len(set(graphs)) == 1


@pytest.mark.parametrize("method", ["dense", "vsa", pytest.param("adaspa", marks=pytest.mark.full)])
def test_a_second_resolution_adds_its_graphs_once(method: str) -> None:
    model, inputs = build("wan")
    first, second = rows.prompt("wan", inputs), rows.prompt("wan", inputs, (3, 5, 4))
    with rows.randomise(vsparse.apply(model, method, **rows.METHODS[method].sparse)) as patch:
        wanted = rows.tour(patch, model, second)
        count = compiled(model, Counted())
        graphs = []
        for values in (first, second, first, second):
            last = rows.tour(patch, model, values)
            graphs.append(count.graphs)
        assert graphs[1:] == [graphs[1]] * 3
        assert all(map(torch.equal, last, wanted))


@pytest.mark.parametrize("method", ["vsa", pytest.param("adaspa", marks=pytest.mark.full)])
def test_remove_gives_back_compiled_blocks_that_run_stock(method: str) -> None:
    model, inputs = build("wan")
    values = rows.prompt("wan", inputs)
    stock = rows.forward(model, values)
    compiled(model, Counted())
    with vsparse.apply(model, method, **rows.METHODS[method].sparse) as patch:
        rows.tour(patch, model, values)
    assert torch.equal(rows.forward(model, values), stock)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_blocks_in_a_wrapper_keep_their_names(order: str) -> None:
    """``torch.compile(block)`` puts a module around a block that has the block's own name."""
    model, inputs = build("wan")
    values = rows.prompt("wan", inputs)
    with rows.sparse(model, "vsa") as patch:
        wanted, names = rows.forward(model, values), [name for name, _ in patch.named_parameters()]

    def wrap() -> None:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="eager")

    stock = rows.forward(model, values)
    with rows.patched(model, "vsa", order, wrap) as patch:
        assert torch.equal(rows.forward(model, values), wanted)
        assert [name for name, _ in patch.named_parameters()] == names
    assert torch.equal(rows.forward(model, values), stock)


def test_inductor_with_checkpointing_trains_like_eager() -> None:
    """The real compiler: our fakes have the real strides, and recomputation under it finds its call again."""
    model, inputs = rows.build("wan", layers=1)
    values = rows.prompt("wan", inputs, batch=2)
    model.train()
    with rows.randomise(vsparse.apply(model, "vsa", **rows.METHODS["vsa"].sparse)):
        model.enable_gradient_checkpointing()
        exact = _trained(model.double(), rows.cast_inputs(values, torch.float64))
        eager = _trained(model.float(), values)
        compiled(model, "inductor")
        found = _trained(model, values)

    def error(run: dict[str, torch.Tensor]) -> float:
        """Of all gradients as one vector, each in units of its largest number: some alone are little but rounding."""
        assert run.keys() == exact.keys()
        return float(torch.stack([((run[k] - x) / x.abs().max()).double().norm() for k, x in exact.items()]).norm())

    assert error(found) <= 2 * error(eager)


def _trained(model: nn.Module, values: dict[str, Any]) -> dict[str, torch.Tensor]:
    model(**values)[0].square().sum().backward()
    return rows.gradients(model)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_whole_model_is_compiled(order: str) -> None:
    """The hooks of the patch stay outside of the graph; what `torch.compile` returns is patched as the model in it."""
    model, inputs = build("wan")
    values = rows.prompt("wan", inputs)
    with rows.sparse(model, "vsa"):
        wanted = rows.forward(model, values)
    stock = rows.forward(model, values)
    count = Counted()
    whole: Any = torch.compile(model, backend=count) if order == "before" else model
    assert torch.equal(rows.forward(whole, values), stock)
    known = count.graphs
    with rows.sparse(whole, "vsa") as patch:
        whole = torch.compile(model, backend=count)
        found = [rows.forward(whole, values) for _ in range(3)]
        assert all(torch.equal(x, wanted) for x in found)
        assert count.graphs - known == 1
        assert vsparse.patch_of(whole) is patch
    assert torch.equal(rows.forward(whole, values), stock)


def test_a_pipeline_with_a_compiled_model_is_patched_whole() -> None:
    pipe, _ = tiny_pipelines.wan(experts=2)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with vsparse.apply(pipe, "vsa", **rows.METHODS["vsa"].sparse) as patch:
        assert {site.site.root for site in patch.sites} == {"transformer", "transformer_2"}


def test_the_graphs_are_the_compilers() -> None:
    """The count of these tests agrees with the compiler's own, so that a broken counter shows."""
    model, inputs = build("wan")
    counters.clear()
    count = compiled(model, Counted())
    rows.forward(model, rows.prompt("wan", inputs))
    assert count.graphs == counters["stats"]["unique_graphs"] > 0


# ---- reads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "method"), rows.thin)
def test_nothing_is_read_on_the_host(host: str, method: str) -> None:
    """Under FakeTensor there are no values: an ``.item()``, a ``nonzero`` or a branch on a tensor would raise."""
    model, inputs = rows.build(host)
    values = rows.prompt(host, inputs, batch=2)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        try:
            shape = rows.forward(model, fake).shape
        except DataDependentOutputException:
            pytest.skip("the stock host reads values itself")
        patch = vsparse.apply(model, method, **rows.METHODS[method].sparse)
        found = rows.tour(patch, model, fake)
        assert all(isinstance(x, FakeTensor) and x.shape == shape for x in found)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    WAITS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.equal.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("host", "method"), rows.both)
def test_reads_are_once_per_prompt(host: str, method: str) -> None:
    """The longest text of a prompt is the one thing that is read, and only once for a whole generation."""
    model, inputs = rows.build(host)
    known = [rows.prompt(host, inputs, batch=2, seed=seed) for seed in range(2)]
    with Reads() as stock:
        for values in known:
            rows.forward(model, values)
    patch = vsparse.apply(model, method, **rows.METHODS[method].sparse)
    calls = len(rows.tour(patch, model, known[0]))
    with Reads() as first:
        found = rows.tour(patch, model, known[0])
    with Reads() as second:
        rows.tour(patch, model, known[1])
    assert len(found) == calls
    # What was read for the first prompt is known in its second generation.
    assert first.count == calls * stock.count // 2
    assert second.count - calls * stock.count // 2 in ((0, 1) if rows.HOSTS[host].padded else (0,))


def test_reads_are_counted() -> None:
    with Reads() as reads:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
        assert bool(torch.ones(1) > 0)
    assert reads.count == 3
