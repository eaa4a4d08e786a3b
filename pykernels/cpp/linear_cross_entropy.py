"""Launches csrc/ops/linear_cross_entropy.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import address, contiguous

DTYPES = frozenset(cpp.DTYPES)
FEATURES: frozenset[str] = frozenset()

Maybe = Tensor | None


def linear_cross_entropy_fwd(
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
    keep: bool = True,
    ahead: Any = None,
) -> tuple[tuple[Maybe, ...], tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract, and for `ahead` the op's own module."""
    inputs = (x, weight, target, bias, class_weight)
    call = _Call(inputs, ignore_index, reduction, label_smoothing, z_loss)
    (softmax,) = linear_cross_entropy_extras(x)
    rows, lse = call.per_row(), call.per_row()
    argmax = torch.empty_like(target) if return_argmax else None
    if ahead is None:
        call.run(softmax, known=False, outputs=(rows, lse, argmax))
    else:
        ahead.gradients = call.gradients_of_one(softmax, ahead.needs, (rows, lse, argmax))
    loss = rows.sum() / call.divisor if reduction == "mean" else rows
    if z_loss:
        squares = z_loss * lse.masked_fill(~call.counted, 0) ** 2
        loss = loss + (squares.sum() / call.count if reduction == "mean" else squares)
    loss = loss.sum() if reduction == "sum" else loss
    return (loss, lse if return_lse else None, argmax), (*inputs, softmax)


def linear_cross_entropy_extras(x: Tensor, *_: Maybe, **options: Any) -> tuple[Tensor]:
    """See `pykernels._backends` for the contract: two numbers a row that make its softmax."""
    return (x.new_empty(2, x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)),)


def linear_cross_entropy_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    *,
    needs: tuple[bool, ...],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    ahead: Any = None,
    **_: bool,
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract, and for `ahead` the op's own module."""
    *inputs, softmax = saved
    dloss, dlse, _ = grads
    call = _Call(inputs, ignore_index, reduction, label_smoothing, z_loss)
    if ahead is not None and dlse is None and dloss is not None:
        made = ahead.take() or call.gradients_of_one(call.per_row(2), ahead.needs)
        if dloss != 1:
            made = tuple(None if grad is None else grad.mul_(dloss) for grad in made)
    else:
        made = call.gradients(softmax, dloss, dlse, needs)
    dx, dw, db = (None if grad is None else grad.to(inputs[0].dtype) for grad in made)
    return dx, dw, None, db, None


class _Call:
    """What both passes make of the arguments; numbers are of the dtype of the arithmetic."""

    def __init__(
        self,
        inputs: Sequence[Maybe],
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        z_loss: float,
    ) -> None:
        x, weight, target, bias, class_weight = inputs
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.code = cpp.DTYPES[x.dtype]
        self.sizes = (*x.shape, len(weight))
        if class_weight is not None:
            class_weight = class_weight.to(self.dtype)
        self.inputs = [contiguous(t) for t in (x, weight, bias, target, class_weight)]
        self.ignore_index, self.mean = ignore_index, reduction == "mean"
        self.smoothing, self.z_loss = label_smoothing, z_loss
        self.counted = target != ignore_index
        self.count = self.divisor = self.counted.sum()
        self.total = float(len(weight))
        if class_weight is not None:
            self.total = class_weight.sum(dtype=torch.float64).item()
            self.divisor = class_weight[target[self.counted]].sum()

    def per_row(self, *lead: int) -> Tensor:
        """Room for a number, or several, for each row."""
        return torch.empty(*lead, self.sizes[0], dtype=self.dtype)

    def gradients_of_one(
        self,
        softmax: Tensor,
        needs: tuple[bool, ...],
        outputs: tuple[Maybe, ...] = (None, None, None),
    ) -> tuple[Maybe, ...]:
        """dx, dweight and dbias of the loss alone, where logits become gradients in one pass."""
        made = self._room(needs)
        one = torch.ones((), dtype=self.dtype)
        rate = torch.where(self.counted, one / self.divisor if self.mean else one, 0)
        z_rate = 2 * self.z_loss / max(1, self.count.item() if self.mean else 1)
        self.run(softmax, False, outputs, made, rate, None, z_rate)
        return made

    def gradients(
        self, softmax: Tensor, dloss: Maybe, dlse: Maybe, needs: tuple[bool, ...]
    ) -> tuple[Maybe, ...]:
        """dx, dweight and dbias from any upstream gradients and the softmax of forward."""
        made = self._room(needs)
        dloss = torch.zeros((), dtype=self.dtype) if dloss is None else dloss
        rate = torch.where(self.counted, dloss / self.divisor if self.mean else dloss, 0)
        if self.z_loss:
            lse = softmax[0] - softmax[1].log()
            share = torch.where(self.counted, dloss / self.count if self.mean else dloss, 0)
            squares = 2 * self.z_loss * share * lse
            dlse = squares if dlse is None else squares + dlse
        self.run(softmax, True, (None, None, None), made, rate, contiguous(dlse))
        return made

    def _room(self, needs: tuple[bool, ...]) -> tuple[Maybe, ...]:
        """Tensors for dx, dweight and dbias, where they are needed."""
        N, H, V = self.sizes
        wanted = zip((needs[0], needs[1], needs[3]), ((N, H), (V, H), (V,)), strict=True)
        fill = torch.empty if N else torch.zeros  # no row adds nothing to them
        return tuple(fill(shape, dtype=self.dtype) if need else None for need, shape in wanted)

    def run(
        self,
        softmax: Tensor,
        known: bool,
        outputs: tuple[Maybe, ...],
        gradients: tuple[Maybe, ...] = (None, None, None),
        rate: Maybe = None,
        dlse: Maybe = None,
        lse_rate: float = 0.0,
    ) -> None:
        """The kernel, on tensors in row-major order."""
        _backends.load_extension().linear_cross_entropy(
            self.code,
            torch.get_num_threads(),
            self.sizes,
            (self.total, self.smoothing, lse_rate),
            self.ignore_index,
            known,
            [address(t) for t in (*self.inputs, rate, dlse)],
            [address(t) for t in (*softmax, *outputs, *gradients)],
        )
