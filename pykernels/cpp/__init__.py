"""Launchers of the C++ kernels: allocate the outputs, pass pointers and sizes.

The kernels read and write memory that torch owns; they know nothing of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The codes by which csrc/bind.h knows the dtypes that every kernel serves.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def address(tensor: Tensor | None) -> int:
    """Where the first element is; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor in row-major order, copied only if it is not; None stays None."""
    return None if tensor is None else plain(tensor).contiguous()


def plain(tensor: Tensor) -> Tensor:
    """The tensor with the signs that its memory has: torch may keep a minus to itself."""
    return tensor.resolve_neg()
