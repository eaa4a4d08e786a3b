"""Products of float64 matrices to the last bit, for a truth that float64 results are held to.

A float64 product errs as much as the results it would judge, and as stock torch's, which runs on
the same library: it would pass stock torch and fail a better kernel. So each factor is cut into
slices of so few bits that the products of slices are exact (K. Ozaki et al., "Error-free
transformations of matrix multiplication", 2012), and these are added from the smallest up.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MANTISSA = 53
_SLICES = 8  # at most: a sum over K of products of each with each is exact too


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of float64 matrices or batches of them, each element rounded about once."""
    if a.numel() == 0 or b.numel() == 0:
        return a @ b
    bits = (_MANTISSA - math.ceil(math.log2(_SLICES * a.shape[-1]))) // 2
    count = math.ceil(_MANTISSA / bits) + 1
    # [first .. last] of a and [last .. first] of b: slices whose numbers add up to one size meet
    left = torch.cat(_slices(a, -1, bits, count), -1)
    right = torch.cat(_slices(b, -2, bits, count)[::-1], -2)
    ends = [i * a.shape[-1] for i in range(count, 0, -1)]
    exact = functools.reduce(torch.add, [left[..., :i] @ right[..., -i:, :] for i in ends])
    finite = exact.isfinite()
    # what is not finite has no slices, and spreads as in any product
    return exact if finite.all() else torch.where(finite, exact, a @ b)


def _slices(x: Tensor, dim: int, bits: int, count: int) -> list[Tensor]:
    """`x` as a sum of `count` tensors, `bits` bits each from the largest along `dim` down."""
    low, high = x.aminmax(dim=dim, keepdim=True)
    largest = torch.maximum(high, -low).clamp_min(torch.finfo(x.dtype).tiny)
    power = largest / torch.frexp(largest).mantissa  # of two
    parts = []
    for i in range(1, count + 1):
        shift = power * (1.5 * 2.0 ** (_MANTISSA - 1 - i * bits))  # whose last bit is the slice's
        part = x + shift - shift
        parts.append(part)
        x = x - part
    return parts


class ExactProducts(TorchDispatchMode):
    """Inside, every product of float64 matrices is `matmul`'s."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm") and args[0].dtype == torch.float64:
            return matmul(*args)
        if name == "addmm" and args[0].dtype == torch.float64 and not kwargs:
            return args[0] + matmul(*args[1:])
        return func(*args, **(kwargs or {}))
