"""Launches csrc/ops/attention.cpp on packed sequences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import address, contiguous, dense_rows
from pykernels.cpp.attention import FEATURES as OF_ATTENTION
from pykernels.cpp.attention import NO_PAGES, Band, Rule, compute_dtype

DTYPES = frozenset(cpp.DTYPES)
FEATURES = OF_ATTENTION - {"mask_grad"}


def attention_varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    *,
    band: Band,
    ends_meet: bool,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    keep: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """See `pykernels._backends` for the contract."""
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=compute_dtype(q))
    row_stats = attention_varlen_extras(q)[0] if keep else None
    # The copies must outlive the call: their addresses alone reach it.
    rows = [dense_rows(t) for t in (q, k, v)]
    rule = Rule(q, k, None, sinks, alibi_slopes, seed)
    places = _Places(cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, ends_meet)
    pages = NO_PAGES
    if places.table is not None:
        pages = address(places.table), block_table.shape[1], k.shape[1]
    _backends.load_extension().attention_forward(
        cpp.DTYPES[q.dtype],
        torch.get_num_threads(),
        _sizes(q, k, v, band, places),
        (scale, softcap, dropout_p),
        places.packed,
        rule.packed,
        [_strided(t) for t in rows],
        pages,
        _strided(out),
        address(lse),
        address(row_stats),
    )
    if places.end_q < q.shape[0]:
        out[places.end_q :], lse[:, places.end_q :] = 0, -math.inf
    tensors = (q, k, v, sinks, alibi_slopes, seed)
    saved = (*tensors, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, out, row_stats)
    return (out, lse), saved


def attention_varlen_extras(q: Tensor, *_: Tensor | None, **options: Any) -> tuple[Tensor]:
    """See `pykernels._backends` for the contract: what backward makes weights from."""
    return (q.new_empty(2, q.shape[1], q.shape[0], dtype=compute_dtype(q)),)


def attention_varlen_bwd(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, Tensor | None],
    *,
    band: Band,
    ends_meet: bool,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """See `pykernels._backends` for the contract."""
    q, k, v, sinks, alibi_slopes, seed, *places_, out, row_stats = saved
    dout, dlse = grads
    if dout is None:
        dout = torch.zeros_like(out)
    places = _Places(*places_, ends_meet)
    dq = q.new_empty(q.shape) if needs[0] else None
    # Keys that are not used get zeros, and that from here.
    whole = places.used is None and places.end_k == k.shape[0]
    fresh = torch.empty_like if whole else torch.zeros_like
    dk, dv = (
        fresh(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((k, v), needs[1:3], strict=True)
    )
    dsinks = sinks.new_empty(sinks.shape) if needs[3] else None
    rows = [dense_rows(t) for t in (q, k, v, out, dout)]
    rule = Rule(q, k, None, sinks, alibi_slopes, seed)
    dlse = contiguous(dlse)
    _backends.load_extension().attention_backward(
        cpp.DTYPES[q.dtype],
        torch.get_num_threads(),
        _sizes(q, k, v, band, places),
        (scale, softcap, dropout_p),
        places.packed,
        rule.packed,
        [_strided(t) for t in rows],
        address(row_stats),
        True,
        address(dlse),
        [_strided(t) for t in (dq, dk, dv)],
        (0, (0, 0, 0)),
        address(dsinks),
    )
    if dq is not None and places.end_q < q.shape[0]:
        dq[places.end_q :] = 0
    return dq, dk, dv, dsinks, *(None for _ in saved[4:-2])


class _Places:
    """Where the sequences lie, as the extension takes it, and the tensors it points to."""

    def __init__(
        self,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None,
        seqused_k: Tensor | None,
        block_table: Tensor | None,
        ends_meet: bool,
    ) -> None:
        given = (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
        wide = [None if t is None else t.to(torch.int64).contiguous() for t in given]
        self.queries, self.keys, self.used, self.table = wide
        # lists, as a small tensor's every operation takes longer than a loop over its numbers
        starts_q = self.queries.tolist()
        starts_k = [0] if self.keys is None else self.keys.tolist()
        self.end_q, self.end_k = starts_q[-1], starts_k[-1]
        longest_k = _longest(starts_k) if self.used is None else max(self.used.tolist(), default=0)
        self.packed = (
            *(address(t) for t in wide[:3]),
            _longest(starts_q),
            longest_k,
            ends_meet,
        )


def _longest(starts: list[int]) -> int:
    return max((end - begin for begin, end in itertools.pairwise(starts)), default=0)


def _sizes(q: Tensor, k: Tensor, v: Tensor, band: Band, places: _Places) -> tuple[int, ...]:
    """B, N, N_kv, S_q, S_k, D, D_v, first, last, diagonal; no bound is one that hides nothing."""
    S_q, N, D = q.shape
    S_k = k.shape[:-2].numel()
    far = S_q + S_k
    first, last = band
    first = -far if first is None else max(first, -far)
    last = far if last is None else min(last, far)
    return len(places.queries) - 1, N, k.shape[-2], S_q, S_k, D, v.shape[-1], first, last, 0


def _strided(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address, and strides of page, head and row."""
    if tensor is None:
        return 0, (0, 0, 0)
    row, head = tensor.stride()[-3:-1]
    return tensor.data_ptr(), (tensor.stride(0) if tensor.dim() > 3 else 0, head, row)
