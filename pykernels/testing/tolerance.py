"""The one tolerance rule.

    |actual - truth|  <=  2 |stock - truth|  +  ULPS ulp(dtype) max|truth|

`truth` is the reference in float64, `stock` what PyTorch itself computes at the same dtype on the
same input; |.| is the largest absolute difference over the tensor. No test or benchmark brings a
looser bound.

In float64 the truth's products are exact (`exact`), and |stock - truth| may be small by luck. There
`evaluate.floor` gives the error that stock torch makes in float32 on the same numbers, in units of
the dtype, and the larger of the two counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Twice the error of stock torch: another order of summation is free to round the other way.
STOCK_FACTOR = 2.0
# "A few ulp for scale": where stock torch is exact by luck, the last bits may still differ.
ULPS = 4.0


@dataclass(frozen=True)
class Measured:
    """Errors of one tensor against the truth; all are largest absolute differences."""

    error: float  # ours
    stock: float  # stock torch's
    limit: float  # what the rule allows
    scale: float  # max |truth|
    worst: tuple[int, ...]  # index of our largest error

    @property
    def ok(self) -> bool:
        return math.isfinite(self.stock) and self.error <= self.limit


def measure(
    actual: Tensor,
    truth: Tensor,
    stock: Tensor,
    dtype: torch.dtype | None = None,
    *,
    floor: float = 0.0,
) -> Measured:
    """Apply the rule; the arguments are those of `assert_close`.

    NaN anywhere in `actual`, or an infinity that the truth has not, counts as an infinite error.
    """
    dtype = dtype or actual.dtype
    truth = truth.detach().cpu().double()
    difference = _difference(actual.detach().cpu().double(), truth)
    finite = truth[torch.isfinite(truth)]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    error = difference.max().item() if difference.numel() else 0.0
    stock_difference = _difference(stock.detach().cpu().double(), truth)
    stock_error = stock_difference.max().item() if stock_difference.numel() else 0.0
    stock_error = max(stock_error, floor * scale)
    worst = ()
    if difference.numel():
        worst = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    limit = STOCK_FACTOR * stock_error + ULPS * torch.finfo(dtype).eps * scale
    return Measured(error, stock_error, limit, scale, worst)


def _difference(actual: Tensor, truth: Tensor) -> Tensor:
    """|actual - truth|; 0 where both are the same infinity, inf where one of them is NaN."""
    difference = (actual - truth).abs()
    return torch.where(actual == truth, 0.0, difference.nan_to_num(nan=math.inf, posinf=math.inf))


def assert_close(
    actual: Tensor,
    truth: Tensor,
    stock: Tensor,
    what: str = "result",
    dtype: torch.dtype | None = None,
    *,
    floor: float = 0.0,
) -> Measured:
    """Raise AssertionError, with the measured numbers, unless `actual` passes; else return them.

    Args:
        actual: the result under test.
        truth: the reference in float64, of the same shape.
        stock: stock torch's result at the same dtype, of the same shape.
        what: what the message calls the tensor.
        dtype: the dtype the computation ran at, default that of `actual`.
        floor: stock torch's error counts as this times max|truth| at least; `evaluate.floor`.
    """
    for name, other in (("truth", truth), ("stock torch", stock)):
        if actual.shape != other.shape:
            raise AssertionError(
                f"{what}: shape is {list(actual.shape)}, {name} has {list(other.shape)}"
            )
    measured = measure(actual, truth, stock, dtype, floor=floor)
    if not math.isfinite(measured.stock):
        raise AssertionError(
            f"{what}: stock torch is not finite where the truth is, so it bounds nothing"
        )
    if not measured.ok:
        at = measured.worst
        raise AssertionError(
            f"{what}: error {measured.error:.3e} exceeds {measured.limit:.3e} "
            f"= {STOCK_FACTOR:g} x {measured.stock:.3e} (stock torch) "
            f"+ {ULPS:g} ulp of {dtype or actual.dtype} x {measured.scale:.3e} (scale); "
            f"worst at {list(at)}: got {actual[at].item():.9g}, truth {truth[at].item():.9g}, "
            f"stock torch {stock[at].item():.9g}"
        )
    return measured
