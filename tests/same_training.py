"""One short fine-tuning, run in every way in which a model can be trained; all of them are the same on paper.

The loss curve, the gradients (added up over the steps: AdamW would forgive a factor) and the trained parameters are
compared, each as a whole, with the unpatched model in float64. What they may differ by is what the unpatched model
differs by itself, in float32 and with its keys in another order or its attention merged from two parts. Processes,
checkpoints and accumulation are held to the same run of whole batches.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import rows
import tiny
import torch
from host_law import stock_runs
from processes import full
from torch import Tensor, nn

import vsparse
from vsparse import adapter
from vsparse.fingerprint import distance
from vsparse.integrations.diffusers import fingerprint
from vsparse.parallel.context import ContextParallel, parse
from vsparse.training.objective import FlowMatching

STEPS = 20
BATCH = 2
ALONE = ("plain", "checkpointing", "accumulation")
SPREAD = ("ddp", "fsdp2")
PAIR = ("shared", "shared+checkpointing", "shared+accumulation", "shared+unwrapped")
FOUR = ("shared+ddp", "shared+fsdp2")
BY_SAMPLE = (*SPREAD, *FOUR)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

Batch = tuple[dict[str, Any], Tensor, Tensor, Tensor]
Outcome = tuple[Tensor, ...]


@dc.dataclass(frozen=True, kw_only=True)
class Way:
    """How a model is trained.

    Args:
        host: A key of `tiny.HOSTS`. lora: Train a LoRA instead of the weights, added "after" or "before" the patch.
        mode: "plain"; "checkpointing"; "accumulation" of gradients over single samples; "ddp" or "fsdp2" on as many
            processes as the batch has samples. With "shared" several processes have parts of the same samples, under
            DDP or with "unwrapped" alone; "shared+ddp" and "shared+fsdp2": so many for each sample.
        parallel: How they share them.
        gradients: As of `ContextParallel`; None: as the mode wants it.
        method: Patched with, None: unpatched. options: of the method.
        learns: What the method has added begins with values that show, and is trained, too.
    """

    host: str
    lora: str | None = None
    mode: str = "plain"
    parallel: str = ""
    gradients: Literal["sum", "mean"] | None = None
    method: str | None = None
    options: Mapping[str, Any] = dc.field(default_factory=dict)
    learns: bool = False

    @property
    def context(self) -> ContextParallel | None:
        """What to hand to the patch."""
        if not self.parallel:
            return None
        usual = "sum" if self.mode == "shared+unwrapped" else "mean"
        return dc.replace(parse(self.parallel), gradients=self.gradients or usual)


def objective() -> FlowMatching:
    """Of Wan and HunyuanVideo alike."""
    return FlowMatching(shift=3.0, stratified=True)


def batches(host: str, dtype: torch.dtype) -> list[Batch]:
    """Three batches that come again: the host's arguments, clean samples, noise, times; the same in every dtype."""
    _, inputs = rows.build(host)
    found = []
    for seed in range(3):
        values = rows.prompt(host, inputs, batch=BATCH, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        clean = values.pop("hidden_states")
        noise = torch.randn(clean.shape, generator=generator)
        times = objective().sample(BATCH, generator=generator)
        found.append((rows.cast_inputs(values, dtype), clean.to(dtype), noise.to(dtype), times))
    return found


def samples(batch: Batch, part: slice) -> Batch:
    """Some samples of a batch."""
    values, *rest = batch
    cut = {key: x[part] if isinstance(x, Tensor) else x for key, x in values.items()}
    return cut, *(x[part] for x in rest)  # type: ignore[return-value]


def loss(model: nn.Module, batch: Batch, patch: vsparse.Patch | None = None) -> Tensor:
    """Mean of the samples' losses, and what the method asks to add."""
    values, clean, noise, times = batch
    noisy, timestep = objective().noise(clean, noise, times)
    prediction = model(**{**values, "hidden_states": noisy, "timestep": timestep})[0]
    extra = {} if patch is None else patch.auxiliary_losses()
    return objective().loss(prediction, clean, noise, times).mean() + sum(extra.values())


def prepared(way: Way, dtype: torch.dtype) -> tuple[nn.Module, vsparse.Patch | None]:
    """The model with its LoRA and patch, in the order that the way says."""
    model, _ = rows.build(way.host, dtype=dtype)
    model.train()
    patch = None

    def add_lora() -> None:
        from peft import LoraConfig

        model.requires_grad_(False)
        with tiny.seeded(3):
            model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))

    if way.lora == "before":
        add_lora()
    if way.method is not None:
        patch = vsparse.apply(model, way.method, schedule=vsparse.Schedule(), parallel=way.context, **way.options)
        if way.learns:
            rows.randomise(patch)
    if way.lora == "after":
        add_lora()
    if way.mode.endswith("checkpointing"):
        model.enable_gradient_checkpointing()
    return model, patch


def wrapped(model: nn.Module, mode: str) -> nn.Module:
    """The module to call."""
    if mode in ("ddp", *PAIR[:3], "shared+ddp"):
        return nn.parallel.DistributedDataParallel(model)
    if mode.endswith("fsdp2"):
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        stacks = ("blocks", "transformer_blocks", "single_transformer_blocks")
        for block in (block for name in stacks for block in getattr(model, name, ())):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def parts(mode: str, each: int = 1) -> Iterator[slice]:
    """The samples that this process takes at once, one after the other; ``each`` processes share them."""
    if mode in BY_SAMPLE:
        place = torch.distributed.get_rank() // each
        yield slice(place, place + 1)
    elif mode.endswith("accumulation"):
        yield from (slice(i, i + 1) for i in range(BATCH))
    else:
        yield slice(None)


def train(way: Way, dtype: torch.dtype = torch.float32) -> Outcome:
    """Loss curve, gradients and trained parameters of the host, after AdamW steps; float64."""
    model, patch = prepared(way, dtype)
    called = wrapped(model, way.mode)
    mine = [x for name, x in model.named_parameters() if x.requires_grad and (way.learns or ".vsparse." not in name)]
    optimiser = torch.optim.AdamW(mine, lr=1e-2 if way.lora else 1e-3)
    data, shares = batches(way.host, dtype), list(parts(way.mode, way.context.size if way.context else 1))
    losses, gradients = torch.zeros(STEPS, dtype=torch.float64), [torch.zeros_like(x) for x in mine]
    for i in range(STEPS):
        model.zero_grad()
        for part in shares:
            held = called.no_sync() if called is not model and part != shares[-1] else contextlib.nullcontext()
            with held:
                piece = loss(called, samples(data[i % len(data)], part), patch if way.learns else None) / len(shares)
                piece.backward()
            losses[i] += piece.detach().double()
        if way.mode == "shared+unwrapped":
            assert patch is not None
            patch.sum_gradients()
        for x, total in zip(mine, gradients, strict=True):
            if x.grad is not None:
                total += x.grad
        optimiser.step()
    if way.mode in BY_SAMPLE:
        torch.distributed.all_reduce(losses)
        losses /= torch.distributed.get_world_size()
    if patch is not None:
        patch.remove()
    return losses, _flat(gradients), _flat(mine)


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([full(x.detach()).double().flatten() for x in tensors])


# ---- the law -----------------------------------------------------------------------------------------------------


def ways(modes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The product of hosts, LoRA, modes and methods; over processes with the one method that adds parameters."""
    methods = ("vsa",) if modes == SPREAD else ("vsa", "vmoba")
    return rows.product(host=("wan", "hunyuan_video"), lora=("", "after"), mode=modes, method=methods)


def shared_ways(modes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The same for videos that two processes share, by heads or by tokens."""
    return rows.product(
        host=("wan", "hunyuan_video"), lora=("", "after"), mode=modes, method=("vsa",), parallel=("ulysses=2", "ring=2")
    )


def way_of(row: tuple[str, ...]) -> Way:
    """An entry of `ways` or `shared_ways`, with the options at which its method keeps everything."""
    host, lora, mode, method, *parallel = row
    options = rows.METHODS[method].everything or {}
    return Way(host=host, lora=lora or None, mode=mode, method=method, options=options, parallel="".join(parallel))


@functools.cache
def standard(host: str, lora: bool) -> tuple[Outcome, list[Outcome]]:
    """The unpatched training in float64, and in float32 in several ways to round it."""
    way = Way(host=host, lora="after" if lora else None)
    exact = train(way, torch.float64)
    curve = exact[0]
    assert float(curve[-3:].mean()) < 0.8 * float(curve[:3].mean()), "it does not learn: the test would see little"
    model, _ = rows.build(host)
    values, clean, *_ = batches(host, torch.float32)[0]
    tokens = rows.tokens(model, {**values, "hidden_states": clean})
    return exact, stock_runs(lambda: train(way), tokens)


def errors(way: Way, found: Outcome) -> dict[str, float]:
    """Errors of the whole curve and of all parameters in units of the reference's; at most 2 by the law."""
    exact, stock = standard(way.host, way.lora is not None)
    return _in_units(found, exact, exact, stock)


def _in_units(found: Outcome, truth: Outcome, exact: Outcome, stock: list[Outcome]) -> dict[str, float]:
    """Distances to a truth in units of the reference's to its own."""
    units = {}
    names = ("loss", "gradients", "parameters")
    for i, name in enumerate(names):
        units[name] = float((found[i] - truth[i]).norm()) / max(float((x[i] - exact[i]).norm()) for x in stock)
    return units


def learning(host: str, method: str, mode: str, parallel: str) -> Way:
    """Blocks are dropped, and what the method has added is trained with the host."""
    return Way(host=host, mode=mode, parallel=parallel, method=method, options=rows.METHODS[method].sparse, learns=True)


def apart_from_alone(way: Way, found: Outcome) -> dict[str, float]:
    """How far a training in float64 is from that of one process, in units of what float32 does to the stock host.

    Blocks are chosen alike in float64 unless two scores are equal to its last digits, so all of it can be compared.
    """
    alone = train(dc.replace(way, mode="plain", parallel="", gradients=None), torch.float64)
    return _in_units(found, alone, *standard(way.host, False))


# ---- tasks of several processes --------------------------------------------------------------------------------------


def trained_apart(row: tuple[str, ...]) -> list[list[float]]:
    """What `train` gives in each process."""
    return [x.tolist() for x in train(way_of(row))]


def trained_exactly(way: Way) -> list[list[float]]:
    """The same of any way, in float64."""
    return [x.tolist() for x in train(way, torch.float64)]


def parts_are_averaged(mode: str, folder: str) -> None:
    """Gradients of what a sparse patch adds are the mean of the processes' own, to the last bit; it is saved whole.

    Those of the host obey the law only: FSDP2 adds up what the blocks give to the text in another order.
    """
    data = batches("wan", torch.float32)[0]

    def patched() -> tuple[nn.Module, vsparse.Patch]:
        model, _ = rows.build("wan")
        patch = rows.randomise(vsparse.apply(model.train(), "vsa", **rows.METHODS["vsa"].sparse))
        model.enable_gradient_checkpointing()
        return model, patch

    model, patch = patched()
    for i in range(BATCH):
        (loss(model, samples(data, slice(i, i + 1))) / BATCH).backward()
    wanted, values = rows.gradients(model), dict(patch.named_tensors())
    ours = [name for name in wanted if ".vsparse." in name]
    assert len(ours) == len(patch.parameters()) > 0

    model, patch = patched()
    called = wrapped(model, mode)
    (part,) = parts(mode)
    loss(called, samples(data, part)).backward()
    found = {name: full(x) for name, x in rows.gradients(model).items()}
    assert found.keys() == wanted.keys()
    wrong = [name for name in ours if not torch.equal(found[name], wanted[name])]
    assert not wrong, wrong

    if mode == "fsdp2" or torch.distributed.get_rank() == 0:
        patch.save(folder)
    torch.distributed.barrier()
    known = adapter.read(folder)
    stored, whole = known.tensors, fingerprint(rows.build("wan")[0])
    assert stored.keys() == values.keys()
    assert all(torch.equal(stored[name], values[name]) for name in values)
    assert known.models is not None
    assert distance(known.models["transformer"], whole) == distance(whole, fingerprint(model)) == 0
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.zero_()
    vsparse.load(model, folder)
    again = {name: full(x) for name, x in patch.named_tensors()}
    assert all(torch.equal(again[name], values[name]) for name in values)
    patch.remove()
    if mode == "fsdp2":  # a method without parameters: what is sharded is the host's, and one process writes
        with vsparse.apply(model, "adaspa") as patch:
            patch.save(f"{folder}-adaspa")
        torch.distributed.barrier()
        vsparse.load(model, f"{folder}-adaspa")
