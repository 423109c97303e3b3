"""Loads and stores of a tile of rows."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def read(p_tile, o_row, o_d, n_rows, INSIDE: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of pointers, zeros past ``n_rows`` and past D. INSIDE: no column is past D. WHOLE: every row is read."""
    if WHOLE:
        if INSIDE:
            b_tile = tl.load(p_tile)
        else:
            b_tile = tl.load(p_tile, mask=o_d[None, :] < D, other=0.0)
    elif INSIDE:
        b_tile = tl.load(p_tile, mask=o_row[:, None] < n_rows, other=0.0)
    else:
        b_tile = tl.load(p_tile, mask=(o_row[:, None] < n_rows) & (o_d[None, :] < D), other=0.0)
    return b_tile


@triton.jit
def load_tile(
    p_first,
    n_rows,
    s_row,
    s_d,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Rows of a strided matrix: ``[ROWS, COLUMNS]`` from column FIRST on, zeros past ``n_rows`` and past D.

    WHOLE promises that every row may be read, whatever ``n_rows`` is.
    """
    o_row = tl.arange(0, ROWS)
    o_d = FIRST + tl.arange(0, COLUMNS)
    p_tile = p_first + o_row[:, None] * s_row + o_d[None, :] * s_d
    return read(p_tile, o_row, o_d, n_rows, FIRST + COLUMNS <= D, D, WHOLE)


@triton.jit
def load_rows(
    p_matrix,
    i_first,
    n_rows,
    s_row,
    s_d,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`load_tile` of the rows from ``i_first`` on, for loops whose tiles lie anywhere.

    Rows are added before they are multiplied: a thread then keeps its row number across steps. Of a pointer that moves
    as a whole, it would keep an offset of 64 bits for every row that it copies.
    """
    o_row = tl.arange(0, ROWS)
    o_d = FIRST + tl.arange(0, COLUMNS)
    p_tile = p_matrix + ((i_first + o_row).to(tl.int64) * s_row)[:, None] + (o_d * s_d)[None, :]
    return read(p_tile, o_row, o_d, n_rows, FIRST + COLUMNS <= D, D, WHOLE)


@triton.jit
def copy_rows(
    d_matrix,
    p_matrix,
    i_b,
    i_h,
    i_first,
    n_rows,
    s_row,
    s_d,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
    TMA: tl.constexpr,
):
    """`load_rows` of one sample and head; with TMA through the descriptor ``d_matrix``, which `described` made.

    A descriptor reads every row of the tile, whatever ``n_rows`` is: TMA promises what WHOLE does. Columns past D and
    rows past the tensor become zeros. The two leading dimensions have one element, so that the reshape costs nothing.
    """
    if TMA:
        b_tile = tl.reshape(d_matrix.load([i_b, i_h, i_first, FIRST]), [ROWS, COLUMNS])
    else:
        b_tile = load_rows(p_matrix, i_first, n_rows, s_row, s_d, ROWS, FIRST, COLUMNS, D, WHOLE)
    return b_tile


@triton.jit
def power(b_x, NATURAL: tl.constexpr):
    """e or 2 to the power of x. Base 2 saves a product per element; base e keeps the last bits of float32 logits."""
    if NATURAL:
        b_y = tl.exp(b_x)
    else:
        b_y = tl.math.exp2(b_x)
    return b_y


@triton.jit
def from_natural(b_x, NATURAL: tl.constexpr):
    """A natural logarithm in the base that `power` takes."""
    if not NATURAL:
        b_x = b_x * LOG2E
    return b_x


@triton.jit
def to_natural(b_x, NATURAL: tl.constexpr):
    """Inverse of `from_natural`."""
    if not NATURAL:
        b_x = b_x * LN2
    return b_x


@triton.jit
def store_tile(
    p_first,
    b_tile,
    n_rows,
    s_row,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
):
    """Write the first ``n_rows`` rows, rounded to the dtype of the target, whose columns are adjacent."""
    o_row = tl.arange(0, ROWS)
    o_d = FIRST + tl.arange(0, COLUMNS)
    p_tile = p_first + o_row[:, None] * s_row + o_d[None, :]
    b_tile = b_tile.to(p_first.dtype.element_ty)
    if FIRST + COLUMNS <= D:
        tl.store(p_tile, b_tile, mask=o_row[:, None] < n_rows)
    else:
        tl.store(p_tile, b_tile, mask=(o_row[:, None] < n_rows) & (o_d[None, :] < D))


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


@triton.jit
def absorb(b_s, b_m, b_l, scale, bias, NATURAL: tl.constexpr):
    """One step of online softmax (FlashAttention-2, arXiv 2307.08691, algorithm 1) over a tile of logits.

    Args: ``b_s [ROWS, COLUMNS]`` products, -inf outside; ``b_m``, ``b_l`` ``[ROWS]`` maximum and sum so far.
    Returns the probabilities against the new maximum, the factor for what was summed before, the new maximum and sum,
    and how far the maximum of this tile stays below it.
    """
    b_top = tl.max(b_s, 1) * scale + bias
    b_new = tl.maximum(b_m, b_top)
    b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_p = power(b_s * scale - (b_shift - bias)[:, None], NATURAL)
    b_alpha = power(b_m - b_shift, NATURAL)
    return b_p, b_alpha, b_new, b_l * b_alpha + tl.sum(b_p, 1), b_top - b_shift
