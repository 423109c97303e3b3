"""The ops: schemas, shapes under FakeTensor, autograd, and the public wrappers that check and call them."""

from vsparse.ops.attention import block_sparse_attention, unsupported
from vsparse.ops.cluster import cluster_tokens
from vsparse.ops.host_order import host_order_attention
from vsparse.ops.linear import block_linear_attention
from vsparse.ops.merge import merge_attention
from vsparse.ops.pool import block_pool
from vsparse.ops.search import block_mass, search_attention

__all__ = [
    "block_linear_attention",
    "block_mass",
    "block_pool",
    "block_sparse_attention",
    "cluster_tokens",
    "host_order_attention",
    "merge_attention",
    "search_attention",
    "unsupported",
]
