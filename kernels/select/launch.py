"""Host side of the selection kernel."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vsparse.kernels.tiles import on_its_device

from .forward import select

__all__ = ["select_blocks", "unsupported"]

MOST_COLUMNS = 16384  # scores of a row are held in registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(
    scores: Tensor,
    length: Tensor,
    forced: Tensor | None,
    limit: Tensor,
    *,
    rule: str,
    budget: str,
    least: int,
    capacity: int,
) -> list[str]:
    """Why the kernel cannot run this; empty when it can."""
    found = []
    if scores.dtype not in DTYPES:
        found.append(f"scores of {scores.dtype} are not among {', '.join(map(str, DTYPES))}")
    if scores.shape[-1] > MOST_COLUMNS:
        found.append(f"a row of {scores.shape[-1]} key blocks is longer than {MOST_COLUMNS}")
    return found


@on_its_device
def select_blocks(
    scores: Tensor,
    length: Tensor,
    forced: Tensor | None,
    limit: Tensor,
    *,
    rule: str,
    budget: str,
    least: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """Implements `vsparse.reference.select_blocks`, one launch, without a sort."""
    forced_shape = () if forced is None else forced.shape[:3]
    lead = torch.broadcast_shapes(scores.shape[:3], (*length.shape[:2], 1), limit.shape, forced_shape)
    batch, heads, rows = lead
    columns = scores.shape[-1]
    wide = max(16, int(triton.next_power_of_2(columns)))
    # Entries past the count stay valid block ids, as from every other maker of lists.
    index = torch.zeros(*lead, capacity, dtype=torch.int32, device=scores.device)
    count = torch.empty(lead, dtype=torch.int32, device=scores.device)
    forced_map = length if forced is None else forced.view(torch.uint8)
    by_forced = (0, 0, 0, 0) if forced is None else forced.expand(*lead, columns).stride()
    length = length.contiguous()
    by_length = length.expand(batch, heads, columns).stride()
    select[(rows, heads, batch)](
        scores, length, forced_map, limit, index, count,
        *scores.expand(*lead, columns).stride(), *by_length[:2], *by_forced, *limit.expand(lead).stride(),
        columns, capacity, least,
        COLUMNS=wide, RULE=rule, BUDGET=budget, LEAST=least > 0, FORCED=forced is not None,
        num_warps=4 if wide <= 4096 else 8,
    )  # fmt: skip
    return index, count
