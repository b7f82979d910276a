"""FLOPs and bytes of a piece of work that is run on tensors without contents (torch's meta
device)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

FLOPS = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
}  # torch leaves the second out


class _Account(TorchDispatchMode):
    """Counts, on the meta device: FLOPs, and the bytes of all storages that came to be and are
    alive, now and at the most.

    Torch finds the form of most results in Python, which takes most of the time, and a network asks
    the same again and again: what an operation came to is kept, unless its result is a view.
    """

    _known: ClassVar[
        dict[Any, tuple[int, list[Any], Any]]
    ] = {}  # FLOPs, forms of results, their structure

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0  # a loss that is logged
        if func is torch.ops.aten._to_copy.default and args[0].is_meta:
            kwargs = kwargs | {"device": torch.device("meta")}  # a result that would leave the GPU
        kind = _kind(func)
        asked = None if kind == "view" else (func, _form(args), _form(tuple(kwargs.items())))
        if asked in self._known:
            flops, forms, structure = self._known[asked]
            self.flops += flops
            if kind == "in place":
                return args[0]
            made = [
                form and torch.empty_strided(form[0], form[1], dtype=form[2], device="meta")
                for form in forms
            ]
            for tensor in made:
                if tensor is not None:
                    self._came(tensor.untyped_storage())
            return tree_unflatten(made, structure)
        out, flops = func(*args, **kwargs), 0
        if func._overloadpacket in FLOPS:
            flops = FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
        self.flops += flops
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor) and t.is_meta
        }
        results, structure = tree_flatten(out)
        for tensor in results:
            if (
                isinstance(tensor, Tensor)
                and tensor.is_meta
                and tensor.untyped_storage()._cdata not in given
            ):
                self._came(tensor.untyped_storage())  # else a view of what was there before
        if asked is not None and all(
            t is None or (isinstance(t, Tensor) and t.is_meta) for t in results
        ):
            self._known[asked] = (
                flops,
                [None if t is None else _form(t) for t in results],
                structure,
            )
        return out

    def _came(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


@cache
def _kind(func: Any) -> str:
    """Whether an operation's result is "new", its first argument changed "in place", or maybe a
    "view" of what is given."""
    schema = func._schema
    if not schema.is_mutable and all(
        value.alias_info is None for value in (*schema.arguments, *schema.returns)
    ):
        return "new"
    return "in place" if schema.name in ("aten::add_", "aten::addmm_", "aten::mul_") else "view"


def _form(value: Any) -> Any:
    """All of an argument that the form of results can depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    return type(value), value  # 1, 1.0 and True are one key otherwise


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Attention as GPUs have it, which never holds its matrix of weights; on meta torch takes the
    plain form, which does."""
    plain = F.scaled_dot_product_attention

    def flash(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Any = None,
        *args: Any,
        scale: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if attn_mask is not None or not q.is_meta:
            return plain(q, k, v, attn_mask, *args, scale=scale, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]

    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def count(work: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of ``work`` on the meta device, and bytes at its peak beyond what was there before
    it."""
    with _flash_attention(), _Account() as account:
        work()
    return account.flops, account.peak
