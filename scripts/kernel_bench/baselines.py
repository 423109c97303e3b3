"""Other block-sparse kernels on the same lists: compiled flex_attention, and public packages where they are there."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import vsparse
from vsparse import BlockMap

from . import plan
from .clock import Candidate, attempt, interleaved
from .inputs import Inputs, Triple, executed_pairs, make, random_map
from .plan import Group
from .session import Session

SHAPES = (
    Group(39_936, 12, 128, (64, 64), (0.1,)),
    Group(39_936, 12, 128, (128, 128), (0.1,)),
    Group(109_632, 7, 128, (64, 64), (0.037,)),
)
TINY = (Group(256, 2, 64, (64, 64), (0.5,)),)
AGREE = 2e-2  # relative distance from ours beyond which a baseline computes something else

Maker = Callable[[Group, Inputs, BlockMap], Callable[[int], Tensor]]


def _heads_first(inputs: Inputs) -> list[Triple]:
    found = []
    for values in inputs.sets:
        q, k, v = (x.transpose(1, 2).contiguous() for x in values)
        found.append((q, k, v))
    return found


def _padded(blocks: BlockMap) -> Tensor:
    """``[1, H, Q, K]`` int32 lists, as wide as there are key blocks."""
    index = blocks.index.new_zeros(*blocks.index.shape[:3], blocks.k.blocks)
    index[..., : blocks.capacity] = blocks.index
    return index


def flex(group: Group, inputs: Inputs, blocks: BlockMap) -> Callable[[int], Tensor]:
    index = _padded(blocks)
    nothing = torch.zeros_like(blocks.count)
    mask = BlockMask.from_kv_blocks(
        nothing, torch.zeros_like(index), blocks.count, index, BLOCK_SIZE=group.block,
        seq_lengths=(group.slots, group.slots),
    )  # fmt: skip
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if min(group.block) < 128 else None
    assert torch.equal(mask.to_dense()[..., : blocks.k.blocks].bool(), blocks.to_mask()), "its mask holds other blocks"
    if blocks.index.device.type != "cuda":
        raise NotImplementedError("without compilation it ignores the lists; needs a CUDA device")
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    sets = _heads_first(inputs)
    return lambda i: compiled(*sets[i % len(sets)], block_mask=mask, kernel_options=options).transpose(1, 2)


def fastvideo(group: Group, inputs: Inputs, blocks: BlockMap) -> Callable[[int], Tensor]:
    if group.block != (64, 64):
        raise NotImplementedError("its kernels take blocks of 64")
    module = importlib.import_module("fastvideo_kernel.block_sparse_attn")
    sets, lengths = _heads_first(inputs), blocks.k.length[0, 0].contiguous()
    if hasattr(module, "block_sparse_attn_from_indices"):
        lists = (blocks.index.contiguous(), blocks.count.contiguous())
        return lambda i: module.block_sparse_attn_from_indices(*sets[i % len(sets)], *lists, lengths)[0].transpose(1, 2)
    mask = blocks.to_mask()
    return lambda i: module.block_sparse_attn(*sets[i % len(sets)], mask, lengths)[0].transpose(1, 2)


def fastvideo_engine() -> str:
    """Which code of fastvideo-kernel is live: its extension may fail to load and leave Triton in its place."""
    extension, words = attempt(lambda: importlib.import_module("fastvideo_kernel._C.fastvideo_kernel_ops"))
    if words:
        return f"Triton (extension not loaded: {words})"
    return "CUDA extension" if hasattr(extension, "block_sparse_fwd") else "Triton (extension without the kernel)"


def flash4(group: Group, inputs: Inputs, blocks: BlockMap) -> Callable[[int], Tensor]:
    if group.block != (128, 128):
        raise NotImplementedError("its block sparsity takes blocks of 128 here")
    attend = importlib.import_module("flash_attn.cute.interface").flash_attn_func
    lists = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(blocks.count), mask_block_idx=torch.zeros_like(_padded(blocks)),
        full_block_cnt=blocks.count, full_block_idx=_padded(blocks),
    )  # fmt: skip

    def call(i: int) -> Tensor:
        out = attend(*inputs.sets[i % len(inputs.sets)], block_sparse_tensors=lists)
        return out[0] if isinstance(out, tuple) else out

    return call


PUBLIC: dict[str, tuple[str, Maker]] = {
    "flex_attention": ("", flex),
    "fastvideo-kernel": ("fastvideo_kernel", fastvideo),
    "flash-attn-4": ("flash_attn.cute", flash4),
}


def _ready(group: Group, inputs: Inputs, blocks: BlockMap) -> tuple[list[Candidate], dict[str, dict[str, Any]]]:
    """Candidates that run and agree with ours; for every one a row, with the reason where it is left out."""
    ours = vsparse.block_sparse_attention(*inputs.sets[0], blocks)[0].float()
    candidates, rows = [], {}
    for name, (package, maker) in PUBLIC.items():
        row: dict[str, Any] = {"name": name, "status": "not measured", "words": ""}
        rows[name] = row
        if package:
            _, row["words"] = attempt(lambda package=package: importlib.import_module(package))
            if row["words"]:
                continue
        call, row["words"] = attempt(lambda maker=maker: maker(group, inputs, blocks))
        if row["words"]:
            continue
        out, row["words"] = attempt(lambda call=call: call(0).float())
        if row["words"]:
            continue
        row["distance"] = float((out - ours).norm() / ours.norm())
        if not row["distance"] < AGREE:
            row["words"] = f"computes something else: relative distance {row['distance']:.3g} from ours"
            continue
        if package == "fastvideo_kernel":
            row["engine"] = fastvideo_engine()
        candidates.append(Candidate(name, call))
    return candidates, rows


def run(session: Session, seconds: float) -> None:
    """Each shape: ours and every baseline on the same lists, interleaved."""
    reserve = session.left - seconds
    for group in TINY if session.dry else SHAPES:
        row: dict[str, Any] = {
            "slots": group.slots, "heads": group.heads, "head_dim": group.width, "block": list(group.block),
            "asked_density": group.densities[0], "words": "",
        }  # fmt: skip
        words = session.verdicts.refusal(group.width, group.block, session.dtype, "forward")
        if session.left - reserve < 12 and not session.dry:
            words = words or "no time left"
        if words:
            session.report.data["baselines"].append({**row, "status": "refused", "words": words, "rows": []})
            session.screen.say(f"baselines {group.name}: refused: {words}")
            continue
        with torch.no_grad():
            row["rows"] = _measured(session, group)
        session.report.data["baselines"].append({**row, "status": "measured"})
        session.free()
        for each in row["rows"]:
            figure = f"{each['ms']:.3f} ms, {each['tflops']:.3g} TFLOP/s" if each["status"] == "measured" else ""
            session.screen.say(f"baselines {group.name} {each['name']}: {each['status']} {figure} {each['words']}")


def _measured(session: Session, group: Group) -> list[dict[str, Any]]:
    inputs = make(group, session.device, session.dtype, 1)
    blocks = random_map(inputs.q, inputs.k, group.heads, group.densities[0], seed=11)
    candidates, rows = _ready(group, inputs, blocks)
    ours = Candidate("vsparse", lambda i: vsparse.block_sparse_attention(*inputs.sets[i % len(inputs.sets)], blocks)[0])
    timings = interleaved([ours, *candidates], session.device, session.turn)
    done = plan.flops(executed_pairs(blocks, 1, group.heads), group.width, "forward")
    found = []
    for name, row in {"vsparse": {"name": "vsparse", "words": ""}, **rows}.items():
        timing = timings.get(name)
        if timing is not None:
            rate = done / (timing.ms * 1e-3) / 1e12 if not timing.words else math.nan
            status = "failed" if timing.words else "measured"
            row = {**row, **timing.json(), "status": status, "tflops": rate, "words": timing.words}
        found.append(row)
    return found
