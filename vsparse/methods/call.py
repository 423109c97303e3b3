"""Call: what one forward of a root knows, handed to every site."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.geometry import Grid
from vsparse.layouts import Blocking, Layout
from vsparse.parallel.share import ALL, Share

__all__ = ["Call", "check_hidden"]


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """What one forward of a root knows; a new object per forward, restored for its backward.

    Args:
        layout: Order and blocking of this site. blocking: the layout bound to the text lengths.
        text_length: ``[B]`` int, or None when the host has no padded text.
        step: 0-d int64, denoising step, -1 when unknown. density: 0-d float64, the budget of this call.
        trim: A tensor whose size is the number of tokens up to the longest valid text, or None when there is no text
            to trim: a size, not a Python int, so that prompts of different length share one graph.
        static: The method's static map, bound to the text lengths; None when it has none.
        share: What this process has of the video, of which `core` sees the heads and `combine` the tokens.
        features: What `SparseAttention.features` has made of the attention input, of all tokens and own heads.
    """

    layout: Layout
    blocking: Blocking
    text_length: Tensor | None
    step: Tensor
    density: Tensor
    trim: Tensor | None = None
    static: BlockMap | None = None
    share: Share = ALL
    features: tuple[Tensor, ...] = ()

    @property
    def grid(self) -> Grid:
        """The lattice. One home for it: two references that are sometimes the same object cost a recompilation."""
        return self.layout.grid

    def keys(self, batch: int) -> tuple[int, Tensor | None]:
        """What full attention needs as keys, padded text left out.

        Args:
            batch: B; a single sample needs no mask, which is faster.

        Returns:
            How many tokens, n, from the first; and which of them are valid, ``[B, 1, 1, n]`` bool, None: all.
        """
        if self.trim is None or self.text_length is None:
            return self.grid.tokens, None
        size = self.trim.shape[0]
        if batch == 1:
            return size, None
        last = self.grid.video + self.text_length
        return size, (torch.arange(size, device=last.device) < last[:, None])[:, None, None]


def check_hidden(key: str, hidden: Tensor, call: Call) -> None:
    """Refuse an attention input that is not that of the video tokens which this process holds."""
    expected = call.grid.video if call.share.cut is None else call.share.cut.video
    if hidden.shape[1] != expected:
        raise ValueError(
            f"{key}: the attention input has {hidden.shape[1]} tokens, {call.grid} has {expected} of video"
        )
