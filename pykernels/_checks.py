"""The only place that words an input error.

Every message reads ``op: `argument` must be ..., got ...`` and is raised before any work is done.
Sizes and values raise ValueError; kinds of object, dtypes and devices raise TypeError, except that
a tensor on the wrong device is a ValueError, as it is the right kind of thing in the wrong place.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

_STRIDED = torch.strided
# The plain ones first: of an abstract class Python asks more.
_INTEGERS = (int, torch.SymInt, Integral)
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt, Real)


def fail(op: str, name: str, must: str, got: object) -> NoReturn:
    """Raises the ValueError ``op: `name` must be <must>, got <got>``."""
    raise ValueError(f"{op}: `{name}` must be {must}, got {got}")


def tensor(op: str, name: str, value: Any, like: Tensor | None = None) -> None:
    """`value` is a strided tensor; of the dtype and on the device of `like` if that is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: `{name}` must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{op}: `{name}` must be a dense tensor, got {kind}")
    if like is not None:
        if value.dtype != like.dtype:
            raise TypeError(
                f"{op}: `{name}` must have the dtype of the input, {like.dtype}, got {value.dtype}"
            )
        device(op, name, value, like)


def alike(op: str, like: Tensor, names: Sequence[str], values: Sequence[Any]) -> None:
    """Each of `values` is None or what `tensor` asks for: the same checks, in less time."""
    dtype, place = like.dtype, like.device
    for i, value in enumerate(values):
        if value is None or value is like:
            continue
        if not (
            isinstance(value, Tensor)
            and value.dtype is dtype
            and value.device == place
            and value.layout is _STRIDED
            and not value.is_nested
        ):
            tensor(op, names[i], value, like)


def device(op: str, name: str, value: Tensor, like: Tensor) -> None:
    """`value` is where `like` is."""
    if value.device != like.device:
        fail(op, name, f"on the device of the input, {like.device}", value.device)


def floating(op: str, name: str, value: Tensor) -> None:
    """`value` has a floating-point dtype."""
    if not value.is_floating_point():
        raise TypeError(f"{op}: `{name}` must have a floating-point dtype, got {value.dtype}")


def rank(op: str, name: str, value: Tensor, axes: str, *others: str) -> None:
    """`value` has as many dimensions as `axes` ("T, B, I") or one of the `others` names."""
    if value.dim() == axes.count(",") + 1:
        return
    choices = (axes, *others)
    if all(value.dim() != len(names.split(", ")) for names in choices):
        must = " or ".join(f"[{names}]" for names in choices)
        fail(op, name, must, f"{value.dim()} dimensions: {list(value.shape)}")


def shape(op: str, name: str, value: Tensor, axes: str, sizes: Sequence[int]) -> None:
    """`value` has exactly the sizes that `axes` ("3H, H") names."""
    if value.shape != tuple(sizes):
        fail(op, name, f"[{axes}] = {list(sizes)}", list(value.shape))


def broadcastable(op: str, name: str, value: Tensor, axes: str, sizes: Sequence[int]) -> None:
    """`value` broadcasts to the sizes that `axes` names."""
    given = value.shape
    if len(given) > len(sizes) or any(
        have != 1 and have != want  # not `in`, which torch.compile does not ask of unknown sizes
        for have, want in zip(reversed(given), reversed(sizes), strict=False)
    ):
        fail(op, name, f"broadcastable to [{axes}] = {list(sizes)}", list(given))


def positive(op: str, name: str, value: int) -> None:
    """`value` is at least one."""
    if value < 1:
        fail(op, name, "at least 1", value)


def module(op: str, name: str, value: Any) -> None:
    """`value` is a module."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{op}: `{name}` must be a torch.nn.Module, got {type(value).__name__}")


def number(op: str, name: str, value: Any) -> None:
    """`value` is a number, be it of NumPy or of a trace, and no bool."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{op}: `{name}` must be a number, got {type(value).__name__}")


def integer(op: str, name: str, value: Any) -> None:
    """`value` is an integer, be it of NumPy or of a trace, and no bool."""
    if not is_integer(value):
        raise TypeError(f"{op}: `{name}` must be an integer, got {type(value).__name__}")


def is_integer(value: Any) -> bool:
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def flags(op: str, **values: Any) -> None:
    """Each of `values`, by its name, is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: `{name}` must be True or False, got {type(value).__name__}")


def pair(op: str, name: str, value: Any, of: str) -> None:
    """`value` is a tuple or list of the two tensors that `of` names."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = f"{len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"{op}: `{name}` must be a pair {of} of Tensors, got {got}")


def lengths(op: str, value: Any, T: int, B: int) -> tuple[int, ...]:
    """`value` is B lengths of sequences from 1 to T; they come back as ints."""
    return lengths_between(op, _integers(op, "lengths", value, "B"), T, B)


def lengths_between(op: str, found: tuple[int, ...], T: int, B: int) -> tuple[int, ...]:
    """`found` are B lengths of sequences from 1 to T."""
    if len(found) != B:
        fail(op, "lengths", f"[B] = [{B}]", [len(found)])
    for length in found:
        if not 1 <= length <= T:
            fail(op, "lengths", f"between 1 and T = {T}", length)
    return found


def batch_sizes(op: str, value: Any, N: int) -> tuple[int, ...]:
    """`value` says how many of N packed rows each step has; the numbers come back as ints."""
    found = _integers(op, "batch_sizes", value, "T")
    if not found:
        fail(op, "batch_sizes", "of at least 1 step", list(found))
    if list(found) != sorted(found, reverse=True):
        at = next(t for t in range(1, len(found)) if found[t] > found[t - 1])
        fail(op, "batch_sizes", "non-increasing", f"{found[at]} after {found[at - 1]}")
    positive(op, "batch_sizes", found[-1])
    if sum(found) != N:
        fail(op, "batch_sizes", f"of sum N = {N}, the rows of the input", sum(found))
    return found


def _integers(op: str, name: str, value: Any, axes: str) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        integers(op, name, value, axes)
        return tuple(value.tolist())
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{op}: `{name}` must be a Tensor or list, got {type(value).__name__}")
    try:
        return tuple(map(operator.index, value))
    except TypeError as error:
        raise TypeError(f"{op}: `{name}` must hold integers alone: {error}") from None


def integers(op: str, name: str, value: Tensor, axes: str) -> None:
    """`value` is a tensor of numbers that are read on the host."""
    tensor(op, name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: `{name}` must have dtype torch.int64, got {value.dtype}")
    if value.device.type != "cpu":
        fail(op, name, "on the cpu", value.device)
    rank(op, name, value, axes)


def classes(op: str, name: str, value: Tensor, V: int, ignored: int) -> None:
    """`value` holds numbers of classes, or `ignored`; on the meta device it holds nothing.

    Nothing is said of values on a GPU, for which the host would have to wait: the Triton kernels
    assert them there, and torch's indexing does for the reference.
    """
    if value.is_cuda or value.is_meta or value.numel() == 0:
        return
    if _between(value, V):  # the usual case, and quicker than to look for what is ignored
        return
    counted = value.masked_fill(value == ignored, 0)
    if not _between(counted, V):
        at = ((counted < 0) | (counted >= V)).nonzero()[0].tolist()
        must = f"from 0 to V - 1 = {V - 1} or ignore_index = {ignored}"
        fail(op, name, must, f"{value[tuple(at)].item()} at {at}")


def _between(value: Tensor, end: int) -> bool:
    """Whether all numbers are from 0 to end - 1."""
    low, high = torch.aminmax(value)
    return low.item() >= 0 and high.item() < end


def choice(op: str, name: str, value: Any, choices: Collection[str]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        fail(op, name, "one of " + ", ".join(map(repr, choices)), repr(value))
