"""Launches csrc/ops/attention.cpp on an output and log-sum-exp from outside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pykernels.cpp import Pass, attention, planned

DTYPES = attention.DTYPES
FEATURES = attention.FEATURES - {"dropout"}


def attention_backward_fwd(
    *tensors: Any, keep: bool = True, **options: Any
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """See `pykernels._backends` for the contract."""
    found: tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]
    found = attention_backward_fwd_pass(*tensors, keep=keep, **options).run(tensors)
    return found


@planned
def attention_backward_fwd_pass(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dlse: Tensor | None,
    *,
    mask_grad: bool = False,
    keep: bool = True,
    skip: tuple[int, ...] = (),
    **options: Any,
) -> Pass:
    """See `pykernels._backends` for the contract."""
    given = (q, k, v, attn_mask, sinks, alibi_slopes, None)
    needs = (True, True, True, mask_grad, sinks is not None, False, False)
    backward = attention.attention_bwd_pass(*given, out, lse, needs=needs, whole=False, **options)

    def run(tensors: tuple[Any, ...]) -> tuple[Any, Any]:
        dout, q, k, v, out, lse, attn_mask, sinks, alibi_slopes, dlse = tensors
        given = (q, k, v, attn_mask, sinks, alibi_slopes, None, out, lse, dout, dlse)
        return backward.run(given)[:5], tensors

    return backward._replace(run=run)
