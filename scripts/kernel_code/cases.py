"""Which kernels are compiled, and the arguments that their launchers hand to Triton."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vsparse import BlockMap
from vsparse.layouts import Blocking

STEPS = ("attend", "grad_queries", "grad_keys")
ARCHITECTURES = (80, 89, 90, 100)
DTYPES = {"bf16": ("bfloat16", 2), "fp16": ("float16", 2), "fp32": ("float32", 4)}
# Blocks, heads, batch and list length: numbers that no specialisation of Triton (1, multiples of 16) favours.
BLOCKS, HEADS, BATCH, LISTED = 18, 3, 2, 5
# Query blocks of a transposition and scores of a row that fill the widest tile of `collect` and one of 2048 columns.
ROWS, COLUMNS = 2050, 2047


@dc.dataclass(frozen=True)
class Case:
    """One kernel that a launch on this architecture would compile.

    Args:
        step: The kernel. d, bq, bk: head dimension and block sizes; 0 where the kernel knows none.
        variant: Which of its compiled forms; see `FLAGS` and `KERNELS`. Empty: the plain one.
    """

    step: str
    arch: int
    dtype: str
    d: int
    bq: int
    bk: int
    variant: str = ""

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def name(self) -> str:
        step = f"{self.step}/{self.variant}" if self.variant else self.step
        sizes = f" {self.dtype} D{self.d} {self.bq}x{self.bk}" if self.d else ""
        return f"{step} sm_{self.arch}{sizes}"


def _side(block: int, blocks: int = BLOCKS) -> Blocking:
    length = torch.full((1, 1, blocks), block, dtype=torch.int32)
    return Blocking(length=length, block=block)


def _map(q: Blocking, k: Blocking) -> BlockMap:
    index = torch.arange(LISTED, dtype=torch.int32).expand(BATCH, HEADS, q.blocks, LISTED)
    return BlockMap(index, torch.full(index.shape[:3], LISTED, dtype=torch.int32), q, k)


def _tensor(case: Case, slots: int) -> Tensor:
    return torch.empty(BATCH, slots, HEADS, case.d, dtype=getattr(torch, DTYPES[case.dtype][0]))


def _starts(side: Blocking) -> Blocking:
    start = torch.arange(side.blocks, dtype=torch.int32) * side.block
    return dc.replace(side, start=start[None, None])


def _block_sparse(case: Case) -> None:
    from vsparse.kernels.block_sparse import launch

    q_side, k_side = _side(case.bq), _side(case.bk)
    if case.variant == "starts":
        q_side, k_side = _starts(q_side), _starts(k_side)
    blocks = _map(q_side, k_side)
    if case.variant.endswith("bias"):
        blocks = dc.replace(blocks, key_bias=torch.zeros(BATCH, HEADS, BLOCKS))
    q, k, v = (_tensor(case, BLOCKS * block) for block in (case.bq, case.bk, case.bk))
    skip = 8.0 if case.variant.endswith("skip") else None
    config, tma = launch.config, True if case.variant.startswith("tma") else None
    with mock.patch.object(launch, "config", lambda *sizes: config(*sizes[:6], tma)):
        out, lse = launch.block_sparse_attention(q, k, v, blocks, scale=case.d**-0.5, skip_threshold=skip)
    if case.step != "attend":
        launch.block_sparse_attention_backward(out, lse, q, k, v, out, lse, blocks, scale=case.d**-0.5)


def _transpose(_case: Case) -> None:
    from vsparse.kernels.block_sparse.transpose import transpose

    transpose(_map(_side(64, ROWS), _side(64)))


def _gather(case: Case) -> None:
    from vsparse.kernels.gather import launch

    blocks = _map(_side(1, BLOCKS * case.bk), _side(case.bk))
    q, k, v = (_tensor(case, BLOCKS * case.bk) for _ in range(3))
    out, lse = launch.block_sparse_attention(q, k, v, blocks, scale=case.d**-0.5)
    launch.block_sparse_attention_backward(out, lse, q, k, v, out, lse, blocks, scale=case.d**-0.5)


def _gather_keys(case: Case) -> None:
    from vsparse.kernels.gather import keys_launch as launch

    k_side = _side(1, BLOCKS * case.bq)
    blocks = _map(_side(case.bq), k_side)
    if case.variant == "bias":
        blocks = dc.replace(blocks, key_bias=torch.zeros(BATCH, HEADS, k_side.blocks))
    q, k, v = (_tensor(case, BLOCKS * case.bq) for _ in range(3))
    out, lse = launch.block_sparse_attention(q, k, v, blocks, scale=case.d**-0.5)
    launch.block_sparse_attention_backward(out, lse, q, k, v, out, lse, blocks, scale=case.d**-0.5)


def _select(case: Case) -> None:
    from vsparse.kernels.select import launch

    scores = torch.empty(BATCH, HEADS, BLOCKS, COLUMNS)
    length = torch.full((1, 1, COLUMNS), 64, dtype=torch.int32)
    reach = case.variant == "reach"
    limit = torch.full((1, 1, 1), 0.9, dtype=torch.float64) if reach else torch.full((1, 1, 1), 5, dtype=torch.int32)
    launch.select_blocks(
        scores, length, None, limit, rule=case.variant, budget="exempt", least=int(reach), capacity=COLUMNS
    )


def _block_mass(case: Case) -> None:
    from vsparse.kernels.block_mass import launch

    q_side, k_side = _side(case.bq), _side(case.bk)
    q, k = _tensor(case, BLOCKS * case.bq), _tensor(case, BLOCKS * case.bk)
    lse = torch.empty(q.shape[:3])
    candidates = _map(q_side, k_side) if case.variant == "listed" else None
    launch.block_mass(q, k, lse, q_side, k_side, scale=case.d**-0.5, candidates=candidates)


def _block_pool(case: Case) -> None:
    from vsparse.kernels.block_pool import launch

    side, x = _side(case.bk), _tensor(case, BLOCKS * case.bk)
    mean, _ = launch.block_pool(x, side)
    launch.block_pool_backward(mean, x, side)


def _merge(case: Case) -> None:
    from vsparse.kernels.merge import launch

    outs = [_tensor(case, BLOCKS * case.bq) for _ in range(2)]
    lses = [torch.empty(x.shape[:3]) for x in outs]
    launch.merge_attention(outs, lses)
    launch.merge_attention_backward(outs[0], lses[0], outs, lses)


def _reorder(case: Case) -> None:
    from vsparse.kernels.reorder import launch

    x = _tensor(case, BLOCKS * case.bk)
    launch.reorder(x, torch.zeros(1, 1, x.shape[1] + 1, dtype=torch.int64))


@dc.dataclass(frozen=True)
class Kernel:
    """A kernel beside the three of block-sparse attention.

    Args:
        launch: Runs its launcher. variants: by name, the constants that tell it from other launches of the kernel.
        bq, bk: Slots of a query block and of a key block. d: head dimensions; empty where the kernel knows neither
            them nor blocks.
        products: Whether it multiplies matrices.
    """

    launch: Callable[[Case], None]
    variants: dict[str, dict[str, Any]] = dc.field(default_factory=lambda: {"": {}})
    bq: int = 64
    d: tuple[int, ...] = (128,)
    products: bool = False
    bk: int = 64


_LISTED = {"listed": {"LISTED": True}}
_FULL = {"full": {"LISTED": False}}
KERNELS = {
    "prepare": Kernel(_block_sparse),
    "mark": Kernel(_transpose, d=()),
    "collect": Kernel(_transpose, {"count": {"WRITE": False}, "write": {"WRITE": True}}, d=()),
    "attend_rows": Kernel(_gather, {**_LISTED, **_FULL}, 1, (64, 128), products=True),
    "combine": Kernel(_gather, {"merge": {"WEIGHTED": True}, "sum": {"WEIGHTED": False}}, 1),
    "grad_rows": Kernel(_gather, {**_LISTED, **_FULL}, 1, (64, 128), products=True),
    "grad_blocks": Kernel(_gather, bq=1, d=(64, 128), products=True),
    "attend_list": Kernel(_gather_keys, {"": {}, "bias": {"BIAS": True}}, bk=1, d=(64, 128), products=True),
    "grad_list": Kernel(_gather_keys, bk=1, d=(64, 128), products=True),
    "grad_entries": Kernel(_gather_keys, {**_LISTED, **_FULL}, bk=1, d=(64, 128), products=True),
    "sum_entries": Kernel(_gather_keys, bk=1),
    "select": Kernel(_select, {rule: {"RULE": rule, "COLUMNS": 2048} for rule in ("count", "reach")}, d=()),
    "pair_mass": Kernel(_block_mass, {"all": {"LISTED": False}, **_LISTED}, d=(64, 128), products=True),
    "pool": Kernel(_block_pool),
    "spread": Kernel(_block_pool),
    "merge": Kernel(_merge),
    "grad_parts": Kernel(_merge),
    "move": Kernel(_reorder),
}
# What block-sparse attention compiles apart: blockings with starts, a bias per key block, tiles that may be skipped.
FLAGS = {"attend": ("starts", "bias", "skip"), "grad_queries": ("starts", "bias"), "grad_keys": ("starts", "bias")}


def _described(architectures: tuple[int, ...], everything: bool) -> Iterator[Case]:
    """`attend` with tensor descriptors, which no launch takes by itself yet."""
    for arch in sorted({90, 100 if everything else 90} & {*architectures}):
        for d, block in itertools.product((64, 80, 96, 128), (64, 128)):
            if everything or d in (64, 128) or block == 64:
                yield Case("attend", arch, "bf16", d, block, block, "tma")
        if everything:
            yield from (
                Case("attend", arch, "bf16", d, *block, "tma") for d in (64, 128) for block in ((64, 128), (128, 64))
            )
            yield from (Case("attend", arch, "bf16", d, 64, 64, "tma") for d in (32, 256))
            yield from (Case("attend", arch, "bf16", 128, 64, 64, variant) for variant in ("tma-bias", "tma-skip"))
            yield Case("attend", arch, "fp16", 128, 64, 64, "tma")


def _others(architectures: tuple[int, ...]) -> Iterator[Case]:
    """The flags of block-sparse attention on sm_90, and every other kernel on sm_80 and sm_90."""
    for step, flags in FLAGS.items():
        yield from (Case(step, 90, "bf16", 128, 64, 64, flag) for flag in flags if 90 in architectures)
    for arch, (step, kernel) in itertools.product(architectures, KERNELS.items()):
        for variant in kernel.variants if arch in (80, 90) else ():
            yield from (Case(step, arch, "bf16", d, kernel.bq, kernel.bk, variant) for d in kernel.d)
            if not kernel.d:
                yield Case(step, arch, "fp32", 0, 0, 0, variant)


def shipped(architectures: tuple[int, ...], everything: bool) -> list[Case]:
    """The cases of a run: bf16 at two block sizes, or the whole table of block-sparse attention; the other kernels."""
    others = [*_others(architectures), *_described(architectures, everything)]
    if not everything:
        return [
            Case(step, arch, "bf16", d, block, block)
            for arch, step, d, block in itertools.product(architectures, STEPS, (64, 80, 96, 128), (64, 128))
        ] + others
    blocks = tuple(itertools.product((64, 128), (64, 128)))
    found = []
    for arch, step, d in itertools.product(architectures, STEPS, (32, 64, 80, 96, 128, 256)):
        found += [Case(step, arch, "bf16", d, bq, bk) for bq, bk in blocks]
        found += [Case(step, arch, dtype, d, 64, 64) for dtype in ("fp16", "fp32")]
    return found + others


def launched(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel, arguments and options that a launch of this case would hand to Triton."""
    from triton.runtime.jit import KernelInterface

    from vsparse.kernels.block_mass import launch as mass
    from vsparse.kernels.block_sparse import launch as attention

    kernel = KERNELS.get(case.step, Kernel(_block_sparse))
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, _grid: Any) -> Any:
        return lambda *given, **options: found.append((kernel, given, options))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(KernelInterface, "__getitem__", record))
        for module in (attention, mass):
            stack.enter_context(mock.patch.object(module, "architecture", return_value=case.arch))
        kernel.launch(case)
    constants = kernel.variants.get(case.variant, {}).items()
    for launch in found:
        if launch[0].__name__ == case.step and constants <= launch[2].items():
            return launch
    raise RuntimeError(f"no launch of {case.step} with {dict(constants)} among {[x[0].__name__ for x in found]}")
