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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels import _autocast, _backends
from pykernels.ops import _autograd, _library
from pykernels.ops._packed import PackedWeights

#: How many signatures are kept of an op, the last ones: sizes may never repeat.
CAPACITY = 1024
#: Bytes of the longest one that is: more hold a number for each sequence or step, as seldom again.
LONGEST = 1024

Maybe = Tensor | None


class Call:
    """A call whose arguments are right, but for the values of its tensors."""

    def __init__(
        self,
        op: str,
        function: type[torch.autograd.Function],
        backend: ModuleType,
        options: dict[str, Any],
        skip: tuple[int, ...] = (),
    ) -> None:
        """`op` on `backend` with `options`; `function` is its Function.

        Outputs at the places `skip` may be None: the caller takes them not.
        """
        self.op, self.function, self.backend, self.options = op, function, backend, options
        self.skip = skip

    def outputs(
        self,
        tensors: tuple[Any, ...],
        packed: PackedWeights | None = None,
        check: Callable[..., None] | None = None,
    ) -> Any:
        """The outputs, through the Function where autograd must see the call.

        `packed` keeps packed weights for calls that it need not see; `check` checks the values of
        the tensors. Where a compiler or a transform looks on, it sees the operator (`_library`),
        which checks them itself.
        """
        op, backend, options = self.op, self.backend, self.options
        if _library.looked_at(backend, tensors):
            return _library.call(op, backend, options, tensors, _autograd.wanted(tensors))
        if check is not None:
            check(*tensors, **options)
        if _autograd.wanted(tensors):
            return self.function.apply(self, *tensors)
        option = {} if packed is None else packed.option(op, backend, tensors)
        return self._run(tensors, keep=False, **option)[0]

    def forward(self, tensors: tuple[Any, ...]) -> tuple[Any, tuple[Maybe, ...]]:
        """The outputs, and what is saved for `backward`."""
        return self._run(tensors, keep=True)

    def _run(self, tensors: tuple[Any, ...], **more: Any) -> tuple[Any, tuple[Maybe, ...]]:
        compute = getattr(self.backend, f"{self.op}_fwd")
        with _autocast.disabled(tensors[0].device):
            found: tuple[Any, tuple[Maybe, ...]] = compute(*tensors, **more, **self.options)
            return found

    def backward(
        self, saved: tuple[Any, ...], grads: tuple[Maybe, ...], needs: tuple[bool, ...]
    ) -> tuple[Maybe, ...]:
        """The gradients of the tensors.

        Where the gradient is to be differentiated again (``create_graph=True``) the reference's
        formula of it runs instead of a kernel, as autograd can differentiate that.
        """
        op, backend = self.op, self.backend
        backend = _backends.module("reference", op) if torch.is_grad_enabled() else backend
        with _autocast.disabled(saved[0].device):
            found = getattr(backend, f"{op}_bwd")(saved, grads, needs=needs, **self.options)
        return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))

    def with_options(self, **options: Any) -> Call:
        """The same with further options."""
        return Call(self.op, self.function, self.backend, self.options | options, self.skip)

    def on(self, backend: Any) -> Call:
        """The same on another backend."""
        return Call(self.op, self.function, backend, self.options, self.skip)

    def unseen(self, is_recorded: bool) -> Call:
        """The same where nothing looks on, with autograd or without."""
        return _Unseen(self, is_recorded)


class _Unseen(Call):
    """A call that neither a compiler nor a transform has to do with.

    What its backend can say of its passes without the tensors is kept with it.
    """

    def __init__(self, call: Call, is_recorded: bool) -> None:
        super().__init__(call.op, call.function, call.backend, call.options, call.skip)
        # Past what Function.apply does for the transforms of torch.func: there are none, nor is a
        # tensor what one has left.
        beyond: Any = super(torch.autograd.Function, call.function)
        self._record = beyond.apply if is_recorded else None
        self._checks_values = getattr(call.backend, "CHECKS_VALUES", False)
        self._backward: dict[tuple[bool, ...], Callable[..., Any]] = {}

    def outputs(
        self,
        tensors: tuple[Any, ...],
        packed: PackedWeights | None = None,
        check: Callable[..., None] | None = None,
    ) -> Any:
        if check is not None and not self._checks_values:
            check(*tensors, **self.options)
        try:
            if self._record is not None:
                return self._record(self, *tensors)
            if packed is not None:
                tensors = (*tensors, *packed.option(self.op, self.backend, tensors).values())
            return self.forward(tensors)[0]
        except IndexError:
            if check is not None:
                check(*tensors, **self.options)  # says what is wrong
            raise

    def forward(self, tensors: tuple[Any, ...]) -> tuple[Any, tuple[Maybe, ...]]:
        """As of any call; from the second time on it is the function that is planned here."""
        keep = self._record is not None
        plan = getattr(self.backend, f"{self.op}_fwd_pass", None)
        if plan is None:
            run: Any = functools.partial(self._run, keep=keep)
        else:
            run = plan(*tensors, keep=keep, skip=self.skip, **self.options).run
        self.forward = run  # type: ignore[method-assign]
        found: tuple[Any, tuple[Maybe, ...]] = run(tensors)
        return found

    def backward(
        self, saved: tuple[Any, ...], grads: tuple[Maybe, ...], needs: tuple[bool, ...]
    ) -> tuple[Maybe, ...]:
        if torch.is_grad_enabled():
            return super().backward(saved, grads, needs)
        run = self._backward.get(needs) or self._plan_backward(saved, needs)
        found: tuple[Maybe, ...] = run((*saved, *grads))
        return found

    def _plan_backward(self, saved: tuple[Any, ...], needs: tuple[bool, ...]) -> Any:
        """A function of what was saved and the gradients."""
        plan, count = getattr(self.backend, f"{self.op}_bwd_pass", None), len(saved)
        if plan is None:
            whole = super().backward
            run = lambda given: whole(given[:count], given[count:], needs)  # noqa: E731
        else:
            run = plan(*saved, needs=needs, **self.options).run
        self._backward[needs] = run
        return run


Check = Callable[..., Any]
#: What forgets the calls of each op.
_forget: list[Callable[[], None]] = []


def forget() -> None:
    """Forgets all calls: plans hold for the build of the C++ kernels that they were made with."""
    for forget_op in _forget:
        forget_op()


def once(check: Check) -> Check:
    """`check`, which remembers the calls that it has found right.

    `check` takes the tensors of a call, the backend that it asks for and all its other arguments,
    and returns a `Call` or what has an `unseen` like it, or raises an error. A call whose `unseen`
    is None is not remembered.
    """

    # Of a Memory: find and keep. A cached function would take longer.
    memory: dict[None, tuple[Callable[..., Any], Callable[[bytes, Any], None]]] = {}
    _forget.append(memory.clear)

    @functools.wraps(check)
    def checked(tensors: tuple[Maybe, ...], backend: str | None, *others: Any) -> Any:
        if torch.compiler.is_compiling():
            return check(tensors, backend, *others)
        find, keep = memory.get(None) or memory.setdefault(None, _signer().memory(CAPACITY))
        known = find(tensors, backend, others)
        if known is not None:
            return known
        signature = _signer().sign(tensors, backend, others)
        found = check(tensors, backend, *others)
        call = found.unseen(signature[0] == 1) if 0 < len(signature) <= LONGEST else None
        if call is None:
            return found
        keep(signature, call)
        return call

    return checked


class Signer(NamedTuple):
    """What csrc/signature.cpp makes."""

    #: Of tensors, the backend asked for and all other options, their signature; empty where nothing
    #: can be known of such a call.
    sign: Callable[[tuple[Maybe, ...], Any, tuple[Any, ...]], bytes]
    #: Of a capacity, what finds a call by the same, or None, and what keeps one by its signature.
    memory: Callable[[int], tuple[Callable[..., Any], Callable[[bytes, Any], None]]]


#: Without the C++ kernels or before torch 2.10.
NO_SIGNATURES = Signer(lambda *_: b"", lambda _: (lambda *_: None, lambda *_: None))


@functools.cache
def _signer() -> Signer:
    try:
        missing = _backends.available("cpp")
    except ValueError as error:  # of what asks for the kernels, which not every call does
        missing = str(error)
    if missing is not None:
        return NO_SIGNATURES
    looking_on = (
        torch._C._are_functorch_transforms_active,
        torch._C._len_torch_dispatch_stack,
        torch._C._is_tracing,
        _library.in_forward_mode,
    )
    make = _backends.load_extension().signer
    types, recording = (Tensor, torch.nn.Parameter), torch.is_grad_enabled
    found = make(types, looking_on, recording, _backends.context)
    return NO_SIGNATURES if found is None else Signer(*found)
