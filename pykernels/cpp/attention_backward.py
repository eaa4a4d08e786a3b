"""Launches csrc/ops/attention.cpp on an output and log-sum-exp from outside."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from pykernels.cpp import Pass, attention, make_pass, planned, renumbered, these

#: Where the tensors and results of `attention.backward_plan` stand here; the seed and the sums of
#: the mask's gradient are none.
_ORDER = (1, 2, 3, 6, 7, 8, 10, 4, 5, 0, 9, 11, 12, 13, 14, 15)

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
    needs = (True, True, True, mask_grad, sinks is not None, False, False)
    options |= {"needs": needs, "whole": False}
    given = (q, k, v, attn_mask, sinks, alibi_slopes, None)
    if mask_grad:
        backward = attention.attention_bwd_pass(*given, **options)
        return backward._replace(run=functools.partial(_with_mask, backward.run))
    results, arguments = attention.backward_plan(*given, **options)
    arguments = renumbered(arguments, _ORDER)
    returns = these(12, 13, 14, None, 15), these(*range(10))
    made = make_pass("attention_backward", q, 12, results, arguments, returns)
    return attention.widened(made, q, alibi_slopes, 8)


def _with_mask(backward: Any, tensors: tuple[Any, ...]) -> tuple[Any, Any]:
    """What the pass returns, by one of attention."""
    dout, q, k, v, out, lse, attn_mask, sinks, alibi_slopes, dlse = tensors
    given = (q, k, v, attn_mask, sinks, alibi_slopes, None, out, lse, dout, dlse)
    return backward(given)[:5], tensors
