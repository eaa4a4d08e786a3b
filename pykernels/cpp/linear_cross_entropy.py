"""Launches csrc/ops/linear_cross_entropy.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import Maybe, Pass, Result, address, at, contiguous, make_pass, planned, these

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ahead"})
CHECKS_VALUES = True

#: The codes by which C++ knows them.
_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy_fwd(*tensors: Any, keep: bool = True, **options: Any) -> tuple[Any, Any]:
    """See `pykernels._backends` for the contract, and for `ahead` the op's Function."""
    found: tuple[Any, Any]
    found = linear_cross_entropy_fwd_pass(*tensors, keep=keep, **options).run(tensors)
    return found


@planned
def linear_cross_entropy_fwd_pass(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Maybe,
    class_weight: Maybe,
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    return_lse: bool,
    return_argmax: bool,
    keep: bool,
    skip: tuple[int, ...] = (),
    ahead: tuple[bool, ...] = (),
) -> Pass:
    """See `pykernels._backends` for the contract."""
    (N, H), V, dtype = x.shape, len(weight), _compute_dtype(x)
    results = [
        Result((N,) if reduction == "none" else (), dtype),
        Result((N,), dtype) if return_lse else None,
        Result((N,), torch.int64) if return_argmax else None,
        _softmax(x),
        *_gradients(x, weight, ahead or (False,) * 5),
    ]
    # the tensors; loss, lse, argmax, softmax, dx, dweight, dbias
    sizes, code = (N, H, V), _REDUCTIONS.index(reduction)
    memory = at(*range(5)), at(*range(5, 12))
    arguments = (sizes, label_smoothing, z_loss, ignore_index, code, *memory)
    returns = these(5, 6, 7), these(*range(5), 8, *((9, 10, 11) if ahead else ()))
    made = make_pass("linear_cross_entropy_forward", x, 5, results, arguments, returns)
    if class_weight is None or class_weight.dtype == dtype:
        return made
    return made._replace(run=lambda given: made.run((*given[:4], given[4].to(dtype))))


def linear_cross_entropy_scale(made: Sequence[Maybe], dloss: Tensor) -> None:
    """See `pykernels.ops.linear_cross_entropy.LinearCrossEntropyFunction`."""
    if dloss.item() != 1:
        for grad in made:
            if grad is not None:
                grad.mul_(dloss)


def linear_cross_entropy_extras(x: Tensor, *_: Maybe, **options: Any) -> tuple[Tensor]:
    """See `pykernels._backends` for the contract."""
    return (_softmax(x).like(x),)


def linear_cross_entropy_bwd(
    saved: tuple[Any, ...],
    grads: tuple[Maybe, ...],
    *,
    needs: tuple[bool, ...],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    **_: Any,
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    x, weight, target, bias, class_weight, softmax = saved
    dloss, dlse, _ = grads
    dtype = _compute_dtype(x)
    dloss = torch.zeros((), dtype=dtype) if dloss is None else dloss
    counted = target != ignore_index
    count = divisor = counted.sum() if reduction == "mean" else 1
    if class_weight is not None:
        class_weight = class_weight.to(dtype)
        divisor = class_weight[target[counted]].sum() if reduction == "mean" else 1
    rate = torch.where(counted, dloss / divisor, 0)
    if z_loss:
        lse = softmax[0] - softmax[1].log()
        squares = 2 * z_loss * torch.where(counted, dloss / count, 0) * lse
        dlse = squares if dlse is None else squares + dlse
    results = _gradients(x, weight, needs)
    fill = torch.empty if len(x) else torch.zeros  # no row adds nothing to them
    made = [None if r is None else fill(r.sizes, dtype=dtype) for r in results]
    # The copies must outlive the call: their addresses alone reach it.
    inputs = [contiguous(t) for t in (x, weight, target, bias, class_weight)]
    rates = [contiguous(rate), contiguous(dlse)]
    _backends.load_extension().linear_cross_entropy_backward(
        cpp.DTYPES[x.dtype],
        torch.get_num_threads(),
        (*x.shape, len(weight)),
        label_smoothing,
        ignore_index,
        [address(t) for t in inputs],
        address(softmax),
        [address(t) for t in rates],
        [address(t) for t in made],
    )
    dx, dw, db = (None if grad is None else grad.to(x.dtype) for grad in made)
    return dx, dw, None, db, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, of the outputs and of gradients that are not yet scaled."""
    return torch.promote_types(x.dtype, torch.float32)


def _softmax(x: Tensor) -> Result:
    """Two numbers a row that make its softmax."""
    return Result((2, x.shape[0]), _compute_dtype(x))


def _gradients(x: Tensor, weight: Tensor, needs: Sequence[bool]) -> list[Result | None]:
    """Those of x, weight and bias, which the kernel makes in the dtype of the arithmetic."""
    sizes = (tuple(x.shape), tuple(weight.shape), (len(weight),))
    wanted = zip(sizes, (needs[0], needs[1], needs[3]), strict=True)
    return [Result(shape, _compute_dtype(x)) if need else None for shape, need in wanted]
