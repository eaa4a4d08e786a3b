"""Launchers of the C++ kernels: allocate the outputs, pass pointers and sizes.

The kernels read and write memory that torch owns; they know nothing of torch.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels import _backends

Maybe = Tensor | None

_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
#: What makes tensors past the dispatcher, as Inductor's code does; None in a torch without it.
#: Beside it what says whether that may not be, as torch is to fill them.
ALLOCATOR = (
    getattr(_guards, "_empty_strided_cpu", None),
    torch._C._get_deterministic_algorithms,
)

#: The codes by which csrc/bind.h knows the dtypes that every kernel serves.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def address(tensor: Maybe) -> int:
    """Where the first element is; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Maybe) -> Maybe:
    """The tensor in row-major order, copied only if it is not; None stays None."""
    return None if tensor is None else plain(tensor).contiguous()


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last axis contiguous, copied only if it is not."""
    tensor = plain(tensor)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def plain(tensor: Tensor) -> Tensor:
    """The tensor with what its memory has: torch may keep a minus, or that all is 0, to itself.

    Raises:
        ValueError: its memory has been given back.
    """
    tensor = tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"the memory of a tensor of shape {list(tensor.shape)} is not there")
    return tensor


class What(enum.IntEnum):
    """What a kernel wants of a tensor's memory; csrc/plan.cpp has the same."""

    ADDRESS = 0  # of one in row-major order
    START = 1  # the address of one of any strides
    STRIDES = 2  # all, 0 along an axis of size one, which broadcasts
    ROWS = 3  # address and first three strides of one [., ., ., D] whose last axis is contiguous
    PACKED = 4  # address and strides of page, head and row of one [.., rows, heads, D], likewise
    ITSELF = 5  # no more of it


class Hole(NamedTuple):
    """Where the arguments of a kernel want something of a tensor's memory; 0 or zeros for None."""

    index: int  # among the tensors, and behind them the results
    what: What


def at(*indices: int | None) -> list[Any]:
    """The addresses of tensors in row-major order; 0 for None."""
    return [0 if i is None else Hole(i, What.ADDRESS) for i in indices]


def start(index: int) -> Hole:
    return Hole(index, What.START)


def strides(index: int) -> Hole:
    return Hole(index, What.STRIDES)


def rows(*indices: int) -> list[Hole]:
    return [Hole(i, What.ROWS) for i in indices]


def packed_rows(*indices: int) -> list[Hole]:
    return [Hole(i, What.PACKED) for i in indices]


def these(*indices: int | None) -> tuple[Any, ...]:
    """The tensors themselves."""
    return tuple(None if i is None else Hole(i, What.ITSELF) for i in indices)


class Result(NamedTuple):
    """A tensor that a kernel fills."""

    sizes: tuple[int, ...]
    dtype: torch.dtype | None = None  # of the first tensor that the kernel reads if that is None
    #: The number of a tensor, whose last axis is contiguous, that it lies like: with its axes in
    #: that order. Row-major if None, or where C cannot tell how tensors lie: before torch 2.10.
    lies_like: int | None = None

    def like(self, x: Tensor) -> Tensor:
        """It, uninitialised and row-major, where x is."""
        return x.new_empty(self.sizes, dtype=self.dtype)

    def laid_out(self, x: Tensor) -> tuple[Any, ...]:
        """Sizes, row-major strides, dtype, what it lies like; x is the kernel's first tensor."""
        whole = [max(1, size) for size in self.sizes]  # torch's rule
        strides = tuple(math.prod(whole[axis + 1 :]) for axis in range(len(whole)))
        return self.sizes, strides, self.dtype or x.dtype, self.lies_like


def without(skip: tuple[int, ...], *results: Result) -> list[Result | None]:
    """The results but for those at the places `skip`."""
    return [None if i in skip else result for i, result in enumerate(results)]


class Plan(NamedTuple):
    """What a kernel is called with on tensors of certain shapes: all is known but their memory.

    csrc/plan.cpp works by it.
    """

    kernel: str  # its name in the extension
    code: int  # of the dtype of the tensors
    count: int  # of tensors; of those at the end that are not given, each is None
    # Made besides, each as `Result.laid_out` has it; None for what is not wanted.
    results: Sequence[object]
    arguments: Sequence[object]  # nested tuples and lists, with holes
    returns: object  # what the pass returns, likewise

    def lay(self, tensors: tuple[Maybe, ...]) -> tuple[Maybe, ...]:
        """The tensors as the kernel wants them, copied where they lie otherwise."""
        wanted: dict[int, What] = {}
        _holes(self.arguments, wanted)
        lay = {What.ADDRESS: contiguous, What.ROWS: dense_rows, What.PACKED: dense_rows}
        return tuple(
            lay.get(wanted[i], plain)(t) if i in wanted and t is not None else t
            for i, t in enumerate(tensors)
        )

    def fill(self, tensors: tuple[Maybe, ...], results: tuple[Maybe, ...]) -> tuple[Any, ...]:
        """The arguments, where C cannot tell where tensors are: before torch 2.10, for one."""
        missing = [None] * (self.count - len(tensors))
        filled: tuple[Any, ...] = _filled(self.arguments, [*tensors, *missing, *results])
        return filled


class Pass(NamedTuple):
    """A pass of an op, forward or backward, for all calls that look alike."""

    #: A function of a tuple of tensors: what the pass returns of them.
    run: Callable[[tuple[Any, ...]], Any]
    #: The same, but for the kernel, which is left to the caller: its arguments behind the dtype and
    #: the number of threads; what the pass returns; what must outlive the kernel.
    lay_out: Callable[[tuple[Any, ...]], tuple[Any, Any, object]]
    plan: Plan


def make_pass(
    kernel: str,
    x: Tensor,
    count: int,
    results: Sequence[Result | None],
    arguments: Sequence[object],
    returns: object,
) -> Pass:
    """The pass of a `Plan`; `x` is one of the tensors, for their dtype."""
    made = [None if result is None else result.laid_out(x) for result in results]
    plan = Plan(kernel, DTYPES[x.dtype], count, made, arguments, returns)
    make = _backends.load_extension().plan
    lay_out, run = make(Tensor, plan, Hole, torch.get_num_threads, ALLOCATOR)
    return Pass(run, lay_out, plan)


def planned(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, whose passes are kept.

    It sees no more of its tensors than their key has; each build of the kernels has its own passes.
    """

    @functools.lru_cache(128)
    def place(*key: object) -> list[Any]:
        return []

    @functools.wraps(make)
    def find(*tensors: Maybe, **options: Any) -> Any:
        looks = [None if t is None else (t.shape, t.dtype) for t in tensors]
        known = place(_backends.load_extension(), *looks, *options.items())
        if not known:
            known.append(make(*tensors, **options))
        return known[0]

    return find


def renumbered(arguments: Any, order: Sequence[int]) -> Any:
    """The arguments where tensor or result i is number order[i]."""
    if isinstance(arguments, Hole):
        return Hole(order[arguments.index], arguments.what)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(renumbered(each, order) for each in arguments)
    return arguments


def _holes(arguments: Any, found: dict[int, What]) -> None:
    """What is wanted of each tensor."""
    if isinstance(arguments, Hole):
        found[arguments.index] = arguments.what
    elif isinstance(arguments, (list, tuple)):
        for each in arguments:
            _holes(each, found)


def _filled(arguments: Any, tensors: Sequence[Maybe]) -> Any:
    """The arguments without holes."""
    if isinstance(arguments, Hole):
        tensor, what = tensors[arguments.index], arguments.what
        if tensor is None:
            return (0, (0, 0, 0)) if what in (What.ROWS, What.PACKED) else 0
        strides = tensor.stride()
        if what == What.STRIDES:
            pairs = zip(tensor.shape, strides, strict=True)
            return tuple(0 if size == 1 else step for size, step in pairs)
        if what == What.ROWS:
            return address(tensor), strides[:3]
        if what == What.PACKED:
            row, head, _ = strides[-3:]
            return address(tensor), (strides[0] if tensor.dim() > 3 else 0, head, row)
        return address(tensor)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(_filled(each, tensors) for each in arguments)
    return arguments
