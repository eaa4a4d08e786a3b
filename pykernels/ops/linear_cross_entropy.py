"""A linear layer and its cross-entropy in one: `linear_cross_entropy`."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pykernels import _autocast, _backends, _checks
from pykernels.ops import _autograd

REDUCTIONS = ("mean", "sum", "none")


@dataclass
class Ahead:
    """The gradients that a forward pass may make, as it has the logits, for its backward pass.

    They are those of a loss whose upstream gradient is 1, and belong to whoever takes them: a
    second backward pass finds none, and computes them again.
    """

    needs: tuple[bool, ...]
    gradients: tuple[Tensor | None, ...] | None = None

    def take(self) -> tuple[Tensor | None, ...] | None:
        taken, self.gradients = self.gradients, None
        return taken


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Autograd over one backend's ``linear_cross_entropy_fwd`` and ``_bwd``; differentiable twice.

    A loss that is one number, and the only output with a gradient, has its gradients made in the
    forward pass, where the logits are.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: ModuleType, options: dict[str, Any], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if options["reduction"] != "none" and not options["return_lse"]:
            options = options | {"ahead": Ahead(ctx.needs_input_grad[2:])}
        outputs = _autograd.forward(ctx, "linear_cross_entropy", backend, options, tensors)
        if outputs[2] is not None:  # argmax
            ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _autograd.backward(ctx, "linear_cross_entropy", grads)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: bool = False,
    return_argmax: bool = False,
    backend: str | None = None,
) -> Any:
    r"""The cross-entropy of a linear layer's outputs, which are never all in memory.

    .. math::
        z_i = W x_i + b, \quad \log p_{ic} = z_{ic} - \log \sum_k e^{z_{ik}}, \quad
        l_i = -(1 - s)\, w_{t_i} \log p_{i t_i} - \frac{s}{V} \sum_c w_c \log p_{ic}

    It equals ``F.cross_entropy(F.linear(x, weight, bias), target, class_weight, ...)`` with label
    smoothing s (C. Szegedy et al., "Rethinking the Inception architecture for computer vision",
    2016); `z_loss` adds a multiple of the squared log-sum-exp (A. Chowdhery et al., "PaLM", 2022).
    The logits exist for a few rows at a time. Under "mean" and "sum" their gradients are made
    along with the loss, where a gradient is asked for, so that backward has only to scale them.

    Args:
        x: [..., H], any floating dtype.
        weight: W, [V, H].
        target: the classes t, [...] as x, int64, each from 0 to V - 1 or `ignore_index`.
        bias: [V], or None.
        class_weight: w, [V] of x's dtype; ones if None. It has no gradient.
        ignore_index: rows with this target have no loss and no gradient, and the mean is not over
            them.
        reduction: "mean", divided by the sum of the w_t that count, "sum" or "none".
        label_smoothing: s, from 0 to 1.
        z_loss: adds ``z_loss * lse**2`` to each row's loss; its mean is over the rows that count,
            whatever their weights.
        return_lse: return the log-sum-exp of each row's logits too, in float32 (float64 for
            float64). As it is differentiable, backward then computes the logits anew.
        return_argmax: return the class of the largest logit of each row too, int64.
        backend: "cpp", "triton" or "reference"; None takes the fastest that serves the call.

    Returns:
        The loss in x's dtype (in float32 under autocast): a number, or [...] with reduction
        "none". With `return_lse` and `return_argmax` a tuple ``(loss, lse, argmax)`` of those asked
        for, the others [...]. The mean over no row is NaN, as torch's.

    Raises:
        TypeError: something is no tensor, dtypes differ, are not floating or, of target, not int64.
        ValueError: a rank, size, device, reduction or backend is wrong; H or V is zero; a target is
            out of range; label_smoothing is not from 0 to 1, or z_loss is negative; class_weight
            requires a gradient.
    """
    op = "linear_cross_entropy"
    x, weight, bias = _autocast.cast(x, weight, bias)
    _checks.tensor(op, "x", x)
    _checks.floating(op, "x", x)
    if x.dim() == 0:
        _checks.fail(op, "x", "[..., H]", "0 dimensions: []")
    _checks.tensor(op, "weight", weight, x)
    if bias is not None:
        _checks.tensor(op, "bias", bias, x)
    loss_dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):  # it has torch's cross_entropy take float32
        loss_dtype = torch.promote_types(x.dtype, torch.float32)
    if class_weight is not None:
        _checks.tensor(op, "class_weight", class_weight)
        _checks.device(op, "class_weight", class_weight, x)
        if class_weight.dtype not in (x.dtype, loss_dtype):
            _checks.tensor(op, "class_weight", class_weight, x)
    _checks.rank(op, "weight", weight, "V, H")
    H, V = x.shape[-1], weight.shape[0]
    _checks.positive(op, "hidden size H", H)
    _checks.positive(op, "vocabulary size V", V)
    _checks.shape(op, "weight", weight, "V, H", (V, H))
    for name, value in (("bias", bias), ("class_weight", class_weight)):
        if value is not None:
            _checks.shape(op, name, value, "V", (V,))
    if class_weight is not None and class_weight.requires_grad:
        _checks.fail(op, "class_weight", "without gradient", "requires_grad=True")
    _checks.tensor(op, "target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: `target` must have dtype torch.int64, got {target.dtype}")
    _checks.device(op, "target", target, x)
    _checks.shape(op, "target", target, "...", x.shape[:-1])
    _checks.choice(op, "reduction", reduction, REDUCTIONS)
    _checks.number(op, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        _checks.fail(op, "label_smoothing", "between 0 and 1", label_smoothing)
    _checks.number(op, "z_loss", z_loss)
    if not 0 <= z_loss < float("inf"):
        _checks.fail(op, "z_loss", "at least 0 and finite", z_loss)
    _checks.integer(op, "ignore_index", ignore_index)
    _checks.classes(op, "target", target, V, ignore_index)
    chosen = _backends.select(op, backend, x.device, x.dtype)
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": float(label_smoothing),
        "z_loss": float(z_loss),
        "return_lse": bool(return_lse),
        "return_argmax": bool(return_argmax),
    }
    lead = x.shape[:-1]
    tensors = (x.reshape(-1, H), weight, target.reshape(-1), bias, class_weight)
    loss, lse, argmax = _autograd.apply(LinearCrossEntropyFunction, op, chosen, options, tensors)
    loss = loss.to(loss_dtype)
    outputs = (
        loss.reshape(lead) if reduction == "none" else loss,
        *((lse.reshape(lead),) if return_lse else ()),
        *((argmax.reshape(lead),) if return_argmax else ()),
    )
    return outputs if len(outputs) > 1 else outputs[0]
