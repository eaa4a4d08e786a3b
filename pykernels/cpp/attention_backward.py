"""Launches csrc/ops/attention.cpp on an output and log-sum-exp from outside."""

from __future__ import annotations

import math
from typing import Any

import torch
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
    # A weight is exp((score - top) unit) inverse, as AttentionRows of csrc/ops/attention.h has it.
    given = (q, k, v, attn_mask, sinks, alibi_slopes, None)
    unit = attention.unit(*given, **options)
    needs = (True, True, True, mask_grad, sinks is not None, False, False)
    backward = attention.attention_bwd_pass(*given, out, None, needs=needs, whole=False, **options)

    def run(tensors: tuple[Any, ...]) -> tuple[Any, Any]:
        dout, q, k, v, out, lse, attn_mask, sinks, alibi_slopes, dlse = tensors
        top = (lse / unit).masked_fill(lse == -math.inf, math.inf)
        rows = torch.stack([top, torch.ones_like(top)])
        given = (q, k, v, attn_mask, sinks, alibi_slopes, None)
        return backward.run((*given, out, rows, dout, dlse))[:5], tensors

    return backward._replace(run=run)
