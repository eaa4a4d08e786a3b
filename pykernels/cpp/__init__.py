"""Launchers of the C++ kernels: allocate the outputs, pass pointers and sizes.

The kernels read and write memory that torch owns; they know nothing of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels import _backends

#: The codes by which csrc/bind.h knows the dtypes that every kernel serves.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def address(tensor: Tensor | None) -> int:
    """Where the first element is; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor in row-major order, copied only if it is not; None stays None."""
    return None if tensor is None else plain(tensor).contiguous()


def addresses(tensors: tuple[Tensor | None, ...]) -> tuple[Sequence[Tensor | None], Sequence[int]]:
    """Contiguous versions, which must outlive the call, and where they are."""
    found = _readers()[0](tensors)
    if found is not None:
        return tensors, found
    dense = [contiguous(t) for t in tensors]
    return dense, [address(t) for t in dense]


#: Address, and strides of batch, head and row.
Rows = tuple[int, tuple[int, int, int]]


def rows(*tensors: Tensor | None) -> tuple[Sequence[Tensor | None], Sequence[Rows]]:
    """Of [B, N, S, D]: versions with a contiguous last axis, which must outlive the call, and where
    they are; zeros for None.
    """
    found = _readers()[1](tensors)
    if found is not None:
        return tensors, found
    dense = [None if t is None else dense_rows(t) for t in tensors]
    return dense, [(0, (0, 0, 0)) if t is None else (t.data_ptr(), t.stride()[:3]) for t in dense]


@functools.cache
def _readers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What finds memory in C (csrc/memory.cpp); it finds none with a torch before 2.10."""
    return _backends.load_extension().memory_readers(Tensor) or (lambda _: None, lambda _: None)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last axis contiguous, copied only if it is not."""
    tensor = plain(tensor)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def plain(tensor: Tensor) -> Tensor:
    """The tensor with the signs that its memory has: torch may keep a minus to itself."""
    return tensor.resolve_neg()
