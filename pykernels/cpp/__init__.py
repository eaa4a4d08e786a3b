"""Launchers of the C++ kernels: allocate the outputs, pass pointers and sizes.

The kernels read and write memory that torch owns; they know nothing of torch.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels import _backends

Maybe = Tensor | None

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


class Result(NamedTuple):
    """A tensor that a kernel fills, of the dtype of the first one that it reads if that is None."""

    sizes: tuple[int, ...]
    dtype: torch.dtype | None = None

    def like(self, x: Tensor) -> Tensor:
        """It, uninitialised, where x is."""
        return x.new_empty(self.sizes, dtype=self.dtype)


class Plan:
    """What a kernel is called with on tensors of certain shapes: all is known but their memory."""

    def __init__(self, count: int, results: Sequence[Result | None], arguments: object) -> None:
        """Args:
        count: how many tensors there will be.
        results: what is made besides; None for what is not wanted.
        arguments: nested tuples and lists, with holes.
        """
        self.count, self.results, self.arguments = count, list(results), arguments
        make = _backends.load_extension().plan
        self._quick = make(Tensor, Hole, self.results, arguments, count) or (lambda _: None)

    @functools.cached_property
    def _lay(self) -> list[Callable[[Tensor], Maybe] | None]:
        """What lays each tensor as the kernel wants it; None where it wants none of it."""
        wanted: dict[int, What] = {}
        _holes(self.arguments, wanted)
        lay = {What.ADDRESS: contiguous, What.ROWS: dense_rows}
        return [lay.get(wanted[i], plain) if i in wanted else None for i in range(self.count)]

    def __call__(self, tensors: tuple[Maybe, ...]) -> tuple[Any, Any, object]:
        """The results, uninitialised; the arguments; and what must outlive the call beside them."""
        return self._quick(tensors) or self._at_length(tensors)

    def _at_length(self, tensors: tuple[Maybe, ...]) -> tuple[Any, Any, object]:
        """The same with copies; or where C cannot tell where tensors are, before torch 2.10."""
        kept = tuple(
            t if t is None or lay is None else lay(t)
            for t, lay in zip(tensors, self._lay, strict=True)
        )
        quick = self._quick(kept)
        if quick is not None:
            return quick[0], quick[1], kept
        made = [None if r is None else r.like(tensors[0]) for r in self.results]
        return tuple(made), _filled(self.arguments, [*kept, *made]), kept


class Pass:
    """A pass of an op, forward or backward, for all calls that look alike."""

    def __init__(
        self,
        kernel: str,
        x: Tensor,
        plan: Plan,
        finish: Callable[[tuple[Any, ...], tuple[Any, ...]], Any],
        prepare: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        """Args:
        kernel: its name in the extension.
        x: one of the tensors, for their dtype.
        plan: what the kernel takes behind the dtype and the number of threads.
        finish: ``(tensors, results)`` -> what the pass returns.
        prepare: ``(tensors, packed)`` -> the tensors of the plan, where they are others.
        """
        self.kernel, self.code, self.plan, self.finish = kernel, DTYPES[x.dtype], plan, finish
        self.prepare = prepare

    def __call__(self, tensors: tuple[Any, ...], packed: Any = None) -> Any:
        """What the pass returns of such tensors; `packed` are packed weights of a recurrent op."""
        if self.prepare is not None:
            tensors = self.prepare(tensors, packed)
        results, arguments, _held = self.plan(tensors)
        kernel = getattr(_backends.load_extension(), self.kernel)
        kernel(self.code, torch.get_num_threads(), *arguments)
        return self.finish(tensors, results)


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
        tensor = tensors[arguments.index]
        if tensor is None:
            return (0, (0, 0, 0)) if arguments.what == What.ROWS else 0
        if arguments.what == What.STRIDES:
            pairs = zip(tensor.shape, tensor.stride(), strict=True)
            return tuple(0 if size == 1 else step for size, step in pairs)
        start = address(tensor)
        return (start, tensor.stride()[:3]) if arguments.what == What.ROWS else start
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(_filled(each, tensors) for each in arguments)
    return arguments
