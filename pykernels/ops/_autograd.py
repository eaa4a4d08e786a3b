"""What the autograd Functions of all ops have in common."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pykernels import _autocast, _backends


def forward(
    ctx: Any,
    op: str,
    backend: ModuleType,
    options: dict[str, Any],
    tensors: tuple[Any, ...],
) -> Any:
    """Runs the backend's ``<op>_fwd`` and keeps on `ctx` what `backward` needs."""
    outputs, saved = run(backend, op, options, tensors, keep=True)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.backend, ctx.options = backend, options
    return outputs


def run(
    backend: ModuleType,
    op: str,
    options: dict[str, Any],
    tensors: tuple[Any, ...],
    *,
    keep: bool,
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The backend's ``<op>_fwd``: outputs, and what it saves for backward, if that is to `keep`."""
    compute = getattr(backend, f"{op}_fwd")
    with _autocast.disabled(tensors[0].device):
        return compute(*tensors, keep=keep, **options)


def backward(ctx: Any, op: str, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of what forward of the Function took: the backend, the options, the tensors.

    Where the gradient is to be differentiated again (``create_graph=True``) the reference's formula
    of it runs instead of a kernel, as autograd can differentiate that.
    """
    needs = ctx.needs_input_grad[2:]
    backend = _backends.module("reference", op) if torch.is_grad_enabled() else ctx.backend
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
    with _autocast.disabled(saved[0].device):
        found = getattr(backend, f"{op}_bwd")(saved, grads, needs=needs, **ctx.options)
    return None, None, *(grad if need else None for grad, need in zip(found, needs, strict=True))


def wanted(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call on these tensors must be recorded. Recording costs some microseconds."""
    if torch.is_grad_enabled():
        for t in tensors:  # no any(): a generator costs more than the rest
            if t is not None and t.requires_grad:
                return True
    return False
