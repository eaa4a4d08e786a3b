"""Launches csrc/ops/attention_varlen.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykernels import cpp
from pykernels.cpp import (
    Maybe,
    Pass,
    Result,
    at,
    make_pass,
    packed_rows,
    planned,
    these,
    without,
)
from pykernels.cpp.attention import FEATURES as OF_ATTENTION
from pykernels.cpp.attention import Band, compute_dtype, rule, widened

DTYPES = frozenset(cpp.DTYPES)
FEATURES = OF_ATTENTION - {"mask_grad"}
CHECKS_VALUES = True


def attention_varlen_fwd(*tensors: Any, keep: bool = True, **options: Any) -> tuple[Any, Any]:
    """See `pykernels._backends` for the contract."""
    found: tuple[Any, Any] = attention_varlen_fwd_pass(*tensors, keep=keep, **options).run(tensors)
    return found


@planned
def attention_varlen_fwd_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Maybe,
    alibi_slopes: Maybe,
    seed: Maybe,
    *places: Maybe,
    band: Band,
    ends_meet: bool,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    keep: bool,
    skip: tuple[int, ...] = (),
) -> Pass:
    """See `pykernels._backends` for the contract; `places` are cu_seqlens_q to block_table."""
    S_q, N, _ = q.shape
    outputs = without(skip, Result((S_q, N, v.shape[-1])), Result((N, S_q), compute_dtype(q)))
    row_stats = _row_stats(q) if keep else None
    table = places[3]
    # the tensors; out, lse, row_stats
    arguments = (
        _sizes(q, k, v, band, places),
        (scale, softcap, dropout_p),
        (_integers(places), ends_meet),
        (0, 0, 0) if table is None else (*k.shape[:2], table.shape[1]),
        rule(None, 3, alibi_slopes, 4, 5),
        packed_rows(0, 1, 2),
        *packed_rows(10),
        *at(11, 12),
    )
    returns = these(10, 11), these(*range(11), 12)
    results = [*outputs, row_stats]
    made = make_pass("attention_varlen_forward", q, 10, results, arguments, returns)
    return widened(made, q, alibi_slopes, 4)


def _row_stats(q: Tensor) -> Result:
    """What backward makes weights from."""
    return Result((2, q.shape[1], q.shape[0]), compute_dtype(q))


def attention_varlen_extras(q: Tensor, *_: Maybe, **options: Any) -> tuple[Tensor]:
    """See `pykernels._backends` for the contract."""
    return (_row_stats(q).like(q),)


def attention_varlen_bwd(
    saved: tuple[Any, ...], grads: tuple[Maybe, ...], **options: Any
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    found: tuple[Maybe, ...]
    found = attention_varlen_bwd_pass(*saved, **options).run((*saved, *grads))
    return found


@planned
def attention_varlen_bwd_pass(
    *saved: Any,
    band: Band,
    ends_meet: bool,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    needs: tuple[bool, ...],
) -> Pass:
    """See `pykernels._backends` for the contract."""
    q, k, v, sinks, alibi_slopes, _, *places, _, _ = saved
    wanted = zip((q, k, v, sinks), needs[:4], strict=True)
    results = [Result(tuple(t.shape)) if need else None for t, need in wanted]
    # the tensors, out, row_stats, dout, dlse; dq, dk, dv, dsinks
    arguments = (
        _sizes(q, k, v, band, places),
        (scale, softcap, dropout_p),
        (_integers(places), ends_meet),
        rule(None, 3, alibi_slopes, 4, 5),
        packed_rows(0, 1, 2, 10, 12),
        *at(11, 13),
        packed_rows(14, 15, 16),
        *at(17),
    )
    returns = these(14, 15, 16, 17, *[None] * 6)
    made = make_pass("attention_varlen_backward", q, 14, results, arguments, returns)
    made = widened(made, q, alibi_slopes, 4)

    def run(tensors: tuple[Any, ...]) -> Any:
        if tensors[12] is None:
            tensors = (*tensors[:12], torch.zeros_like(tensors[10]), tensors[13])
        return made.run(tensors)

    return made._replace(run=run)


def _integers(places: Any) -> list[tuple[Any, bool]]:
    """The addresses of places, tensors 6 to 9, each with whether it is of int32."""
    wide = [t is not None and t.dtype == torch.int32 for t in places]
    return list(zip(at(6, 7, 8, 9), wide, strict=True))


def _sizes(q: Tensor, k: Tensor, v: Tensor, band: Band, places: Any) -> tuple[int, ...]:
    """B, N, N_kv, S_q, S_k, D, D_v, first, last, diagonal; no bound is one that hides nothing."""
    S_q, N, D = q.shape
    S_k = k.shape[:-2].numel()
    table = places[3]
    # A table may name a page time and again: a sequence then has more keys than there are rows.
    most = S_k if table is None else max(S_k, table.shape[1] * k.shape[1])
    far = S_q + most
    first, last = band
    first = -far if first is None else max(first, -far)
    last = far if last is None else min(last, far)
    return len(places[0]) - 1, N, k.shape[-2], S_q, S_k, D, v.shape[-1], first, last, 0
