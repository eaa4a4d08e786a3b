"""Autograd over the calls of all ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Function(torch.autograd.Function):
    """Autograd over a `Call` and its tensors; differentiable twice."""

    @staticmethod
    def forward(ctx: Any, call: Any, *tensors: Tensor | None) -> tuple[Any, ...]:
        """Runs the forward pass and keeps what `backward` needs."""
        outputs: tuple[Any, ...]
        outputs, saved = call.forward(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.call = call
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of what `forward` took."""
        # The saved tensors once: activation checkpointing allows no second look.
        return None, *ctx.call.backward(ctx.saved_tensors, grads, ctx.needs_input_grad[1:])


def wanted(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call on these tensors must be recorded. Recording costs some microseconds."""
    if torch.is_grad_enabled():
        for t in tensors:  # no any(): a generator costs more than the rest
            if t is not None and t.requires_grad:
                return True
    return False
