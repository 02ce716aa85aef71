"""A device that there is not: tensors whose numbers lie in the processor's memory say that they lie elsewhere.

While a `PretendDevice` is entered, what is put on or made on `PRETEND` is such a tensor, and an operator that reads both kinds
raises, as it does on a GPU. Unlike the tensors of torch's `FakeTensorMode` these have numbers, so whole stages run on them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

PRETEND = torch.device("lazy", 0)  # a kind that torch has a name for and no code
aten = torch.ops.aten
BETWEEN = {aten._to_copy.default, aten.copy_.default}  # that bring tensors from one device to another
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # by indices in the processor's memory, too
FILLED = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}


class Pretended(Tensor):
    """A tensor on `PRETEND`; `inner` holds its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        found: Pretended = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=PRETEND,
        )
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __deepcopy__(self, memo: Any) -> Pretended:
        return memo.setdefault(id(self), Pretended(self.inner.clone()).requires_grad_(self.requires_grad))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.inner})"


class PretendDevice(TorchDispatchMode):
    """While this is entered, `PRETEND` is a device."""

    def __enter__(self) -> Any:
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=)` comes by here
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives, on the device that its tensors lie on or that it is asked for."""
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    asked = kwargs.get("device")
    elsewhere = any(isinstance(one, Pretended) for one in tensors)
    if elsewhere and not _fits(function, args, tensors):
        found = ", ".join(f"{one.device} {tuple(one.shape)}" for one in tensors)
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, found {found}")
    found = function(*_unwrapped(args), **_unwrapped(kwargs))
    there = elsewhere if asked is None else torch.device(asked).type == PRETEND.type
    if function is aten.copy_.default:
        there = isinstance(args[0], Pretended)
    if not there:
        return args[0] if function is aten.copy_.default else found
    wrapped = tree_map(lambda one: Pretended(one) if isinstance(one, Tensor) else one, found)
    return wrapped if asked is not None else return_and_correct_aliasing(function, args, kwargs, wrapped)


def _fits(function: Any, args: Any, tensors: list[Tensor]) -> bool:
    """Whether an operator may read such tensors, of which some are pretended."""
    if function in BETWEEN or (function in INDEXED and isinstance(args[0], Pretended)):
        return True
    takes_numbers = torch.Tag.pointwise in function.tags or function in FILLED  # beside tensors, from the processor
    return all(isinstance(one, Pretended) or (takes_numbers and one.dim() == 0) for one in tensors)


def _unwrapped(arguments: Any) -> Any:
    def plain(one: Any) -> Any:
        if isinstance(one, Pretended):
            return one.inner
        return torch.device("cpu") if isinstance(one, torch.device) and one.type == PRETEND.type else one

    return tree_map(plain, arguments)
