"""Launches csrc/ops/attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import address, contiguous, plain, rows

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset(
    {"alibi", "dropout", "large_head", "mask_grad", "sinks", "softcap", "v_head_dim", "window"}
)


#: The first and last j - i at which query i sees key j; None for no bound.
Band = tuple[int | None, int | None]

_NO_PACKING = (0, 0, 0, 0, 0, False)
NO_PAGES = (0, 0, 0)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    *,
    band: Band,
    scale: float,
    softcap: float = 0.0,
    diagonal: int = 0,
    dropout_p: float = 0.0,
    keep: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """See `pykernels._backends` for the contract."""
    B, N, S_q, _ = q.shape
    out = q.new_empty(B, N, S_q, v.shape[3])
    lse = q.new_empty(B, N, S_q, dtype=compute_dtype(q))
    row_stats = attention_extras(q)[0] if keep else None
    # The copies must outlive the call: their addresses alone reach it.
    _held, (*inputs, output) = rows(q, k, v, out)
    rule = Rule(q, k, attn_mask, sinks, alibi_slopes, seed)
    _backends.load_extension().attention_forward(
        cpp.DTYPES[q.dtype],
        torch.get_num_threads(),
        _sizes(q, k, v, band, diagonal),
        (scale, softcap, dropout_p),
        _NO_PACKING,
        rule.packed,
        inputs,
        NO_PAGES,
        output,
        address(lse),
        address(row_stats),
    )
    return (out, lse), (q, k, v, attn_mask, sinks, alibi_slopes, seed, out, row_stats)


def attention_extras(q: Tensor, *_: Tensor | None, **options: Any) -> tuple[Tensor]:
    """See `pykernels._backends` for the contract: what backward makes weights from."""
    return (q.new_empty(2, *q.shape[:3], dtype=compute_dtype(q)),)


def attention_bwd(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, Tensor | None],
    *,
    band: Band,
    scale: float,
    softcap: float = 0.0,
    diagonal: int = 0,
    dropout_p: float = 0.0,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """See `pykernels._backends` for the contract."""
    q, k, v, attn_mask, sinks, alibi_slopes, seed, out, row_stats = saved
    dout, dlse = grads
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = (
        t.new_empty(*t.shape) if need else None
        for t, need in zip((q, k, v), needs[:3], strict=True)
    )
    dsinks = sinks.new_empty(sinks.shape) if needs[4] else None
    sums = seen_sums = None
    if needs[3]:
        sums = row_stats.new_zeros(*attn_mask.shape[:3], k.shape[2])
        seen_sums = sums.expand(*q.shape[:3], k.shape[2])
    # The copies must outlive the call: their addresses alone reach it.
    _held, found = rows(q, k, v, out, dout, dq, dk, dv, seen_sums)
    rule = Rule(q, k, attn_mask, sinks, alibi_slopes, seed)
    dlse = contiguous(dlse)
    _backends.load_extension().attention_backward(
        cpp.DTYPES[q.dtype],
        torch.get_num_threads(),
        _sizes(q, k, v, band, diagonal),
        (scale, softcap, dropout_p),
        _NO_PACKING,
        rule.packed,
        found[:5],
        address(row_stats),
        address(dlse),
        found[5:8],
        found[8],
        address(dsinks),
    )
    if sums is not None:
        sums = sums.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    return dq, dk, dv, sums, dsinks, None, None


def unit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    *,
    band: Band,
    scale: float,
    softcap: float = 0.0,
    diagonal: int = 0,
) -> float:
    """What one unit of the scores that a call saves is worth: the scale, or 1."""
    rule = Rule(q, k, attn_mask, sinks, alibi_slopes, seed)
    found: float = _backends.load_extension().attention_unit(
        cpp.DTYPES[q.dtype],
        _sizes(q, k, v, band, diagonal),
        (scale, softcap, 0.0),
        rule.packed,
    )
    return found


class Rule:
    """What makes weights of scores, as the extension takes it, and the tensors it points to."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        seed: Tensor | None,
    ) -> None:
        mask = (0, 0, (0, 0, 0, 0))  # kind (0 none, 1 boolean, 2 additive), address, strides
        if attn_mask is not None:
            self.mask = plain(attn_mask)
            seen = self.mask.expand(*q.shape[:3], k.shape[2])
            mask = 1 if seen.dtype == torch.bool else 2, seen.data_ptr(), seen.stride()
        self.sinks, self.seed = contiguous(sinks), seed
        self.slopes, step = None, 0
        if alibi_slopes is not None:
            self.slopes = plain(alibi_slopes).to(compute_dtype(q)).contiguous()
            step = self.slopes.shape[-1] if self.slopes.dim() > 1 else 0
        slopes = address(self.slopes), step
        self.packed = mask, address(self.sinks), slopes, address(self.seed)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _sizes(q: Tensor, k: Tensor, v: Tensor, band: Band, diagonal: int) -> tuple[int, ...]:
    """B, N, N_kv, S_q, S_k, D, D_v, first, last, diagonal; no bound is one that hides nothing."""
    B, N, S_q, D = q.shape
    S_k = k.shape[2]
    first, last = band
    first = -S_q if first is None else max(first, -S_q)
    last = S_k if last is None else min(last, S_k)
    return B, N, k.shape[1], S_q, S_k, D, v.shape[3], first, last, diagonal
