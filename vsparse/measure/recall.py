"""How much of full attention a map catches: exact softmax mass on the kept keys, beside the pairs it computes."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vsparse.blocks import BlockMap
from vsparse.layouts import Blocking
from vsparse.methods import Call, Method, Site, SparseAttention
from vsparse.methods.budgets import as_tensor, highest
from vsparse.methods.samples import Sample

__all__ = ["Kept", "driven", "heard", "kept_by", "key_mass", "random_like"]

# Query rows whose softmax is held at a time.
_CHUNK = 256


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What one call computed, of one sample.

    Args:
        row: ``[H, N]`` int64, the row of ``keep`` that holds for each token as a query.
        block: ``[H, N]`` int64, the block of each token as a key.
        keep: ``[H, R, K]`` bool.
        text: ``[N]`` bool, tokens of text.
    """

    row: Tensor
    block: Tensor
    keep: Tensor
    text: Tensor

    @property
    def sizes(self) -> Tensor:
        """``[H, K]`` float64: tokens of each key block."""
        heads, _, blocks = self.keep.shape
        ones = torch.ones_like(self.block, dtype=torch.float64)
        return ones.new_zeros(heads, blocks).scatter_add(1, self.block, ones)

    @property
    def text_blocks(self) -> Tensor:
        """``[H, K]`` bool: key blocks of text; no block holds both."""
        marked = self.text.expand_as(self.block).to(torch.int8)
        return marked.new_zeros(self.sizes.shape).scatter_reduce(1, self.block, marked, "amax").bool()

    def density(self) -> Tensor:
        """``[H]`` float64: computed share of the token pairs, text included."""
        pairs = (self.keep.double() * self.sizes[:, None]).sum(-1)
        return pairs.gather(1, self.row).sum(-1) / self.row.shape[1] ** 2

    def recall(self, mass: Tensor) -> Tensor:
        """``[H]`` float64: share of the softmax of the video queries that falls on kept keys.

        Args:
            mass: ``[H, N, K]`` of `key_mass` for these blocks.
        """
        by_token = self.keep.gather(1, self.row[..., None].expand(-1, -1, self.keep.shape[-1]))
        caught = torch.where(by_token, mass, 0).sum(-1)
        return caught[:, ~self.text].mean(-1)


def driven(method: Method, sample: Sample, *, layer: int = 0) -> tuple[SparseAttention, Call]:
    """A site of a method without a model, and the call that a model would give it for a sample."""
    heads, width = sample.q.shape[2:]
    site = Site.alone(heads=heads, head_dim=width, layer=layer)
    device = sample.q.device
    layout = method.layout(sample.grid, site).to(device)
    blocking, static = layout.bind(sample.text_length), method.static_map(layout, site)
    with device:
        module = method.build(site)
    module.peak_density = highest(method.call_density())
    call = Call(
        layout=layout,
        blocking=blocking,
        static=None if static is None else dc.replace(static, q=blocking, k=blocking),
        text_length=sample.text_length,
        step=torch.tensor(0, device=device),
        density=as_tensor(method.call_density(), device),
    )
    module.call = call
    module.state.bind(module.state.version("default"))
    return module, call


def kept_by(method: Method, sample: Sample, *, layer: int = 0) -> Kept:
    """What a method computes of the first item of a sample; a method that searches does so on the same sample.

    Args:
        method: What selects. sample: q, k, v of one call, its text in full. layer: for methods that differ by layer.

    Raises:
        ValueError: the sample has padded text, or the method makes no sparse call.
    """
    if sample.text_length is not None:
        raise ValueError("kept_by: the sample must hold no padded text, got a text_length")
    return _joined(heard(method, sample, layer=layer)[0], sample)


@torch.no_grad()
def heard(method: Method, sample: Sample, *, layer: int = 0) -> tuple[list[BlockMap], Tensor]:
    """What a method's sparse call executes of a sample, without a model; one that searches does so on the same sample.

    Args:
        method, layer: As of `kept_by`. sample: q, k, v of one call, padded text or not.

    Returns:
        Its maps, disjoint if they are several, and the output of its fine attention ``[B, N, H, D]``.

    Raises:
        ValueError: the method makes no sparse call.
    """
    module, call = driven(method, sample, layer=layer)
    with _listening(module) as maps:
        module.phase = "search"
        out, _ = module.core(sample.q, sample.k, sample.v, None, call)
        if "search" in method.exact_phases:
            maps.clear()
            module.state.staged.pop("pairs", None)
            module.state.commit("default", None)
            module.state.bind(module.state.version("default"))
            module.phase = "reuse"
            out, _ = module.core(sample.q, sample.k, sample.v, None, call)
    if not maps:
        raise ValueError(f"{method.key!r} made no sparse call")
    return maps, out


@contextlib.contextmanager
def _listening(module: SparseAttention) -> Iterator[list[BlockMap]]:
    found: list[BlockMap] = []
    stock = module.tally

    def tally(blocks: BlockMap, batch: int, *more: BlockMap) -> None:
        found.extend((blocks, *more))
        stock(blocks, batch, *more)

    module.tally = tally  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del module.tally


def _joined(maps: Sequence[BlockMap], sample: Sample) -> Kept:
    """One map as it is, several as the union that each token attends to; all have the same key blocks."""
    heads, tokens = sample.q.shape[2], sample.grid.tokens
    first = sample.grid.text_before
    text = torch.ones(tokens, dtype=torch.bool)
    text[first : first + sample.grid.video] = False
    rows = [_token_blocks(one.q, heads) for one in maps]
    keeps = [one.to_mask()[0].expand(heads, -1, -1) for one in maps]
    block = _token_blocks(maps[0].k, heads)
    if len(maps) == 1:
        return Kept(row=rows[0], block=block, keep=keeps[0], text=text)
    keep = torch.zeros(heads, tokens, maps[0].k.blocks, dtype=torch.bool)
    for row, part in zip(rows, keeps, strict=True):
        keep |= part.gather(1, row[..., None].expand(-1, -1, part.shape[-1]))
    return Kept(row=torch.arange(tokens).expand(heads, -1), block=block, keep=keep, text=text)


def _token_blocks(side: Blocking, heads: int) -> Tensor:
    """``[H, N]`` int64: the block of each token in the first sample of a blocking."""
    assert side.layout is not None
    slot = (side.order[1] if side.arranged and side.order is not None else side.layout.token_slot)[0]
    if side.start is None:
        return (slot // side.block).expand(heads, -1)
    start, slot = (x.expand(heads, -1).contiguous() for x in (side.start[0].long(), slot))
    return torch.searchsorted(start, slot, right=True) - 1


def key_mass(sample: Sample, block: Tensor, blocks: int) -> Tensor:
    """How much of each query's softmax falls on each key block, from q and k alone in float64.

    Args:
        sample: Its first item counts. block: ``[H, N]`` int64, the block of each token as a key. blocks: K.

    Returns:
        ``[H, N, K]`` float64; rows sum to 1.
    """
    q, k = (x[0].double().transpose(0, 1) for x in (sample.q, sample.k))
    found = q.new_zeros(*q.shape[:2], blocks)
    for low in range(0, q.shape[1], _CHUNK):
        share = (q[:, low : low + _CHUNK] @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        found[:, low : low + _CHUNK].scatter_add_(2, block[:, None].expand(share.shape), share)
    return found


def random_like(kept: Kept, seed: int) -> Kept:
    """Random blocks of the same layout: every row draws video key blocks until it has as many tokens as it had.

    The last block that is drawn may carry a row over, so that the density is never less. Text stays as it is.
    """
    draw = torch.Generator().manual_seed(seed)
    sizes, text = kept.sizes[:, None], kept.text_blocks[:, None]
    video = torch.where(text, 0, sizes)
    wanted = (kept.keep * video).sum(-1, keepdim=True)
    order = torch.rand(kept.keep.shape, generator=draw).argsort(-1)
    drawn = video.expand(kept.keep.shape).gather(-1, order)
    before = drawn.cumsum(-1) - drawn
    chosen = torch.zeros_like(kept.keep).scatter(-1, order, before < wanted)
    return dc.replace(kept, keep=torch.where(text, kept.keep, chosen))
