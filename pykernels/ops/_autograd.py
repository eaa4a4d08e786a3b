"""Autograd over the calls of all ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import _backends


class Function(torch.autograd.Function):
    """Autograd over a `Call` and its tensors; differentiable twice."""

    @staticmethod
    def forward(ctx: Any, call: Any, *tensors: Tensor | None) -> tuple[Any, ...]:
        """Runs the forward pass and keeps what `backward` needs."""
        outputs: tuple[Any, ...]
        outputs, saved = call.forward(tensors)
        keep(ctx, call, saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of what `forward` took: the call, the tensors."""
        # The saved tensors once: activation checkpointing allows no second look.
        call, saved, needs = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[1:]
        try:
            return None, *call.backward(saved, grads, needs)
        except RuntimeError:
            if not mapped(grads):
                raise
        return None, *call.on(_backends.module("reference", call.op)).backward(saved, grads, needs)


def keep(ctx: Any, call: Any, saved: tuple[Tensor | None, ...]) -> None:
    """Keeps what `Function.backward` needs: the call and what its forward pass saved."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.call = call


def mapped(grads: tuple[Tensor | None, ...]) -> bool:
    """Whether vmap hides an axis of the upstream gradients of a call that it did not see.

    ``torch.autograd.grad(..., is_grads_batched=True)`` does so. They have no memory for a kernel,
    while torch sees through the reference's formula. To ask ahead would cost every call.
    """
    functorch = torch._C._functorch
    return any(
        functorch.is_legacy_batchedtensor(grad) or functorch.is_functorch_wrapped_tensor(grad)
        for grad in grads
        if grad is not None
    )


def wanted(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call on these tensors must be recorded. Recording costs some microseconds."""
    if torch.is_grad_enabled():
        for t in tensors:  # no any(): a generator costs more than the rest
            if t is not None and t.requires_grad:
                return True
    return False
