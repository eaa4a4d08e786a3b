"""The only place that words an input error.

Every message reads ``op: `argument` must be ..., got ...`` and is raised before any work is done.
Sizes and values raise ValueError; kinds of object, dtypes and devices raise TypeError, except that
a tensor on the wrong device is a ValueError, as it is the right kind of thing in the wrong place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


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


def not_packed(op: str, name: str, value: Any) -> None:
    """`value` is no PackedSequence, which no kernel serves yet."""
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        raise TypeError(
            f"{op}: `{name}` must be a Tensor, got PackedSequence; pad it with "
            f"torch.nn.utils.rnn.pad_packed_sequence, or use torch.nn.{op}"
        )


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
        have not in (1, want) for have, want in zip(reversed(given), reversed(sizes), strict=False)
    ):
        fail(op, name, f"broadcastable to [{axes}] = {list(sizes)}", list(given))


def positive(op: str, name: str, value: int) -> None:
    """`value` is at least one."""
    if value < 1:
        fail(op, name, "at least 1", value)


def number(op: str, name: str, value: Any) -> None:
    """`value` is a plain number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: `{name}` must be a number, got {type(value).__name__}")


def choice(op: str, name: str, value: Any, choices: Collection[str]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        fail(op, name, "one of " + ", ".join(map(repr, choices)), repr(value))
