"""CPU implementations of the ops, in PyTorch."""
from vsparse import backend, reference
from vsparse.backend import Implementation
def _none(*a, **k): return ["skip_threshold has no CPU implementation"] if k.get("skip_threshold") is not None else []
def _fwd(q,k,v,blocks,*,scale,skip_threshold=None):
    o,l=reference.block_sparse_attention(q,k,v,blocks,scale=scale); return o.contiguous(), l
def _bwd(*a,**k): return tuple(x.contiguous() for x in reference.block_sparse_attention_backward(*a,**k))
def _search(*a,**k):
    o,l,m=reference.search_attention(*a,**k); return o.contiguous(),l,m
import torch
for n,f in dict(block_sparse_attention=_fwd,block_sparse_attention_backward=_bwd,block_mass=lambda *a,**k: reference.block_mass(*a,**k),search_attention=_search,block_pool=lambda *a: reference.block_pool(*a),block_pool_backward=lambda *a: reference.block_pool_backward(*a),merge_attention=lambda *a: reference.merge_attention(*a),merge_attention_backward=lambda *a: reference.merge_attention_backward(*a)).items():
    backend.register(n, Implementation("reference","cpu",f,_none),priority=0)
