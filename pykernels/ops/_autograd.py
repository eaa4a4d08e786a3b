"""What the autograd Functions of all ops have in common."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pykernels import _autocast, _backends
from pykernels.ops import _library


def apply(
    function: type[torch.autograd.Function],
    op: str,
    backend: ModuleType,
    options: dict[str, Any],
    tensors: tuple[Any, ...],
    unrecorded: Callable[[], dict[str, Any]] | None = None,
    check: Callable[..., None] | None = None,
) -> Any:
    """The outputs of `op` on `backend`, through its Function where autograd must see the call.

    `unrecorded` makes further options for a call that it need not see; `check` checks the values of
    the tensors. Where a compiler or a transform looks on, it sees the operator (`_library`), which
    checks them itself.
    """
    if _library.looked_at(backend):
        return _library.call(op, backend, options, tensors, wanted(tensors))
    if check is not None:
        check(*tensors, **options)
    if wanted(tensors):
        return function.apply(backend, options, *tensors)
    if unrecorded is not None:
        options = options | unrecorded()
    return run(backend, op, options, tensors, keep=False)[0]


def forward(
    ctx: Any,
    op: str,
    backend: ModuleType,
    options: dict[str, Any],
    tensors: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Runs the backend's ``<op>_fwd`` and keeps on `ctx` what `backward` needs."""
    outputs: tuple[Any, ...]
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
        found: tuple[Any, tuple[Tensor | None, ...]] = compute(*tensors, keep=keep, **options)
        return found


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
