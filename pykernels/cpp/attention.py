"""Launches csrc/ops/attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import address, contiguous, plain

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"large_head", "mask_grad", "sinks", "softcap", "v_head_dim", "window"})


#: The first and last j - i at which query i sees key j; None for no bound.
Band = tuple[int | None, int | None]


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None = None,
    *,
    band: Band,
    scale: float,
    softcap: float = 0.0,
    keep: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """See `pykernels._backends` for the contract."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    row_stats = lse.new_empty(2, *lse.shape)  # what backward makes weights from
    # The copies must outlive the call: their addresses alone reach it.
    rows = [_rows(t) for t in (q, k, v)]
    sizes = _sizes(q, k, v)
    mask = None if attn_mask is None else plain(attn_mask)
    _backends.load_extension().attention_forward(
        cpp.DTYPES[q.dtype],
        torch.get_num_threads(),
        sizes,
        _band(band, q, k),
        (scale, softcap),
        [_strided(t) for t in rows],
        _mask(mask, sizes),
        address(contiguous(sinks)),
        address(out),
        address(lse),
        address(row_stats),
    )
    return (out, lse), (q, k, v, attn_mask, sinks, out, row_stats)


def attention_bwd(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, Tensor | None],
    *,
    band: Band,
    scale: float,
    softcap: float = 0.0,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """See `pykernels._backends` for the contract."""
    q, k, v, attn_mask, sinks, out, row_stats = saved
    dout, dlse = grads
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = (
        t.new_empty(t.shape) if need else None for t, need in zip((q, k, v), needs[:3], strict=True)
    )
    dsinks = sinks.new_empty(sinks.shape) if needs[4] else None
    rows = [_rows(t) for t in (q, k, v, dout)]
    sizes = _sizes(q, k, v)
    mask = None if attn_mask is None else plain(attn_mask)
    sums, dmask = None, (0, (0, 0, 0))
    if needs[3]:
        sums = row_stats.new_zeros(*mask.shape[:3], k.shape[2])
        dmask = _strided(_expanded(sums, sizes))
    sinks, out, dlse = contiguous(sinks), contiguous(out), contiguous(dlse)
    _backends.load_extension().attention_backward(
        cpp.DTYPES[q.dtype],
        torch.get_num_threads(),
        sizes,
        _band(band, q, k),
        (scale, softcap),
        [_strided(t) for t in rows],
        _mask(mask, sizes),
        address(sinks),
        [address(t) for t in (out, row_stats, dlse)],
        [address(t) for t in (dq, dk, dv)],
        dmask,
        address(dsinks),
    )
    if sums is not None:
        sums = sums.sum_to_size(mask.shape).to(mask.dtype)
    return dq, dk, dv, sums, dsinks


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """B, N, N_kv, S_q, S_k, D, D_v."""
    B, N, S_q, D = q.shape
    return B, N, k.shape[1], S_q, k.shape[2], D, v.shape[3]


def _band(band: Band, q: Tensor, k: Tensor) -> tuple[int, int]:
    """The band in numbers, where a bound that is not there is one that hides nothing."""
    first, last = band
    S_q, S_k = q.shape[2], k.shape[2]
    return (
        -S_q if first is None else max(first, -S_q),
        S_k if last is None else min(last, S_k),
    )


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last axis contiguous, copied only if it is not."""
    tensor = plain(tensor)
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _strided(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Address, and strides of batch, head and row."""
    return tensor.data_ptr(), tensor.stride()[:3]


def _expanded(mask: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The view [B, N, S_q, S_k] of a mask, or of its gradient."""
    B, N, _, S_q, S_k = sizes[:5]
    return mask.expand(B, N, S_q, S_k)


def _mask(mask: Tensor | None, sizes: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """Kind (0 none, 1 boolean, 2 additive), address and strides."""
    if mask is None:
        return 0, 0, (0, 0, 0, 0)
    return 1 if mask.dtype == torch.bool else 2, mask.data_ptr(), _expanded(mask, sizes).stride()
