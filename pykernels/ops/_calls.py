"""Calls: checked, once for all that look alike, and then run.

Checks ask some dozen facts of the arguments, and the choice of a backend some more: together that
takes longer than a small kernel. What they find hangs on little: on the shape, dtype and device of
each tensor and whether it requires a gradient, on the other arguments, and on whether anything
looks on. One look in C (csrc/signature.cpp) puts all that into a signature, and what was found of
a call is found by it for the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pykernels import _backends
from pykernels.ops import _autograd, _library
from pykernels.ops._packed import PackedWeights

#: How many signatures are kept of an op: sizes may never repeat, and then they help nobody.
CAPACITY = 1024

Maybe = Tensor | None


class Call:
    """A call whose arguments are right, but for the values of its tensors."""

    def __init__(
        self,
        op: str,
        function: type[torch.autograd.Function],
        backend: ModuleType,
        options: dict[str, Any],
    ) -> None:
        """`op` on `backend` with `options`; `function` is its Function."""
        self.op, self.function, self.backend, self.options = op, function, backend, options

    def __call__(
        self,
        tensors: tuple[Any, ...],
        *,
        packed: PackedWeights | None = None,
        check: Callable[..., None] | None = None,
    ) -> Any:
        """The outputs, through the Function where autograd must see the call.

        `packed` keeps packed weights for calls that it need not see; `check` checks the values of
        the tensors. Where a compiler or a transform looks on, it sees the operator (`_library`),
        which checks them itself.
        """
        op, backend, options = self.op, self.backend, self.options
        if _library.looked_at(backend):
            return _library.call(op, backend, options, tensors, _autograd.wanted(tensors))
        if check is not None:
            check(*tensors, **options)
        if _autograd.wanted(tensors):
            return self.function.apply(backend, options, *tensors)
        if packed is not None:
            options = options | packed.option(op, backend, tensors)
        return _autograd.run(backend, op, options, tensors, keep=False)[0]

    def unseen(self, is_recorded: bool) -> Call:
        """The same where nothing looks on, with autograd or without."""
        return _Unseen(self, is_recorded)


class _Unseen(Call):
    """A call that neither a compiler nor a transform nor autocast has to do with."""

    def __init__(self, call: Call, is_recorded: bool) -> None:
        super().__init__(call.op, call.function, call.backend, call.options)
        self._forward = f"{call.op}_fwd"
        # Past what Function.apply does for the transforms of torch.func: there are none, nor is a
        # tensor what one has left.
        beyond: Any = super(torch.autograd.Function, call.function)
        self._record = beyond.apply if is_recorded else None

    def __call__(
        self,
        tensors: tuple[Any, ...],
        *,
        packed: PackedWeights | None = None,
        check: Callable[..., None] | None = None,
    ) -> Any:
        options = self.options
        if check is not None:
            check(*tensors, **options)
        if self._record is not None:
            return self._record(self.backend, options, *tensors)
        if packed is not None:
            options = options | packed.option(self.op, self.backend, tensors)
        return getattr(self.backend, self._forward)(*tensors, keep=False, **options)[0]


Check = Callable[..., Any]


def once(check: Check) -> Check:
    """`check`, which remembers the calls that it has found right.

    `check` takes the tensors of a call, the backend that it asks for and all its other arguments,
    and returns a `Call` or what has an `unseen` like it, or raises an error.
    """
    known: dict[bytes, Any] = {}

    @functools.wraps(check)
    def checked(tensors: tuple[Maybe, ...], backend: str | None, *others: Any) -> Any:
        if torch.compiler.is_compiling():
            return check(tensors, backend, *others)
        signature = _signer()(tensors, (_backends.asked_for(backend), *others))
        if signature is None:
            return check(tensors, backend, *others)
        call = known.get(signature)
        if call is None:
            call = check(tensors, backend, *others).unseen(signature[0] == 1)
            if len(known) >= CAPACITY:
                known.clear()
            known[signature] = call
        return call

    return checked


@functools.cache
def _signer() -> Callable[..., bytes | None]:
    """What makes signatures in C; it makes none without the C++ kernels or before torch 2.10."""
    if _backends.available("cpp") is not None:
        return lambda *_: None
    looking_on = (
        torch._C._are_functorch_transforms_active,
        torch._C._len_torch_dispatch_stack,
        torch._C._is_any_autocast_enabled,
        _library.in_forward_mode,
    )
    make = _backends.load_extension().signer
    types = (Tensor, torch.nn.Parameter)
    return make(types, looking_on, torch.is_grad_enabled) or (lambda *_: None)
