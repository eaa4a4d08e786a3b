"""Ops as torch's compilers and function transforms see it.

An op is two operators of torch: ``torch.ops.pykernels.<op>``, which returns the outputs and what
its backward pass will want beside them, and ``torch.ops.pykernels.<op>_backward``. A graph holds
one of each, however long the sequence. Both know the sizes of their results without running, their
gradient (the backward operator's is that of the reference's formula), and what a mapped axis is to
them. Eager calls go past all this, as the dispatcher costs more than a small step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pykernels import _autocast, _backends
from pykernels._version import __version__

Maybe = Tensor | None
Tensors = tuple[Maybe, ...]
#: The axis along which a tensor is a batch of rows that have nothing to do with each other.
Axes = Sequence[int | None]

_library = torch.library.Library("pykernels", "DEF")
#: The second: a compiler need not lay out what they take, as they take any strides.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_operators: dict[str, Operator] = {}


#: Of every operator: the backend that runs, and the version that a graph was made by. Compilers
#: keep graphs on disk, with the sizes of what that version saves for backward, and tell them so.
_MADE_BY = "str backend, str version=''"


def _made_by(backend: str) -> dict[str, str]:
    return {"backend": backend, "version": __version__}


def looked_at(backend: ModuleType, tensors: Sequence[Maybe] = ()) -> bool:
    """Whether a compiler, a trace, a transform or a dispatch mode looks on: it sees an operator.

    So must tensors that dispatch by themselves, as those of `FakeTensorMode` do outside of it: they
    need have no memory. All of these see the operations that the reference is made of.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or in_forward_mode()
        or (
            (torch._C._len_torch_dispatch_stack() > 0 or any(map(_dispatches, tensors)))
            and _backends.name(backend) != "reference"
        )
    )


def _dispatches(tensor: Maybe) -> bool:
    """Whether its class wants to see each operation on it."""
    if tensor is None or type(tensor) is Tensor:
        return False
    return type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is going on."""
    return forward_ad._current_level >= 0


def _no_check(*_: Any, **__: Any) -> None:
    """Of an op whose tensors may have any values."""


def _as_it_is(module: ModuleType) -> ModuleType:
    return module


def _unwrapped(tensor: Maybe) -> Maybe:
    """The tensor that transforms have wrapped, with its values."""
    functorch = torch._C._functorch
    while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def call(
    op: str, backend: ModuleType, options: dict[str, Any], tensors: tuple[Any, ...], keep: bool
) -> Any:
    """The outputs of `op`, for whoever looks on; `keep` as in the contract of backends."""
    operator = _operators[op]
    traced = not torch.compiler.is_compiling() and torch._C._is_tracing()
    if in_forward_mode() or (traced and not operator.is_traceable):
        operator.check(*map(_unwrapped, tensors), **options)
        with _autocast.disabled(tensors[0].device):
            return operator.formula(*tensors, **options)
    name = _backends.name(backend)
    keep = keep or traced  # what is traced without gradients may get some
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        found = operator.forward(*tensors, **options, **_made_by(name), keep=keep)
    else:
        run = _Forward(operator, name, options, True)
        found = _Transformed.apply(run, *tensors)  # type: ignore[no-untyped-call]
    count = len(operator.outputs)
    return found[: count if options.get(operator.last_if, True) else count - 1]


class Operator:
    """What torch must know of an op; to make one is to register it."""

    def __init__(
        self,
        op: str,
        *,
        tensors: str,
        options: str,
        outputs: str,
        extras: str = "",
        saves: int = 1,
        last_if: str = "",
        empty: Callable[..., Tensors],
        formula: Callable[..., tuple[Tensor, ...]],
        axes: Callable[..., tuple[Axes, Axes] | None],
        check: Callable[..., None] = _no_check,
        reads_values: bool = False,
        adapt: Callable[[ModuleType], Any] = _as_it_is,
        name: str = "",
    ) -> None:
        """Args:
        op: its name.
        tensors: what it takes, as torch's schemas have it: "Tensor x, Tensor? h0".
        options: likewise: "bool reverse".
        outputs: the names of its outputs.
        extras: the names of all that any backend saves behind the tensors and `saves` of the
            outputs: of what its ``<op>_extras(*tensors, **options)`` makes, uninitialised.
        saves: how many of the outputs every backend saves.
        last_if: an option without which there is no last output.
        empty: ``(*tensors, **options)`` -> the outputs, uninitialised; None for what is not there.
        formula: ``(*tensors, **options)`` -> the outputs by the reference's formula, which can be
            differentiated in every way.
        axes: ``(*tensors, **options)`` -> the batch axis of each tensor, and that of each output
            and extra; None for what all rows share. None in their place: rows are not apart.
        check: ``(*tensors, **options)`` checks their values, which whoever looks on cannot see.
        reads_values: the reference's formula reads values of tensors: a graph that is to have the
            gradient of the gradient needs an operator for it.
        adapt: makes the module of a backend one of tensors alone, if it is not.
        name: what torch calls it, where that is not `op`.
        """
        name = name or op
        self.is_traceable = "?[" not in options  # torch.jit.trace: numbers or None in lists
        self.op, self.saves, self.last_if = op, saves, last_if
        self.empty, self.formula, self.axes = empty, formula, axes
        self.check, self.adapt = check, adapt
        self.tensors = [part.split()[1] for part in tensors.split(", ")]
        self.outputs, self.extras = outputs.split(), extras.split()
        kept = [f"Tensor? {name}" for name in (*self.outputs[:saves], *self.extras)]
        grads = [f"Tensor? d{name}" for name in self.outputs]
        results = ["Tensor"] * len(self.outputs + self.extras)
        own = ["Tensor"] * len(self.tensors)
        self.forward = self._register(
            f"{name}({tensors}, *, {options}, {_MADE_BY}, bool keep) -> ({', '.join(results)})",
            _Forward,
        )
        self.backward = self._register(
            f"{name}_backward({', '.join([tensors, *kept, *grads])}, *, {options}, {_MADE_BY}, "
            f"bool[] needs) -> ({', '.join(own)})",
            _Backward,
        )
        self.twice = None
        if reads_values:
            upstream = [f"Tensor? dd{part}" for part in self.tensors]
            given = [tensors, *kept, *grads]
            results = ["Tensor"] * len(", ".join(given).split(", "))
            self.twice = self._register(
                f"{name}_double_backward({', '.join([*given, *upstream])}, *, {options}, "
                f"{_MADE_BY}, bool[] needs, int[] wanted) -> ({', '.join(results)})",
                _Twice,
            )
        _operators[op] = self

    def _register(self, schema: str, kind: type[_Pass]) -> Any:
        def of(keywords: dict[str, Any]) -> _Pass:
            options: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in keywords.items()
            }
            own = options.pop(kind.own)
            options.pop("version", None)
            return kind(self, options.pop("backend"), options, own)

        def run(*args: Maybe, **keywords: Any) -> tuple[Tensor, ...]:
            return of(keywords).run(*args)

        def fake(*args: Maybe, **keywords: Any) -> tuple[Tensor, ...]:
            return of(keywords).empty(*args)

        def setup_context(
            ctx: Any, inputs: Tensors, keyword_only_inputs: dict[str, Any], output: Any
        ) -> None:
            ctx.run = of(keyword_only_inputs)
            ctx.run.setup(ctx, inputs, output)

        def backward(ctx: Any, *grads: Maybe) -> Tensors:
            run: _Pass = ctx.run
            return run.backward(ctx, ctx.needs_input_grad, grads)

        def vmap(info: Any, in_dims: Axes, *args: Maybe, **keywords: Any) -> tuple[Any, Any]:
            return of(keywords).batch(info.batch_size, in_dims, args)

        _library.define(schema, tags=_TAGS)
        name = schema.partition("(")[0]
        _library.impl(name, run, "CompositeExplicitAutograd")
        full = f"pykernels::{name}"
        torch.library.register_fake(full, fake, lib=_library)
        if kind is _Twice:
            return getattr(torch.ops.pykernels, name).default
        torch.library.register_autograd(full, backward, setup_context=setup_context, lib=_library)
        torch.library.register_vmap(full, vmap, lib=_library)
        return getattr(torch.ops.pykernels, name).default


class _Pass:
    """A pass of an op on one backend: what the registrations of an operator answer with."""

    #: The option that this pass alone has.
    own: str

    def __init__(
        self, operator: Operator, backend: str, options: dict[str, Any], _own: Any
    ) -> None:
        self.operator, self.backend_name, self.options = operator, backend, options

    def __call__(self, args: Sequence[Maybe]) -> tuple[Tensor, ...]:
        """The results, seen by whatever transform there is."""
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return self.apply(*args)
        found: tuple[Tensor, ...]
        found = _Transformed.apply(self, *args)  # type: ignore[no-untyped-call]
        return found

    def apply(self, *args: Maybe) -> tuple[Tensor, ...]:
        """The operator."""
        raise NotImplementedError

    def run(self, *args: Maybe) -> tuple[Tensor, ...]:
        """The results, from the backend; all contiguous, and in memory of their own."""
        raise NotImplementedError

    def empty(self, *args: Maybe) -> tuple[Tensor, ...]:
        """Tensors of the sizes and dtypes of the results."""
        raise NotImplementedError

    def setup(self, ctx: Any, args: Sequence[Maybe], results: Sequence[Tensor]) -> None:
        """Saves what `backward` needs."""
        raise NotImplementedError

    def backward(self, ctx: Any, needs: Sequence[bool], grads: Tensors) -> Tensors:
        """The gradients of `args`."""
        raise NotImplementedError

    def batch(
        self, size: int, dims: Axes, args: Sequence[Maybe]
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """The results and their mapped axes, where `dims` are the mapped axes of `args`.

        The mapped axis joins the batch, if all that is mapped has one; or else one call follows the
        other.
        """
        one = [
            t if t is None or d is None else t.select(d, 0) for t, d in zip(args, dims, strict=True)
        ]
        found = self._folded(size, dims, args, one)
        if found is not None:
            return found
        parts = [
            self(
                [
                    t if t is None or d is None else t.select(d, i)
                    for t, d in zip(args, dims, strict=True)
                ]
            )
            for i in range(size)
        ]
        return tuple(map(torch.stack, zip(*parts, strict=True))), (0,) * len(parts[0])

    def _folded(
        self, size: int, dims: Axes, args: Sequence[Maybe], one: Sequence[Maybe]
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]] | None:
        """`batch` in one call, or None. Each of `one` is an argument of a single call."""
        raise NotImplementedError

    def _module(self) -> Any:
        return self.operator.adapt(_backends.module(self.backend_name, self.operator.op))


class _Forward(_Pass):
    """``<op>_fwd``: tensors -> outputs, then extras; empty where there is no such."""

    own = "keep"

    def __init__(
        self, operator: Operator, backend: str, options: dict[str, Any], keep: bool
    ) -> None:
        super().__init__(operator, backend, options, keep)
        self.keep = keep

    def apply(self, *args: Maybe) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.operator.forward(
            *args, **self.options, **_made_by(self.backend_name), keep=self.keep
        )
        return found

    def run(self, *args: Maybe) -> tuple[Tensor, ...]:
        self.operator.check(*args, **self.options)
        compute = getattr(self._module(), f"{self.operator.op}_fwd")
        with _autocast.disabled(_device(args)):
            outputs, saved = compute(*args, keep=self.keep, **self.options)
        extras = saved[len(args) + self.operator.saves :] if self.keep else ()
        return _own(self._results(args, outputs, extras), args)

    def empty(self, *args: Maybe) -> tuple[Tensor, ...]:
        make = getattr(self._module(), f"{self.operator.op}_extras", None) if self.keep else None
        extras = () if make is None else make(*args, **self.options)
        return self._results(args, self.operator.empty(*args, **self.options), extras)

    def _results(
        self, args: Sequence[Any], outputs: Sequence[Maybe], extras: Sequence[Maybe]
    ) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for made, names in ((outputs, self.operator.outputs), (extras, self.operator.extras)):
            missing = len(names) - len(made)
            found += [args[0].new_empty(0) if t is None else t for t in (*made, *[None] * missing)]
        return tuple(found)

    def setup(self, ctx: Any, args: Sequence[Maybe], results: Sequence[Tensor]) -> None:
        count = len(self.operator.outputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[count:])
        ctx.save_for_backward(*args, *results[: self.operator.saves], *results[count:])

    def backward(self, ctx: Any, needs: Sequence[bool], grads: Tensors) -> Tensors:
        needs = tuple(map(bool, needs[: len(self.operator.tensors)]))
        args = (*ctx.saved_tensors, *grads[: len(self.operator.outputs)])
        run = _Backward(self.operator, self.backend_name, self.options, needs)
        found = run.formula(args) if in_forward_mode() else run(args)
        return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))

    def _folded(
        self, size: int, dims: Axes, args: Sequence[Maybe], one: Sequence[Maybe]
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]] | None:
        axes = self.operator.axes(*one, **self.options)
        if axes is None or _shared(dims, axes[0]):
            return None
        rows = _rows(one, axes[0])
        each = zip(args, dims, axes[0], one, strict=True)
        found = self([_join(t, d, a, o, size, rows) for t, d, a, o in each])
        out = tuple(_axis(t, a) for t, a in zip(found, axes[1], strict=True))
        return tuple(
            t if a is None else t.unflatten(a, (size, rows))
            for t, a in zip(found, out, strict=True)
        ), out


class _Backward(_Pass):
    """``<op>_bwd``: tensors, saved outputs, extras, gradients of outputs -> those of tensors.

    Empty where none is needed.
    """

    own = "needs"

    def __init__(
        self, operator: Operator, backend: str, options: dict[str, Any], needs: Sequence[bool]
    ) -> None:
        super().__init__(operator, backend, options, needs)
        self.needs = tuple(needs)

    def apply(self, *args: Maybe) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.operator.backward(
            *args, **self.options, **_made_by(self.backend_name), needs=self.needs
        )
        return found

    def run(self, *args: Maybe) -> tuple[Tensor, ...]:
        # A backend finds what it saved as it saved it, whatever has been made of it in between.
        first, last = len(self.needs), len(args) - len(self.operator.outputs)
        saved = (t if t is None else t.contiguous() for t in args[first:last])
        dense = (*args[:first], *saved, *args[last:])
        return _own(self._needed(args, self._gradients(self._module(), dense)), args)

    def formula(self, args: Sequence[Maybe]) -> Tensors:
        """The results by the reference, to be differentiated."""
        return self._gradients(_backends.module("reference", self.operator.op), args)

    def empty(self, *args: Maybe) -> tuple[Tensor, ...]:
        made = [t if t is None else t.new_empty(t.shape) for t in args[: len(self.needs)]]
        return self._needed(args, made)

    def _gradients(self, module: Any, args: Sequence[Maybe]) -> Tensors:
        count = len(args) - len(self.operator.outputs)
        saved = tuple(args[:count])
        # an output that is not there is an empty tensor, and may have got a gradient like that
        grads = tuple(None if t is None or t.numel() == 0 else t for t in args[count:])
        if not self.options.get(self.operator.last_if, True):
            grads = grads[:-1]
        compute = getattr(module, f"{self.operator.op}_bwd")
        with _autocast.disabled(_device(args)):
            found: Tensors = compute(saved, grads, needs=self.needs, **self.options)
        return found

    def _needed(self, args: Sequence[Any], grads: Sequence[Maybe]) -> tuple[Tensor, ...]:
        return tuple(
            grad if need and grad is not None else args[0].new_empty(0)
            for grad, need in zip(grads, self.needs, strict=True)
        )

    def setup(self, ctx: Any, args: Sequence[Maybe], results: Sequence[Tensor]) -> None:
        unneeded = (t for t, need in zip(results, self.needs, strict=True) if not need)
        ctx.mark_non_differentiable(*unneeded)
        ctx.save_for_backward(*args)

    def backward(self, ctx: Any, needs: Sequence[bool], grads: Tensors) -> Tensors:
        args = ctx.saved_tensors
        extras = len(self.operator.tensors) + self.operator.saves
        kept = range(extras, extras + len(self.operator.extras))  # the reference has no use for it
        wanted = [i for i in range(len(args)) if needs[i] and i not in kept]
        twice = self.operator.twice
        if twice is not None and any(map(_dispatches, args)):  # a trace, which sees no values
            options = self.options | _made_by(self.backend_name)
            found = twice(*args, *grads, **options, needs=self.needs, wanted=wanted)
            return tuple(found[i] if i in wanted else None for i in range(len(args)))
        return self.again(args, grads, wanted)

    def again(self, args: Sequence[Any], grads: Tensors, wanted: Sequence[int]) -> Tensors:
        """The gradients of `args` from those of the results: of the reference's formula."""

        def formula(*given: Tensor) -> Tensors:
            own = list(args)
            for i, t in zip(wanted, given, strict=True):
                own[i] = t
            return self._only_needed(self.formula(own))

        pull: Any = torch.func.vjp(formula, *(args[i] for i in wanted))[1]
        found = dict(zip(wanted, pull(self._only_needed(grads)), strict=True))
        return tuple(found.get(i) for i in range(len(args)))

    def _only_needed(self, grads: Tensors) -> Tensors:
        return tuple(grad for grad, need in zip(grads, self.needs, strict=True) if need)

    def _folded(
        self, size: int, dims: Axes, args: Sequence[Maybe], one: Sequence[Maybe]
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]] | None:
        operator = self.operator
        count = len(operator.tensors)
        axes: Any = operator.axes(*one[:count], **self.options)
        if axes is None:
            return None
        own, results = axes
        kept, outputs = results[len(operator.outputs) :], results[: len(operator.outputs)]
        every: Axes = (*own, *results[: operator.saves], *kept, *outputs)
        # The gradient of what all rows share is a sum over rows, those of other calls too.
        if _shared(dims, every) or _shared(
            [i if need else None for i, need in enumerate(self.needs)], own
        ):
            return None
        rows = _rows(one, own)
        # A gradient is by row, and so must be what it is of.
        whole = (*self.needs, *[False] * (len(args) - count))
        each = zip(args, dims, every, one, whole, strict=True)
        found = self([_join(t, d, a, o, size, rows, whole=need) for t, d, a, o, need in each])
        axis = zip(found, own, self.needs, strict=True)
        out = tuple(_axis(grad, a) if need else None for grad, a, need in axis)
        grads = []
        for grad, a, t in zip(found, out, one[:count], strict=True):
            if a is not None:
                grad = grad.unflatten(a, (size, rows))
                if t is not None and t.shape[a] != rows:
                    grad = grad.sum(a + 1, keepdim=True)
            grads.append(grad)
        return tuple(grads), out


class _Twice(_Pass):
    """The gradient of `_Backward`, where it is an operator too; it has none of its own."""

    own = "wanted"

    def __init__(
        self, operator: Operator, backend: str, options: dict[str, Any], wanted: Sequence[int]
    ) -> None:
        super().__init__(operator, backend, options, wanted)
        self.wanted = wanted
        self.once = _Backward(operator, backend, options, options.pop("needs"))

    def run(self, *args: Maybe) -> tuple[Tensor, ...]:
        given, upstream = self._split(args)
        return _own(self._results(given, self.once.again(given, upstream, self.wanted)), args)

    def empty(self, *args: Maybe) -> tuple[Tensor, ...]:
        given, _ = self._split(args)
        return self._results(given, [t if t is None else t.new_empty(t.shape) for t in given])

    def _split(self, args: Tensors) -> tuple[Tensors, Tensors]:
        count = len(args) - len(self.operator.tensors)
        return args[:count], args[count:]

    def _results(self, given: Sequence[Any], found: Sequence[Maybe]) -> tuple[Tensor, ...]:
        return tuple(
            t if i in self.wanted and t is not None else given[0].new_empty(0)
            for i, t in enumerate(found)
        )


class _Transformed(torch.autograd.Function):
    """A pass under the transforms of `torch.func`, which want more of a Function than autograd."""

    @staticmethod
    def forward(run: _Pass, *args: Maybe) -> tuple[Tensor, ...]:
        return run.apply(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run, *args = inputs
        ctx.run.setup(ctx, args, output)

    @staticmethod
    def backward(ctx: Any, *grads: Maybe) -> tuple[Any, ...]:
        return None, *ctx.run.backward(ctx, ctx.needs_input_grad[1:], grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], run: _Pass, *args: Maybe) -> tuple[Any, Any]:
        return run.batch(info.batch_size, in_dims[1:], args)


def _device(args: Sequence[Any]) -> torch.device:
    first: Tensor = args[0]
    return first.device


def _own(found: Sequence[Tensor], given: Sequence[Maybe]) -> tuple[Tensor, ...]:
    """`found`, dense, with copies of what lies in the memory of `given` or of another."""
    taken = {_memory(t) for t in given if t is not None}
    made = []
    for t in found:
        t = t.contiguous()
        t = t.clone() if t.numel() and _memory(t) in taken else t
        taken.add(_memory(t))
        made.append(t)
    return tuple(made)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _shared(dims: Axes, axes: Axes) -> bool:
    """Whether something is mapped that all rows share."""
    return any(d is not None and a is None for d, a in zip(dims, axes, strict=True))


def _rows(tensors: Sequence[Maybe], axes: Axes) -> int:
    """The number of rows of the batch, along axes that may be broadcast."""
    return next(
        t.shape[a] for t, a in zip(tensors, axes, strict=False) if t is not None and a is not None
    )


def _axis(tensor: Maybe, axis: int | None) -> int | None:
    """`axis` counted from the first; None where the tensor is missing or has no such axis."""
    if tensor is None or axis is None or not -tensor.dim() <= axis < tensor.dim():
        return None
    return axis % tensor.dim()


def _join(
    tensor: Maybe,
    dim: int | None,
    axis: int | None,
    one: Maybe,
    size: int,
    rows: int,
    *,
    whole: bool = False,
) -> Maybe:
    """The mapped axis of a tensor within its batch axis.

    Args:
        tensor, dim: what is mapped, and along which axis, if any.
        axis, one: the batch axis of a single call's tensor, and that tensor.
        size, rows: sizes of the two axes.
        whole: repeat what could be broadcast.
    """
    axis = _axis(one, axis)
    if tensor is None or one is None or axis is None:
        return tensor
    if dim is None:
        if one.shape[axis] == 1 != rows and not whole:
            return tensor
        tensor = tensor.unsqueeze(axis).expand(*one.shape[:axis], size, *one.shape[axis:])
    else:
        tensor = tensor.movedim(dim, axis)
    tensor = tensor.expand(*one.shape[:axis], size, rows, *one.shape[axis + 1 :])
    return tensor.flatten(axis, axis + 1)
