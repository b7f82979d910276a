"""FLOPs and bytes of work on tensors without contents: torch's meta device.

Torch's own tools, as of 2.13, do not serve: MemTracker refuses frozen parameters, modules do not
move under FakeTensorMode, FlopCounterMode alone takes five times as long and leaves addmm_ out.
"""

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
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten


def count(work: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of work on the meta device, and bytes at its peak beyond what was there before."""
    with _flash_attention(), _Account() as account:
        work()
    return account.flops, account.peak


class _Account(TorchDispatchMode):
    """Counts FLOPs, and the bytes of all storages that came to be and are alive.

    Torch finds the form of most new tensors in Python, which takes most of the time. A network asks
    the same again and again, so forms and FLOPs are kept.
    """

    _known: ClassVar[dict[Any, tuple[int, Any]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return 1.0  # A loss that is logged.
        if func is _ATEN.addmm_.default and args[0].is_meta:
            self.flops += 2 * args[1].numel() * args[2].shape[1]
            return args[0]
        if _shares(func):
            return func(*args, **kwargs)
        asked = func, _form(args), _form(tuple(kwargs.items()))
        if asked in self._known:
            flops, form = self._known[asked]
            out = _of_form(form)
        else:
            out, flops = func(*args, **kwargs), 0
            if func._overloadpacket in flop_registry:
                flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            if all(t.is_meta for t in _tensors(out)):
                self._known[asked] = flops, _form(out)
        self.flops += flops
        for storage in [t.untyped_storage() for t in _tensors(out) if t.is_meta]:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.now -= size


@cache
def _shares(func: Any) -> bool:
    """Whether results share memory with what is given: views, and what is done in place."""
    values = (*func._schema.arguments, *func._schema.returns)
    return func is _ATEN._unsafe_view.default or any(value.alias_info for value in values)


def _tensors(out: Any) -> list[Tensor]:
    return [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]


def _form(value: Any) -> Any:
    """All of a value that the form of results can depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(_form, value))
    return type(value), value  # 1, 1.0 and True are one key otherwise.


def _of_form(form: Any) -> Any:
    """A new tensor, or several, of a form."""
    if isinstance(form[0], torch.Size):
        return torch.empty_strided(form[0], form[1], dtype=form[2], device="meta")
    return form[1] if isinstance(form[0], type) else tuple(map(_of_form, form))


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Attention as GPUs have it. The form it takes on meta holds its matrix of weights."""
    plain = F.scaled_dot_product_attention

    def flash(
        query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: Any = None, **__: Any
    ) -> Tensor:
        return _ATEN._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]

    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
