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


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of float64 matrices or batches of them, each element rounded about once."""
    K = a.shape[-1]
    if a.numel() == 0 or b.numel() == 0:
        return a @ b
    bits = (_MANTISSA - math.ceil(math.log2(K + 1))) // 2
    count = math.ceil(_MANTISSA / bits) + 1
    left, right = _slices(a, -1, bits, count), _slices(b, -2, bits, count)
    pairs = [(i, j) for i in range(count) for j in range(count) if i + j < count]
    products = [left[i] @ right[j] for i, j in sorted(pairs, key=sum, reverse=True)]
    # what is not finite has no slices, and spreads as in any product
    rough = a @ b
    exact = functools.reduce(torch.add, products)
    return torch.where(rough.isfinite() & exact.isfinite(), exact, rough)


def _slices(x: Tensor, dim: int, bits: int, count: int) -> list[Tensor]:
    """`x` as a sum of `count` tensors of `bits` bits each below the largest along `dim`."""
    parts = []
    for _ in range(count):
        _, exponent = torch.frexp(x.abs().amax(dim, keepdim=True))
        unit = torch.ldexp(torch.ones_like(x), (exponent - bits).expand_as(x))
        part = (x / unit).round() * unit
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
