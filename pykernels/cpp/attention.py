"""Launches csrc/ops/attention.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import cpp
from pykernels.cpp import (
    Pass,
    Result,
    at,
    make_pass,
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
    out = Result((B, N, S_q, v.shape[3]), lies_like=0)
    outputs = without(skip, out, Result((B, N, S_q), dtype))
    # the tensors; out, lse, row_stats
    arguments = (
        _sizes(q, k, v, band, diagonal),
        (scale, softcap, dropout_p),
        rule(attn_mask, 4, alibi_slopes, 5, 6),
        rows(0, 1, 2),
        *rows(7),
        *at(8, 9),
    )
    returns = these(7, 8), these(*range(8), 9)
    made = make_pass("attention_forward", q, 7, [*outputs, row_stats], arguments, returns)
    return widened(made, q, alibi_slopes, 5)


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
def attention_bwd_pass(*saved: Any, needs: tuple[bool, ...], **options: Any) -> Pass:
    """See `pykernels._backends` for the contract."""
    q, k, _, attn_mask, _, alibi_slopes, *_ = saved
    results, arguments = backward_plan(*saved[:7], needs=needs, **options)
    returns = these(12, 13, 14, 11, 15, None, None)
    made = make_pass("attention_backward", q, 12, results, arguments, returns)
    made = widened(made, q, alibi_slopes, 5)
    scores = (*q.shape[:3], k.shape[2])
    mask = (attn_mask.shape, attn_mask.dtype) if attn_mask is not None and needs[3] else None

    def run(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
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


def backward_plan(
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
    needs: tuple[bool, ...],
    whole: bool = True,
) -> tuple[list[Result | None], tuple[object, ...]]:
    """The results and the arguments of a backward pass.

    Its tensors are these seven, out, row_stats, dout, dlse and sums of the mask's gradient; its
    results dq, dk, dv, dsinks. Not `whole`, k is a part of what out is of, and in the place of
    row_stats there is the lse.
    """
    results = [
        Result(tuple(t.shape), lies_like=i) if needs[i] else None for i, t in enumerate((q, k, v))
    ]
    results.append(Result(tuple(sinks.shape)) if sinks is not None and needs[4] else None)
    arguments = (
        _sizes(q, k, v, band, diagonal),
        (scale, softcap, dropout_p),
        rule(attn_mask, 4, alibi_slopes, 5, 6),
        rows(0, 1, 2, 7, 9),
        *at(8),
        whole,
        *at(10),
        rows(12, 13, 14),
        *rows(11),
        *at(15),
    )
    return results, arguments


def rule(
    attn_mask: Tensor | None, sinks: int, alibi_slopes: Tensor | None, slopes: int, seed: int
) -> tuple[Any, ...]:
    """What makes weights of scores: a mask at place 3, the others at the places given."""
    mask: tuple[Any, ...] = (0, 0, (0, 0, 0, 0))  # kind (0 none, 1 boolean, 2 additive)
    if attn_mask is not None:
        mask = (1 if attn_mask.dtype == torch.bool else 2, start(3), strides(3))
    by_batch = alibi_slopes is not None and alibi_slopes.dim() > 1
    step = alibi_slopes.shape[-1] if alibi_slopes is not None and by_batch else 0
    return mask, *at(sinks), (*at(slopes), step), *at(seed)


def widened(made: Pass, q: Tensor, alibi_slopes: Tensor | None, place: int) -> Pass:
    """The pass on slopes, at `place` of its tensors, of another dtype than the arithmetic.

    By its `run` alone: nobody lays it out.
    """
    dtype, run = compute_dtype(q), made.run
    if alibi_slopes is None or alibi_slopes.dtype == dtype:
        return made
    return made._replace(
        run=lambda given: run((*given[:place], given[place].to(dtype), *given[place + 1 :]))
    )


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
