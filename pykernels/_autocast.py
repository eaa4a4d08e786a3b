"""What torch.autocast means for the ops here: who casts, and where it stays out."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_NOTHING = contextlib.nullcontext()  # a new one costs as much as a small step


def on(device: torch.device) -> bool:
    """Whether autocast is on for `device`."""
    if not torch._C._is_any_autocast_enabled():  # making a device's name takes longer
        return False
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # there is none on meta


def cast(*tensors: Any) -> list[Any]:
    """The tensors in the dtype that torch.autocast, where it is on, gives to a layer of torch.nn.

    Double is left alone, as autocast leaves it, and so is what is no floating tensor.
    """
    if not torch._C._is_any_autocast_enabled():
        return list(tensors)

    to: dict[str, torch.dtype | None] = {}  # by the device, as to ask takes long

    def one(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        device = "cpu" if tensor.is_cpu else tensor.device.type
        if device not in to:
            to[device] = torch.get_autocast_dtype(device) if on(tensor.device) else None
        dtype = to[device]
        if dtype is None or tensor.dtype in (dtype, torch.float64):
            return tensor
        return tensor.to(dtype)

    return [one(tensor) for tensor in tensors]


def carried(first: Any, *states: Tensor) -> tuple[Tensor, ...]:
    """States in the dtype of the first one, or of the input in its place.

    So torch's layers return them under autocast on the CPU, where they have no kernel of their own.
    """
    if not torch._C._is_any_autocast_enabled() or not first.is_cpu or not on(first.device):
        return states
    return tuple(state.to(first.dtype) for state in states)


def disabled(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context without autocast: an op computes in the dtype of what it was given."""
    return torch.autocast(device.type, enabled=False) if on(device) else _NOTHING
