"""Processors whose stock code runs unchanged but for its one attention call.

Stock processors project, norm and rotate; only the function they call for attention is exchanged, and in training norms
run again in the backward instead of keeping what they leave. A new class per stock class holds the stock code object,
bound to a copy of its module's namespace in which that function is ours. The copy is a real module in ``sys.modules``,
because Dynamo looks globals up by module name.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vsparse.blocks import BlockMap
from vsparse.methods import SparseAttention
from vsparse.methods.base import recomputed

from .hosts import Host

__all__ = ["forget", "install", "intact", "reasons", "uninstall"]

_CHILD, _STOCK = "vsparse", "_vsparse_stock"


class _Slot:
    site: SparseAttention | None = None


class _ThreadSlot(threading.local, _Slot):
    pass


_TRACED, _EAGER = _Slot(), _ThreadSlot()


def _slot() -> _Slot:
    """Where the running site is noted: per thread; under Dynamo, which cannot trace thread locals, in one object that
    is written and read within a single trace."""
    return _TRACED if torch.compiler.is_compiling() else _EAGER


def _enter(attn: nn.Module, hidden_states: Tensor) -> None:
    site: Any = attn._modules.get(_CHILD)
    _slot().site = site
    if site is not None:
        site.hidden = hidden_states


def _leave(attn: nn.Module) -> None:
    _slot().site = None
    site: Any = attn._modules.get(_CHILD)
    if site is not None:
        site.hidden = None
        site.ran = True


_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class _Lean:
    """An attention module as a stock processor sees it in training: its norms keep their input and run again.

    Under autocast the norm of queries or keys leaves float32 tensors of their size behind, more than a method does.
    """

    def __init__(self, attn: nn.Module) -> None:
        self._attn = attn

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._attn, name)
        return functools.partial(recomputed, found) if name in _NORMS and found is not None else found


def _run(self: Any, attn: nn.Module, hidden_states: Tensor, *rest: Any) -> Any:
    _enter(attn, hidden_states)
    lean = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    out = self._stock_call(_Lean(attn) if lean else attn, hidden_states, *rest)
    _leave(attn)
    return out


# Messages must leave in the same order everywhere, and their sizes are read on the host: no graph holds them.
_run_divided = torch.compiler.disable(
    _run, reason="context parallel: processes exchange tensors in here; compile with fullgraph=False"
)


def _runner(attn: nn.Module) -> Callable[..., Any]:
    site: Any = attn._modules.get(_CHILD)
    return _run if site is None or site.call is None or site.call.share.alone else _run_divided


# Attention.forward passes only the arguments that `__call__` names, so the names must be stock's.
def _call_rotary_emb(
    self: Any,
    attn: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: Any = None,
) -> Any:
    return _runner(attn)(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def _call_image_rotary_emb(
    self: Any,
    attn: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Any:
    return _runner(attn)(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


_CALLS = {tuple(inspect.signature(f).parameters): f for f in (_call_rotary_emb, _call_image_rotary_emb)}


class _TextMask:
    """Stands for the mask that a stock processor would build over all pairs of tokens.

    HunyuanVideo 1.5 pads its text mask and spreads it to ``[B, 1, N, N]`` in every layer, 2.5 GiB each at 480p. The
    text lengths of the call say the same; so the steps of that spreading return this object, and nothing is built.
    """

    def bool(self) -> _TextMask:
        return self

    def view(self, *shape: int) -> _TextMask:
        return self

    def repeat(self, *times: int) -> _TextMask:
        return self

    def transpose(self, *axes: int) -> _TextMask:
        return self

    def __and__(self, other: object) -> _TextMask:
        return self


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | _TextMask | None,
    dense: Callable[..., Tensor],
    odd: list[str],
) -> Tensor:
    """Attention of the running site; q, k, v and the result are ``[B, N, H, D]``."""
    site = _slot().site
    if site is None or site.call is None:
        return dense(query, key, value, mask)
    call, share = site.call, site.call.share
    tokens = share.tokens(call.grid)
    if odd:
        raise NotImplementedError(
            f"{site.site.name}: the host asks for {', '.join(odd)}, which vsparse does not honour"
        )
    if query.shape[1] != tokens or key.shape[1] != tokens:
        raise ValueError(
            f"{site.site.name}: attention over {query.shape[1]} x {key.shape[1]} tokens, but this process has {tokens} "
            f"of {call.grid}"
        )
    if isinstance(mask, Tensor):
        known = call.text_length is not None and mask.dtype == torch.bool and mask.shape[1:] == (1, 1, tokens)
        if not known:
            raise ValueError(
                f"{site.site.name}: an attention mask of unknown form, {mask.dtype} {tuple(mask.shape)}; known is only "
                "the bool [B, 1, 1, N] mask that hides padded text"
            )
    if site.phase == "dense":
        if share.alone and (mask is None or call.trim is None):
            return dense(query, key, value, mask)
        query, key, value = share.exchange(query, key, value)
        if share.shard is not None:
            everything = BlockMap.full(call.rows, call.blocking)
            packed = [call.rows.pack(x) for x in (query, key, value)]
            return share.restore(call.attend(query, key, value, everything, packed=packed))[0]
        size, valid = call.keys(query.shape[0])
        return share.restore(dense(query, key[:, :size], value[:, :size], valid))[0]
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return site(query, key, value)  # type: ignore[no-any-return]


def _dispatch(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Our stand-in for diffusers' ``dispatch_attention_fn``; same parameters, none dropped."""

    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            options = {} if attention_kwargs is None else {"attention_kwargs": attention_kwargs}
            return stock(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                backend=backend,
                parallel_config=parallel_config if stock_only else None,  # ours are exchanged already
                **options,
            )

        site = _slot().site
        stock_only = site is None or site.call is None
        odd = _odd(dropout_p, is_causal, scale, enable_gqa)
        if parallel_config is not None and site is not None and site.call is not None and site.call.share.alone:
            odd = [*odd, "context parallelism that is not on the whole model"]
        if attention_kwargs:
            odd = [*odd, f"attention_kwargs={attention_kwargs!r}"]
        return _attend(query, key, value, attn_mask, dense, odd)

    return dispatch_attention_fn


def _odd(dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> list[str]:
    asked = (("dropout", dropout_p > 0.0), ("causal attention", is_causal), ("a scale of its own", scale is not None))
    return [name for name, wanted in (*asked, ("grouped queries", enable_gqa)) if wanted]


class _Functional:
    """``torch.nn.functional`` as a stock processor sees it."""

    def __init__(self, stock: types.ModuleType) -> None:
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


class _TextMaskFunctional(_Functional):
    """With a ``pad`` that does not pad the text mask of a patched site."""

    def pad(self, mask: Tensor, pad: tuple[int, int], *, value: bool) -> Tensor | _TextMask:
        site = _slot().site
        if site is None or site.call is None:
            return self._stock.pad(mask, pad, value=value)  # type: ignore[no-any-return]
        return _TextMask()


class _AttentionFunctional(_Functional):
    """With our stand-in for ``scaled_dot_product_attention`` (layout ``[B, H, N, D]``)."""

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            out = self._stock.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, **options
            )
            return out.transpose(1, 2)  # type: ignore[no-any-return]

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return _attend(q, k, v, attn_mask, dense, _odd(dropout_p, is_causal, scale, enable_gqa)).transpose(1, 2)


def _hook_point(stock: type) -> str | None:
    names = stock.__call__.__code__.co_names if hasattr(stock.__call__, "__code__") else ()
    for name in ("dispatch_attention_fn", "scaled_dot_product_attention"):
        if name in names:
            return name
    return None


@functools.cache
def _rebound(stock: type) -> type:
    """The class that runs a stock processor's code with our attention call; one per stock class and process."""
    call: Any = stock.__call__
    name = f"vsparse_rebound.{stock.__module__}.{stock.__qualname__}"
    module = types.ModuleType(name)
    module.__dict__.update(call.__globals__)
    module.__dict__["__name__"] = name
    if _hook_point(stock) == "dispatch_attention_fn":
        module.__dict__["dispatch_attention_fn"] = _dispatch(call.__globals__["dispatch_attention_fn"])
        if "pad" in call.__code__.co_names:
            module.__dict__["F"] = _TextMaskFunctional(call.__globals__["F"])
    else:
        module.__dict__["F"] = _AttentionFunctional(call.__globals__["F"])
    sys.modules[name] = module
    inner = types.FunctionType(call.__code__, module.__dict__, call.__name__, call.__defaults__, call.__closure__)
    inner.__kwdefaults__ = call.__kwdefaults__
    body = {
        "__call__": _CALLS[tuple(inspect.signature(call).parameters)],
        "__module__": name,
        "__doc__": f"{stock.__name__} with its attention call routed through vsparse.",
        "_stock_call": inner,
    }
    made = type(stock.__name__, (stock,), body)
    module.__dict__[stock.__name__] = made
    _register(stock, made)
    return made


def _register(stock: type, made: type) -> None:
    """Tell diffusers' guiders what our class returns, if they know the stock one."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(stock)
    except ValueError:
        return
    AttentionProcessorRegistry.register(made, metadata)


def reasons(attention: nn.Module, host: Host) -> list[str]:
    """Why an attention module cannot be entered; empty when it can."""
    processor = getattr(attention, "processor", None)
    kind = type(processor)
    if kind.__name__ not in host.processors or isinstance(processor, nn.Module):
        return [f"processor {kind.__module__}.{kind.__name__} is not known; known: {', '.join(host.processors)}"]
    found = []
    if _hook_point(kind) is None or tuple(inspect.signature(kind.__call__).parameters) not in _CALLS:
        found.append(f"{kind.__name__}.__call__ has another form in this version of diffusers than vsparse knows")
    if _CHILD in attention._modules:
        found.append(f"the module already has a child named {_CHILD!r}")
    return found


def install(attention: nn.Module, sparse: SparseAttention) -> Callable[[], None]:
    """Attach ``sparse`` and route the module's attention through it; returns the undo."""
    stock: Any = attention.processor
    kind: Any = type(stock)
    processor: Any = object.__new__(_rebound(kind))
    processor.__dict__.update(stock.__dict__)
    processor.__dict__[_STOCK] = stock
    attention.add_module(_CHILD, sparse)
    attention.processor = processor
    return functools.partial(uninstall, attention)


def uninstall(attention: nn.Module) -> None:
    """Put the stock processor back, unless somebody has replaced ours, and drop the child."""
    stock = attention.processor.__dict__.get(_STOCK)
    if stock is not None:
        for name in ("_attention_backend", "_parallel_config"):
            chosen = attention.processor.__dict__.get(name)
            if chosen is not stock.__dict__.get(name):
                setattr(stock, name, chosen)
        attention.processor = stock
    attention._modules.pop(_CHILD, None)


def forget(root: nn.Module) -> None:
    """Take our processors out of what ``fuse_qkv_projections`` put aside, so that unfusing brings stock ones back."""
    aside: dict[str, Any] = getattr(root, "original_attn_processors", None) or {}
    for name, processor in aside.items():
        aside[name] = processor.__dict__.get(_STOCK, processor)


def intact(attention: nn.Module, sparse: SparseAttention) -> str | None:
    """Why a module no longer runs our code, or None."""
    if _STOCK not in attention.processor.__dict__:
        return (
            f"{sparse.site.name}: its processor was replaced by {type(attention.processor).__name__} after apply "
            "(fuse_qkv_projections and set_attn_processor do that); remove the patch, then apply it again"
        )
    return None
