"""Launches csrc/ops/attention.cpp on an output and log-sum-exp from outside."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pykernels.cpp import attention

DTYPES = attention.DTYPES
FEATURES = attention.FEATURES - {"dropout"}


def attention_backward_fwd(
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
    **options: Any,
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """See `pykernels._backends` for the contract."""
    tensors = (q, k, v, attn_mask, sinks, alibi_slopes, None)
    # A weight is exp((score - top) unit) inverse, as AttentionRows of csrc/ops/attention.h has it.
    top = (lse / attention.unit(*tensors, **options)).masked_fill(lse == -math.inf, math.inf)
    saved = (*tensors, out, torch.stack([top, torch.ones_like(top)]))
    needs = (True, True, True, mask_grad, sinks is not None, False, False)
    found = attention.attention_bwd(saved, (dout, dlse), needs=needs, **options)
    return found[:5], (dout, q, k, v, out, lse, attn_mask, sinks, alibi_slopes, dlse)
