"""What only a device can show: no synchronisation, capture, compilation, determinism, the first call, memory.

Each property is "pass", "fail" or "not measured", with a reason or a figure.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vsparse
from vsparse import Blocking, BlockMap, select

from .clock import attempt
from .inputs import blocking, generator, synchronize
from .session import Session

STALL = 5.0  # seconds that a first forward and backward may take together


@dc.dataclass(frozen=True)
class Setting:
    """A training step: tensors ``[1, S, H, D]``, their blocking, the number of kept blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    side: Blocking
    count: int

    @classmethod
    def make(
        cls, device: torch.device, dtype: torch.dtype, slots: int, heads: int, width: int, density: float = 0.1
    ) -> Setting:
        side = blocking(slots, 64, device)
        shape = (1, side.blocks * 64, heads, width)
        numbers = generator(device, 0)
        q, k, v = (torch.randn(shape, generator=numbers, device=device, dtype=dtype) for _ in range(3))
        return cls(q, k, v, side, max(1, round(density * side.blocks)))

    def leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]

    def choose(self, q: Tensor, k: Tensor) -> BlockMap:
        q_mean, k_mean = vsparse.block_pool(q, self.side), vsparse.block_pool(k, self.side)
        assert isinstance(q_mean, Tensor)
        assert isinstance(k_mean, Tensor)
        scores = torch.einsum("bqhd,bkhd->bhqk", q_mean, k_mean)
        return select.top_k(scores, self.side, count=self.count, capacity=self.count)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            blocks = self.choose(q, k)
        return vsparse.block_sparse_attention(q, k, v, blocks)[0]

    def step(self) -> list[Tensor]:
        """Selection, forward, backward."""
        leaves = self.leaves()
        with torch.enable_grad():
            out = self.attend(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def _small(session: Session) -> Setting:
    slots, heads, width = (256, 2, 64) if session.dry else (8192, 4, 128)
    return Setting.make(session.device, session.dtype, slots, heads, width)


def no_sync(session: Session) -> str:
    """selection, forward and backward without a device synchronisation"""
    given = _small(session)
    given.step()
    synchronize(session.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        given.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    synchronize(session.device)
    return ""


def capture(session: Session) -> str:
    """CUDA graph of selection and attention, replayed with other inputs and so another map"""
    given, other = _small(session), _small(session)
    given.attend(given.q, given.k, given.v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        given.attend(given.q, given.k, given.v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = given.attend(given.q, given.k, given.v)
    before = given.choose(given.q, given.k).index.clone()
    for target, source in ((given.q, other.k), (given.k, other.v), (given.v, other.q)):
        target.copy_(source)
    graph.replay()
    eager = given.attend(given.q, given.k, given.v)
    assert not torch.equal(before, given.choose(given.q, given.k).index), "the map did not change"
    assert torch.equal(held, eager), f"replay and eager differ by {float((held - eager).abs().max()):.3e}"
    return ""


def compiled(session: Session) -> str:
    """torch.compile(fullgraph=True) of selection and attention, forward and backward, the bits of eager"""
    given = _small(session)
    with torch.no_grad():
        blocks = given.choose(given.q, given.k)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vsparse.block_sparse_attention(q, k, v, blocks)[0]

    function = torch.compile(attend, fullgraph=True)
    runs = []
    for each in (attend, function):
        leaves = given.leaves()
        out = each(*leaves)
        runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for name, eager, made in zip(("out", "dq", "dk", "dv"), *runs, strict=True):
        assert torch.equal(eager, made), f"{name} differs by {float((eager - made).abs().max().detach()):.3e}"
    whole = torch.compile(given.attend, fullgraph=True)(given.q, given.k, given.v)
    assert bool(whole.isfinite().all()), "selection and attention together give numbers that are not finite"
    return ""


def deterministic(session: Session) -> str:
    """torch.use_deterministic_algorithms(True): a training step runs, twice to the same bits"""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        given = _small(session)
        for name, first, again in zip(("out", "dq", "dk", "dv"), given.step(), given.step(), strict=True):
            assert torch.equal(first, again), f"{name} differs between two runs"
    finally:
        torch.use_deterministic_algorithms(before)
    return ""


def autocast(session: Session) -> str:
    """autocast: float32 projections, attention in bfloat16, finite gradients of the weights"""
    given = _small(session)
    width = given.q.shape[-1]
    layers = nn.ModuleList([nn.Linear(width, width, device=session.device) for _ in range(3)])
    with torch.autocast(session.device.type, dtype=torch.bfloat16), torch.enable_grad():
        q, k, v = (layer(given.q.float()) for layer in layers)
        out = given.attend(q, k, v)
    assert out.dtype == torch.bfloat16, f"the output is {out.dtype}"
    out.float().square().mean().backward()
    for name, layer in zip(("q", "k", "v"), layers, strict=True):
        assert layer.weight.grad is not None, f"no gradient for the projection of {name}"
        assert bool(layer.weight.grad.isfinite().all()), f"the gradient for the projection of {name} is not finite"
    return ""


def first_call(session: Session) -> str:
    """first forward and backward in a fresh process with an empty compiler cache, below 5 s"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(session.script), "--first-call", str(session.device)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, "TRITON_CACHE_DIR": folder}
        )
    assert done.returncode == 0, done.stderr[-300:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    words = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items())
    assert found["forward"] + found["backward"] < STALL, words
    return words


def time_first_call(device: torch.device) -> dict[str, float]:
    """What the fresh process runs: seconds of the first forward and the first backward, the device being awake."""
    given = Setting.make(device, torch.bfloat16, 4096, 4, 128)
    leaves = given.leaves()
    blocks = BlockMap.full(given.side)
    (given.q[0, :64, 0] @ given.k[0, :64, 0].t()).sum().item()
    times = [time.perf_counter()]
    out, _ = vsparse.block_sparse_attention(*leaves, blocks)
    synchronize(device)
    times.append(time.perf_counter())
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    synchronize(device)
    times.append(time.perf_counter())
    return {"forward": times[1] - times[0], "backward": times[2] - times[1]}


def memory(session: Session) -> str:
    """peak memory of a sparse training step, selection included, at most that of a dense one"""
    given = Setting.make(session.device, session.dtype, 32_768, 12, 128)

    def dense() -> None:
        leaves = given.leaves()
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves))
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    peaks = {}
    for name, call in (("sparse", given.step), ("dense", dense)):
        call()
        synchronize(session.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(session.device)
        before = torch.cuda.memory_allocated(session.device)
        call()
        synchronize(session.device)
        peaks[name] = (torch.cuda.max_memory_allocated(session.device) - before) / 2**20
    words = f"sparse {peaks['sparse']:.0f} MiB, dense {peaks['dense']:.0f} MiB at S=32768 H=12 D=128, density 0.1"
    assert peaks["sparse"] <= peaks["dense"], words
    return words


# The second: whether it can be measured on any device.
PROPERTIES: tuple[tuple[Callable[[Session], str], bool], ...] = (
    (no_sync, False),
    (capture, False),
    (compiled, False),
    (deterministic, True),
    (autocast, True),
    (first_call, False),
    (memory, False),
)


@contextlib.contextmanager
def _reasonable(session: Session) -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    session.free()


def run(session: Session) -> None:
    """All properties, one row each. A kernel that is wrong is not asked."""
    width = 64 if session.dry else 128
    refusal = session.verdicts.refusal(width, (64, 64), session.dtype, "backward")
    for measure, anywhere in PROPERTIES:
        row: dict[str, Any] = {"name": measure.__name__, "what": (measure.__doc__ or "").strip(), "words": ""}
        begin = time.perf_counter()
        if refusal:
            row |= {"status": "not measured", "words": f"refused: {refusal}"}
        elif session.device.type != "cuda" and not anywhere:
            row |= {"status": "not measured", "words": "needs a CUDA device"}
        else:
            with _reasonable(session):
                figure, words = attempt(lambda measure=measure: measure(session))
            row |= {"status": "fail" if words else "pass", "words": words or figure}
        row["seconds"] = time.perf_counter() - begin
        session.report.data["properties"].append(row)
        session.screen.say(f"property {row['name']}: {row['status']} {row['words']}".rstrip())
