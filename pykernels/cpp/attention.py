"""Launches csrc/ops/attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import cpp
from pykernels.cpp import (
    Pass,
    Result,
    address,
    at,
    contiguous,
    make_pass,
    plain,
    planned,
    rows,
    start,
    strides,
    these,
    without,
)

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset(
    {"alibi", "dropout", "large_head", "mask_grad", "sinks", "softcap", "v_head_dim", "window"}
)


#: The first and last j - i at which query i sees key j; None for no bound.
Band = tuple[int | None, int | None]

_NO_PACKING = (0, 0, 0, 0, 0, False)
NO_PAGES = (0, 0, 0)


def attention_fwd(*tensors: Any, keep: bool = True, **options: Any) -> tuple[Any, Any]:
    """See `pykernels._backends` for the contract."""
    found: tuple[Any, Any] = attention_fwd_pass(*tensors, keep=keep, **options).run(tensors)
    return found


@planned
def attention_fwd_pass(
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
    keep: bool,
    skip: tuple[int, ...] = (),
) -> Pass:
    """See `pykernels._backends` for the contract."""
    B, N, S_q, _ = q.shape
    dtype = compute_dtype(q)
    row_stats = _row_stats(q) if keep else None
    outputs = without(skip, Result((B, N, S_q, v.shape[3])), Result((B, N, S_q), dtype))
    # the tensors; out, lse, row_stats
    arguments = (
        _sizes(q, k, v, band, diagonal),
        (scale, softcap, dropout_p),
        _NO_PACKING,
        _rule(attn_mask, alibi_slopes),
        rows(0, 1, 2),
        NO_PAGES,
        *rows(7),
        *at(8, 9),
    )
    returns = these(7, 8), these(*range(8), 9)
    made = make_pass("attention_forward", q, 7, [*outputs, row_stats], arguments, returns)
    if not _is_widened(q, alibi_slopes):
        return made
    return made._replace(run=lambda tensors: made.run(_widened(tensors)))


def _row_stats(q: Tensor) -> Result:
    """What backward makes weights from."""
    return Result((2, *q.shape[:3]), compute_dtype(q))


def attention_extras(q: Tensor, *_: Tensor | None, **options: Any) -> tuple[Tensor]:
    """See `pykernels._backends` for the contract."""
    return (_row_stats(q).like(q),)


def attention_bwd(
    saved: tuple[Any, ...], grads: tuple[Tensor | None, ...], **options: Any
) -> tuple[Tensor | None, ...]:
    """See `pykernels._backends` for the contract."""
    found: tuple[Tensor | None, ...]
    found = attention_bwd_pass(*saved, **options).run((*saved, *grads))
    return found


@planned
def attention_bwd_pass(
    *saved: Any,
    band: Band,
    scale: float,
    softcap: float = 0.0,
    diagonal: int = 0,
    dropout_p: float = 0.0,
    needs: tuple[bool, ...],
    whole: bool = True,
) -> Pass:
    """See `pykernels._backends` for the contract.

    `whole` unless k is a part of what out is of: in the place of row_stats there is its lse then.
    """
    q, k, v, attn_mask, sinks, alibi_slopes, *_ = saved
    wanted = zip((q, k, v, sinks), (*needs[:3], needs[4]), strict=True)
    results = [Result(tuple(t.shape)) if need else None for t, need in wanted]
    # the tensors, out, row_stats, dout, dlse, sums of the mask's gradient; dq, dk, dv, dsinks
    arguments = (
        _sizes(q, k, v, band, diagonal),
        (scale, softcap, dropout_p),
        _NO_PACKING,
        _rule(attn_mask, alibi_slopes),
        rows(0, 1, 2, 7, 9),
        *at(8),
        whole,
        *at(10),
        rows(12, 13, 14),
        *rows(11),
        *at(15),
    )
    returns = these(12, 13, 14, 11, 15, None, None)
    made = make_pass("attention_backward", q, 12, results, arguments, returns)
    widened, scores = _is_widened(q, alibi_slopes), (*q.shape[:3], k.shape[2])
    mask = (attn_mask.shape, attn_mask.dtype) if attn_mask is not None and needs[3] else None

    def run(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        tensors = _widened(tensors) if widened else tensors
        if tensors[9] is None:
            tensors = (*tensors[:9], torch.zeros_like(tensors[7]), tensors[10])
        if mask is None:
            found: tuple[Any, ...] = made.run(tensors)
            return found
        shape, dtype = mask
        sums = tensors[8].new_zeros(*shape[:3], scores[3])
        dq, dk, dv, _, *rest = made.run((*tensors, sums.expand(scores)))
        return dq, dk, dv, sums.sum_to_size(shape).to(dtype), *rest

    return made._replace(run=run)


def _rule(attn_mask: Tensor | None, alibi_slopes: Tensor | None) -> tuple[Any, ...]:
    """What makes weights of scores, where the tensors are those of `attention_fwd`."""
    mask: tuple[Any, ...] = (0, 0, (0, 0, 0, 0))  # kind (0 none, 1 boolean, 2 additive)
    if attn_mask is not None:
        mask = (1 if attn_mask.dtype == torch.bool else 2, start(3), strides(3))
    by_batch = alibi_slopes is not None and alibi_slopes.dim() > 1
    step = alibi_slopes.shape[-1] if alibi_slopes is not None and by_batch else 0
    return mask, *at(4), (*at(5), step), *at(6)


def _is_widened(q: Tensor, alibi_slopes: Tensor | None) -> bool:
    """Whether slopes are of another dtype than the arithmetic."""
    return alibi_slopes is not None and alibi_slopes.dtype != compute_dtype(q)


def _widened(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors with slopes in the dtype of the arithmetic."""
    return *tensors[:5], tensors[5].to(compute_dtype(tensors[0])), *tensors[6:]


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
