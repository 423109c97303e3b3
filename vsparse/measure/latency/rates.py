"""How fast this machine computes: measured once for each device and dtype, and kept in the user's cache."""

from __future__ import annotations

import dataclasses as dc
import functools
import importlib.metadata
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from vsparse import ops, select
from vsparse.blocks import BlockMap
from vsparse.geometry import Grid, kept_blocks
from vsparse.layouts import RasterLayout
from vsparse.measure.demo import environment
from vsparse.measure.latency.baselines import default_attention
from vsparse.measure.latency.timeline import clock_of
from vsparse.measure.recall_report import as_json, write_text
from vsparse.parallel.rates import Rate, fit_compute

__all__ = ["RandomAttention", "Rates", "cache_file", "kept_rates", "machine_rates", "measure_rates"]

_TURNS = 5
_DENSITY = 0.25
_BLOCK = 64


@dc.dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device in one dtype.

    Args:
        device: Its name. dtype: of the operands. date: when they were measured, or "" for assumed ones.
        products: Matrix products. dense: full attention. sparse: `block_sparse_attention`, of the pairs it computes.
        memory: Bytes per second that a copy reads and writes. call: seconds of an operator that does next to nothing.
    """

    device: str
    dtype: str
    date: str
    products: Rate
    dense: Rate
    sparse: Rate
    memory: float
    call: float

    def __post_init__(self) -> None:
        for name in ("memory", "call"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"Rates: {name} must be a finite number, positive, got {value!r}")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Rates:
        """From what `dataclasses.asdict` made.

        Raises:
            TypeError, ValueError: it is not that.
        """
        rates = {name: Rate(**values[name]) for name in ("products", "dense", "sparse")}
        return cls(**{**values, **rates})


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Time products, attention, sparse attention and copies of a few sizes; seconds on a GPU and on a CPU."""
    gpu = device.type == "cuda"
    clock = clock_of(device)
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    def seconds(call: Callable[[], object], repeats: int = 1) -> float:
        call()
        taken = []
        for _ in range(_TURNS):
            start = clock.now()
            for _ in range(repeats):
                call()
            taken.append((clock.now() - start) / repeats)
        return median(taken)

    with torch.no_grad():
        products = []
        for size in (1024, 4096, 8192) if gpu else (128, 512, 1024):
            x, w = noise(size, size), noise(size, size)
            products.append((2.0 * size**3, seconds(lambda x=x, w=w: F.linear(x, w), 8)))  # type: ignore[misc]
        heads, width = (8, 128) if gpu else (2, 64)
        dense, sparse = [], []
        for slots in (4096, 8192, 16384) if gpu else (768, 1536, 3072):
            some = RandomAttention.of(slots, heads=heads, width=width, density=_DENSITY, device=device, dtype=dtype)
            call = functools.partial(default_attention, some.q, some.k, some.v)
            dense.append((4.0 * heads * slots**2 * width, seconds(call, 2)))
            sparse.append((some.flops, seconds(some.run, 2)))
        block = noise(2**28 // dtype.itemsize if gpu else 2**22 // dtype.itemsize)
        copy = seconds(lambda: block.clone(), 4)
        one = noise(1)
        call_seconds = seconds(lambda: one + one, 200)
    fitted = [fit_compute(*zip(*found, strict=True)) for found in (products, dense, sparse)]
    return Rates(
        device=_name(device),
        dtype=_word(dtype),
        date=environment()["date"],
        products=fitted[0],
        dense=fitted[1],
        sparse=fitted[2],
        memory=2.0 * block.nbytes / copy,
        call=call_seconds,
    )


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class RandomAttention:
    """Sparse attention on noise, with as many random key blocks of 64 tokens in every row, others in each head.

    Args:
        q, k, v: ``[1, S, H, D]``. blocks: the map.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: BlockMap

    @classmethod
    def of(
        cls, slots: int, *, heads: int, width: int, density: float, device: torch.device, dtype: torch.dtype
    ) -> RandomAttention:
        """The same one each time.

        Args:
            slots: S, of queries and of keys: whole blocks. heads: H. width: D.
            density: share of the key blocks that a row keeps.
        """
        blocks, draw = slots // _BLOCK, torch.Generator().manual_seed(0)
        blocking = RasterLayout(Grid(t=1, h=blocks, w=_BLOCK), block=_BLOCK).to(device).bind()
        scores = torch.rand(1, heads, blocks, blocks, generator=draw).to(device)
        kept = kept_blocks(density, blocks)
        chosen = select.top_k(scores, blocking, count=kept, capacity=kept)
        q, k, v = (torch.randn(1, blocks * _BLOCK, heads, width, generator=draw).to(device, dtype) for _ in range(3))
        return cls(q=q, k=k, v=v, blocks=chosen)

    @property
    def flops(self) -> float:
        """Of the pairs that the map keeps."""
        return 4.0 * self.q.shape[-1] * float(self.blocks.pairs()[0].sum())

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The result and its LSE."""
        return ops.block_sparse_attention(self.q, self.k, self.v, self.blocks)


def cache_file() -> Path:
    """Where rates are kept: beside torch's own caches, which follow the conventions of the platform."""
    return Path(torch.hub.get_dir()).parent / "vsparse" / "rates.json"


def machine_rates(device: torch.device, dtype: torch.dtype, *, again: bool = False) -> Rates:
    """The rates of a device: those that are kept, or measured now and then kept.

    They hold for one device, dtype, number of threads, and versions of torch and vsparse.

    Args:
        again: Measure also where some are kept.
    """
    known = None if again else kept_rates(device, dtype)
    if known is not None:
        return known
    path, found = cache_file(), measure_rates(device, dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, as_json({**_kept(path), _key(device, dtype): dc.asdict(found)}))
    except OSError as error:
        warnings.warn(f"vsparse: the rates of this machine could not be kept in {path}: {error}", stacklevel=2)
    return found


def kept_rates(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """The rates of a device that are kept; None where there are none, or damaged ones, or another version's."""
    try:
        return Rates.read(_kept(cache_file())[_key(device, dtype)])
    except (TypeError, ValueError, KeyError):
        return None


def _kept(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(environment()["cpu"])


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _key(device: torch.device, dtype: torch.dtype) -> str:
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else ""
    version = importlib.metadata.version("vsparse")
    return ", ".join(x for x in (_name(device), _word(dtype), threads, f"torch {torch.__version__}", version) if x)
