"""Tiles whose rows lie anywhere."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_tile(p_first, o_row, m_row, s_d, FIRST: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr):
    """Rows at offsets ``o_row``: ``[len(o_row), COLUMNS]`` from column FIRST on, zeros past D and in masked rows."""
    o_d = FIRST + tl.arange(0, COLUMNS)
    p_tile = p_first + o_row[:, None] + o_d[None, :] * s_d
    return tl.load(p_tile, mask=m_row[:, None] & (o_d[None, :] < D), other=0.0)


@triton.jit
def scatter_tile(p_first, o_row, b_tile, m_row, FIRST: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr):
    """Write a tile to rows at offsets ``o_row``, rounded to the dtype of the target, whose columns are adjacent."""
    o_d = FIRST + tl.arange(0, COLUMNS)
    p_tile = p_first + o_row[:, None] + o_d[None, :]
    tl.store(p_tile, b_tile.to(p_first.dtype.element_ty), mask=m_row[:, None] & (o_d[None, :] < D))
