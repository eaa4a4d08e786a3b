"""Scaled dot-product attention on a GPU, after FlashAttention-2 (T. Dao, 2023).

    S = scale * Q K^T + mask    lse_i = log sum_j exp(S_ij)    P = exp(S - lse)    out = P V

The scores exist one tile at a time and never in memory. Query i sees key j where j - i is in a
band, `first` to `last`, each None for no bound: the causal rule has last = 0. Tiles outside it are
never computed, and of the rest only those that its edges or the end of the keys cross pay for a
comparison (in the kernel of dK and dV, all: a second loop costs it more registers than that).
Query head n reads K and V of head n // (N // N_kv) by index. Every sum is made by one program in
one order, so two runs agree bit for bit.

Scores live in units that depend on WIDE: float32 and float64, and any dtype under a float mask, a
cap or ALiBi. If not wide they are S * log2(e), so that an exponential is one fused multiply-add and
one exp2. Wide ones are S itself: the rounded factor log2(e) would cost digits in the subtraction
S - lse, and make -inf of a mask's most negative number.

In a row whose mask is -1e9 or the most negative number at every key, the rounding of lse swallows
the number of keys, and exp(S - lse) is 1 for each. So under a float mask forward saves what that
lacks of a weight, a factor for each row. As all gradients are linear in dout and dlse, backward
multiplies these by it, once and before all else.

What makes scores of products, and what dropout draws, are known when a kernel compiles: without a
cap, ALiBi and so on, nothing is left of them in the machine code. The weights that dropout keeps
are drawn again in each pass (`_philox.py`), and backward knows a sink by lse alone.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common, _configs
from ._common import (
    LAUNCH,
    LN_2,
    LOG2_E,
    TRITON_DTYPES,
    block_size,
    capability,
    compute_dtype,
    dot,
    empty_rows_like,
    load_tile,
    tanh,
    to_storage,
    with_dense_rows,
)
from ._launch import Call, launch
from ._philox import WORD, draw_of, kept

try:
    from . import _attention_sm90, _attention_sm90_bwd, _hopper
except (AttributeError, ImportError):  # Gluon is experimental: a later Triton may have changed it
    _hopper = None  # type: ignore[assignment]

DTYPES = _common.DTYPES
FEATURES = frozenset({"alibi", "dropout", "mask_grad", "sinks", "softcap", "v_head_dim", "window"})

#: The smallest block of head dims.
LEAST_BLOCK_D = 32


@triton.jit
def _exp(x, WIDE: tl.constexpr):
    return tl.exp(x) if WIDE else tl.exp2(x)


@triton.jit
def _log(x, WIDE: tl.constexpr):
    return tl.log(x) if WIDE else tl.log2(x)


@triton.jit
def _unit_factor(scale, WIDE: tl.constexpr):
    """|scale| in the units of scores; above zero, so that a score of -inf stays -inf."""
    factor = tl.maximum(tl.abs(scale), 1e-30)
    return factor if WIDE else factor * LOG2_E


@triton.jit
def _rows(ptr, index, stride, cols):
    """Pointers [M, N] to columns `cols` [N] of rows `index` [M]; offsets may pass 2^31."""
    return ptr + index.to(tl.int64)[:, None] * stride + cols[None, :]


@triton.jit
def _rule(
    factor,
    slopes_ptr,  # [B, N] or, where stride_slopes is 0, [N]; None for no ALiBi
    stride_slopes,
    b,
    n,
    S_q,  # 0 where there is no sequence b
    diagonal,
    softcap,
    ACC: tl.constexpr,
):
    """What makes scores of the products of a head: (factor, cap, slope, diagonal)."""
    slope = tl.full([], 0, ACC)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * stride_slopes + n, mask=S_q > 0, other=0.0)
    return factor, tl.full([], softcap, ACC), slope, diagonal


@triton.jit
def _products(
    a,  # [M, D], queries; or keys, and all is transposed
    b,  # [N, D]
    rule,
    ACC: tl.constexpr,
    NEGATIVE: tl.constexpr,
    CAP: tl.constexpr,
):
    """What `_scores` makes scores of: a b^T or, where there is a cap c, tanh(scale * a b^T / c)."""
    factor, cap, _, _ = rule
    s = dot(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], ACC))
    if NEGATIVE:
        s = -s
    if CAP:
        s = tanh(s * (factor / cap))
    return s


@triton.jit
def _scores(
    s,  # [M, N], of `_products`
    rule,
    rows,  # [M, 1] or [1, N], the places of queries
    keys,
    mask_rows,  # [M, 1], pointers to the mask's rows
    mask_cols,  # [1, N], offsets in them
    visible,  # [M, N], the causal rule and the end of the keys, checked where EDGE
    inside,  # [M, N], what lies in the mask's memory
    ACC: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SCALED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """What `_minus` takes an offset from: -inf where a query does not see a key."""
    factor, cap, slope, diagonal = rule
    if CAP:
        s = s * cap
    elif SCALED:
        s = s * factor
    if ALIBI:
        s = s - slope * tl.abs(rows + diagonal - keys).to(ACC)
    if MASK == "bool":
        keep = tl.load(mask_rows + mask_cols, mask=inside, other=0)
        s = tl.where(keep != 0, s, float("-inf"))
    elif MASK == "float":
        bias = tl.load(mask_rows + mask_cols, mask=inside, other=0.0).to(ACC)
        s = s + bias
    if EDGE:
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
def _minus(s, factor, offset, SCALED: tl.constexpr):
    """s * factor - offset, rounded once: near the row's maximum it cancels."""
    return s - offset if SCALED else tl.fma(s, factor, -offset)


@triton.jit
def _in_band(seen, keys, rows, first, last):
    """`seen` [M, N], and that the band has the pair; keys and rows are [1, N] and [M, 1], or the
    other way around."""
    if last is not None:
        seen = seen & (keys <= rows + last)
    if first is not None:
        seen = seen & (keys >= rows + first)
    return seen


@triton.jit
def _key_ranges(m, S_k, first, last, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For queries m ... m + BLOCK_M - 1: keys [full, edge) need no comparison, those before, from
    `start` on, and those behind, up to `end`, do."""
    start = 0
    full = 0
    end = S_k
    edge = S_k // BLOCK_N * BLOCK_N
    if last is not None:
        end = tl.minimum(S_k, tl.maximum(m + BLOCK_M + last, 0))
        edge = tl.minimum(edge, tl.maximum(m + 1 + last, 0) // BLOCK_N * BLOCK_N)
    if first is not None:
        start = tl.maximum(m + first, 0) // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.maximum(m + BLOCK_M - 1 + first, 0), BLOCK_N) * BLOCK_N
        full = tl.maximum(tl.minimum(full, tl.cdiv(end, BLOCK_N) * BLOCK_N), start)
        edge = tl.maximum(edge, full)
    return start, full, edge, end


@triton.jit
def _tile_of(t, starts_ptr, B, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr):
    """The t-th tile of BLOCK rows of B sequences one behind the other: (sequence, tile of it), and
    a sequence from B on where there is none."""
    bs = tl.arange(0, BLOCK_B)
    begin = tl.load(starts_ptr + bs, mask=bs < B, other=0)
    end = tl.load(starts_ptr + bs + 1, mask=bs < B, other=0)
    tiles = tl.cdiv((end - begin).to(tl.int32), BLOCK)
    up_to = tl.cumsum(tiles, 0)
    b = tl.sum((up_to <= t).to(tl.int32), 0)
    return b, t - tl.sum(tl.where(bs == b, up_to - tiles, 0), 0)


@triton.jit
def _rows_of(b, starts_ptr, B):
    """(first row, rows) of sequence b; no rows behind the last one."""
    begin = tl.load(starts_ptr + b, mask=b < B, other=0).to(tl.int64)
    end = tl.load(starts_ptr + b + 1, mask=b < B, other=0)
    return begin, (end - begin).to(tl.int32)


@triton.jit
def _sequence(
    t,
    starts_q_ptr,  # [B + 1]
    starts_k_ptr,  # [B + 1]; None where there are pages
    used_ptr,  # [B], how many of its keys count; None for all
    B,
    OF_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """What the t-th tile of queries, or of keys, belongs to: (sequence, tile of it, its first row
    of queries and of keys, how many it has of both)."""
    b, tile = _tile_of(t, starts_k_ptr if OF_KEYS else starts_q_ptr, B, BLOCK, BLOCK_B)
    q_0, S_q = _rows_of(b, starts_q_ptr, B)
    k_0 = tl.full([], 0, tl.int64)
    S_k = S_q
    if starts_k_ptr is not None:
        k_0, S_k = _rows_of(b, starts_k_ptr, B)
    if used_ptr is not None:
        S_k = tl.load(used_ptr + b, mask=b < B, other=0).to(tl.int32)
    return b, tile, q_0, k_0, S_q, S_k


@triton.jit
def _tiles(starts_ptr, S, B, BLOCK: tl.constexpr):
    """How many tiles of a head there may be: of each sequence, one may be half empty."""
    return tl.cdiv(S, BLOCK) if starts_ptr is None else S // BLOCK + B


@triton.jit
def _fwd_keys(
    acc,  # [BLOCK_M, BLOCK_DV], sum of P V, P relative to exp(highest)
    total,  # [BLOCK_M], row sums of P
    highest,  # [BLOCK_M], row maxima of the scores
    q,  # [BLOCK_M, BLOCK_D]
    k_ptr,
    v_ptr,
    mask_rows,
    rows,
    start,
    stop,
    S_q,
    S_k,
    D,
    D_V,
    first,
    last,
    pages_ptr,
    page_size,
    stride_ks,
    stride_vs,
    stride_mask_k,
    rule,
    draw,
    ACC: tl.constexpr,
    NEGATIVE: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALED: tl.constexpr,
    EDGE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr,
):
    """The online softmax over keys [start, stop)."""
    ds = tl.arange(0, BLOCK_D)
    dvs = tl.arange(0, BLOCK_DV)
    for n in range(start, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        keys_ok = keys < S_k
        places = keys
        if pages_ptr is not None:
            pages = tl.load(pages_ptr + keys // page_size, mask=keys_ok, other=0).to(tl.int64)
            places = pages * page_size + keys % page_size
        k_ptrs = _rows(k_ptr, places, stride_ks, ds)
        k = load_tile(k_ptrs, keys_ok[:, None], (ds < D)[None, :], EDGE, not WHOLE_D)
        visible = keys_ok[None, :]
        inside = (rows < S_q)[:, None] & visible
        visible = _in_band(visible, keys[None, :], rows[:, None], first, last)
        mask_cols = keys.to(tl.int64)[None, :] * stride_mask_k
        s = _scores(
            _products(q, k, rule, ACC, NEGATIVE, CAP),
            rule,
            rows[:, None],
            keys[None, :],
            mask_rows,
            mask_cols,
            visible,
            inside,
            ACC,
            MASK,
            CAP,
            ALIBI,
            SCALED,
            EDGE,
        )

        top = tl.max(s, 1)
        highest_now = tl.maximum(highest, top if SCALED else top * rule[0])
        # A row that has seen no key yet has highest -inf, and -inf - -inf would be NaN.
        anchor = tl.where(highest_now == float("-inf"), 0.0, highest_now)
        p = _exp(_minus(s, rule[0], anchor[:, None], SCALED), WIDE)
        fade = _exp(highest - anchor, WIDE)
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(draw, rows, n, BLOCK_N), p, 0.0)
        v_ptrs = _rows(v_ptr, places, stride_vs, dvs)
        v = load_tile(v_ptrs, keys_ok[:, None], (dvs < D_V)[None, :], EDGE, not WHOLE_DV)
        acc = dot(to_storage(p, v.dtype), v, acc * fade[:, None])
        highest = highest_now
    return acc, total, highest


@triton.jit
def attention_fwd_kernel(
    q_ptr,  # [B, N, S_q, D]
    k_ptr,  # [B, N_kv, S_k, D]
    v_ptr,  # [B, N_kv, S_k, D_v]
    mask_ptr,  # [B, N, S_q, S_k], bytes if MASK is "bool"
    out_ptr,  # [B, N, S_q, D_v]
    lse_ptr,  # [B, N, S_q], contiguous
    stats_ptr,  # [B, N, S_q], contiguous, lse again; None, as lack_ptr, if nobody asks for them
    lack_ptr,  # what exp(S - lse) lacks of a weight
    N,
    group,  # N // N_kv
    S_q,
    S_k,
    starts_q_ptr,  # these three as in `_sequence`; None where no sequences are packed
    starts_k_ptr,
    used_ptr,
    B,  # sequences that lie one behind the other
    first,
    last,
    pages_ptr,  # [B, pages_row]: key j is row j % page_size of page j // page_size; None: in order
    pages_row,
    page_size,
    D,
    D_V,
    scale: tl.float64,
    sinks_ptr,  # [N]; None for none
    slopes_ptr,  # these three as in `_rule`
    stride_slopes,
    diagonal,
    softcap: tl.float64,
    seed_ptr,  # [1]; None for no dropout
    least: tl.uint32,  # as in `draw_of`
    growth: tl.float64,  # of what dropout keeps
    stride_qb,
    stride_qn,
    stride_qs,
    stride_kb,
    stride_kn,
    stride_ks,
    stride_vb,
    stride_vn,
    stride_vs,
    stride_mask_b,
    stride_mask_n,
    stride_mask_q,
    stride_mask_k,
    stride_ob,
    stride_on,
    stride_os,
    ACC: tl.constexpr,
    NEGATIVE: tl.constexpr,  # scale < 0
    CAUSAL: tl.constexpr,  # last is 0, and known to be when this compiles
    ENDS_MEET: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool" or "float"
    CAP: tl.constexpr,  # there is a softcap
    ALIBI: tl.constexpr,  # there are slopes
    DROPOUT: tl.constexpr,  # there is a seed
    SCALED: tl.constexpr,  # scores are more than products, and come with the factor
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WHOLE_D: tl.constexpr,  # D == BLOCK_D
    WHOLE_DV: tl.constexpr,
):
    # Tiles of one head run side by side and share its K and V in L2; the last one, the longest
    # under the causal rule, starts first.
    if CAUSAL:
        last = 0
    tiles = _tiles(starts_q_ptr, S_q, B, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // tiles
    b = (head // N).to(tl.int64)
    n = (head % N).to(tl.int64)
    n_kv = n // group
    lse_ptr += tl.cast(head, tl.int64) * S_q
    tile = tiles - 1 - pid % tiles
    sequence = b
    if starts_q_ptr is not None:
        sequence, tile, q_0, k_0, S_q, S_k = _sequence(
            tile, starts_q_ptr, starts_k_ptr, used_ptr, B, False, BLOCK_M, BLOCK_B
        )
        if ENDS_MEET:
            diagonal = S_k - S_q
            if first is not None:
                first += diagonal
            if last is not None:
                last += diagonal
        q_ptr += q_0 * stride_qs
        k_ptr += k_0 * stride_ks
        v_ptr += k_0 * stride_vs
        out_ptr += q_0 * stride_os
        lse_ptr += q_0
        if pages_ptr is not None:
            pages_ptr += sequence.to(tl.int64) * pages_row
    m = tile * BLOCK_M
    factor = _unit_factor(tl.full([], scale, ACC), WIDE)
    rule = _rule(factor, slopes_ptr, stride_slopes, sequence, n, S_q, diagonal, softcap, ACC)
    draw = draw_of(sequence * N + n, seed_ptr, least, tl.full([], growth, ACC))

    rows = m + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    dvs = tl.arange(0, BLOCK_DV)
    rows_ok = (rows < S_q)[:, None]
    q_ptrs = _rows(q_ptr + b * stride_qb + n * stride_qn, rows, stride_qs, ds)
    q = load_tile(q_ptrs, rows_ok, (ds < D)[None, :], True, not WHOLE_D)
    k_ptr += b * stride_kb + n_kv * stride_kn
    v_ptr += b * stride_vb + n_kv * stride_vn
    mask_rows = mask_ptr
    if MASK != "none":
        mask_rows = mask_ptr + b * stride_mask_b + n * stride_mask_n
        mask_rows = mask_rows + rows.to(tl.int64)[:, None] * stride_mask_q

    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    highest = tl.full([BLOCK_M], float("-inf"), ACC)
    if sinks_ptr is not None:
        # one more score, seen before all keys; one of -inf fades from the sum like a first maximum
        sink = tl.load(sinks_ptr + n).to(ACC)
        highest = tl.full([BLOCK_M], sink if WIDE else sink * LOG2_E, ACC)
        total += 1
    start, full, edge, end = _key_ranges(m, S_k, first, last, BLOCK_M, BLOCK_N)
    for part in tl.static_range(1 if first is None else 0, 3):
        acc, total, highest = _fwd_keys(
            acc,
            total,
            highest,
            q,
            k_ptr,
            v_ptr,
            mask_rows,
            rows,
            start if part == 0 else full if part == 1 else edge,
            full if part == 0 else edge if part == 1 else end,
            S_q,
            S_k,
            D,
            D_V,
            first,
            last,
            pages_ptr,
            page_size,
            stride_ks,
            stride_vs,
            stride_mask_k,
            rule,
            draw,
            ACC=ACC,
            NEGATIVE=NEGATIVE,
            MASK=MASK,
            CAP=CAP,
            ALIBI=ALIBI,
            DROPOUT=DROPOUT,
            SCALED=SCALED,
            EDGE=part != 1,
            WIDE=WIDE,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
            BLOCK_DV=BLOCK_DV,
            WHOLE_D=WHOLE_D,
            WHOLE_DV=WHOLE_DV,
        )

    blind = total == 0  # saw no key
    total = tl.where(blind, 1.0, total)
    lse = highest + _log(total, WIDE)
    lse = tl.where(blind, float("-inf"), lse if WIDE else lse * LN_2)
    out_ptrs = _rows(out_ptr + b * stride_ob + n * stride_on, rows, stride_os, dvs)
    if DROPOUT:
        acc *= draw[4]
    out = to_storage(acc / total[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=rows_ok & (dvs < D_V)[None, :])
    tl.store(lse_ptr + rows, lse, mask=rows < S_q)
    if lack_ptr is not None:  # there is a float mask: scores are wide, and no sequences packed
        at = tl.cast(head, tl.int64) * S_q + rows
        lack = tl.where(lse == float("-inf"), 1.0, _exp(lse - highest, WIDE) / total)
        tl.store(stats_ptr + at, lse, mask=rows < S_q)
        tl.store(lack_ptr + at, lack, mask=rows < S_q)


@triton.jit
def _load_lse(ptrs, ok, WIDE: tl.constexpr):
    """lse in the units of scores; +inf, so that P = 0, in rows that see no key or do not exist."""
    lse = tl.load(ptrs, mask=ok, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse if WIDE else lse * LOG2_E)


@triton.jit
def _weights(
    a,  # these as in `_products`
    b,
    lse,  # [M, 1] or [1, N], of `_load_lse`
    rule,
    rows,  # and these as in `_scores`
    keys,
    mask_rows,
    mask_cols,
    visible,
    inside,
    ACC: tl.constexpr,
    NEGATIVE: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SCALED: tl.constexpr,
    EDGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """P of the backward pass, and the products, of which the slope of a cap is made."""
    products = _products(a, b, rule, ACC, NEGATIVE, CAP)
    s = _scores(
        products,
        rule,
        rows,
        keys,
        mask_rows,
        mask_cols,
        visible,
        inside,
        ACC,
        MASK,
        CAP,
        ALIBI,
        SCALED,
        EDGE,
    )
    return _exp(_minus(s, rule[0], lse, SCALED), WIDE), products


@triton.jit
def attention_bwd_delta_kernel(
    out_ptr,  # [B, N, S_q, D_v]
    dout_ptr,  # [B, N, S_q, D_v]
    lse_ptr,  # [B, N, S_q], contiguous
    dlse_ptr,  # [B, N, S_q], contiguous
    lack_ptr,  # [B, N, S_q], contiguous: what dout and dlse are multiplied by first; None for 1
    to_ptr,  # [B, N, S_q, D_v], contiguous: dout times that
    delta_ptr,  # [B, N, rows], contiguous; 0 behind S_q
    units_ptr,  # [B, N, rows], contiguous: lse as `_load_lse` has it; None if nobody asks for it
    N,
    S_q,
    rows_out,  # S_q, or more
    D_V,
    stride_ob,
    stride_on,
    stride_os,
    stride_dob,
    stride_don,
    stride_dos,
    ACC: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta_i = out_i . dout_i - dlse_i, which with P gives dS = P * (dP - delta)."""
    tiles = tl.cdiv(rows_out, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // tiles
    b = (head // N).to(tl.int64)
    n = (head % N).to(tl.int64)
    rows = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    dvs = tl.arange(0, BLOCK_DV)
    rows_ok = rows < S_q
    inside = rows_ok[:, None] & (dvs < D_V)[None, :]
    out_ptrs = _rows(out_ptr + b * stride_ob + n * stride_on, rows, stride_os, dvs)
    dout_ptrs = _rows(dout_ptr + b * stride_dob + n * stride_don, rows, stride_dos, dvs)
    out = tl.load(out_ptrs, mask=inside, other=0.0).to(ACC)
    dout = tl.load(dout_ptrs, mask=inside, other=0.0).to(ACC)
    at = tl.cast(head, tl.int64) * S_q + rows
    if lack_ptr is not None:
        lack = tl.load(lack_ptr + at, mask=rows_ok, other=0.0)
        dout = to_storage(dout * lack[:, None], to_ptr.dtype.element_ty)
        tl.store(_rows(to_ptr, at, D_V, dvs), dout, mask=inside)
        dout = dout.to(ACC)
    delta = tl.sum(out * dout, 1)
    if HAS_DLSE:
        # The lse of a row that sees no key is constant: whatever gradient it gets goes nowhere.
        seen = tl.load(lse_ptr + at, mask=rows_ok, other=0.0) != float("-inf")
        dlse = tl.load(dlse_ptr + at, mask=rows_ok & seen, other=0.0).to(ACC)
        delta -= dlse if lack_ptr is None else dlse * lack
    to = tl.cast(head, tl.int64) * rows_out + rows
    tl.store(delta_ptr + to, delta, mask=rows < rows_out)
    if units_ptr is not None:
        tl.store(units_ptr + to, _load_lse(lse_ptr + at, rows_ok, False), mask=rows < rows_out)


@triton.jit
def attention_bwd_dkv_kernel(
    q_ptr,  # [B, N, S_q, D]
    k_ptr,  # [B, N_kv, S_k, D]
    v_ptr,  # [B, N_kv, S_k, D_v]
    mask_ptr,  # [B, N, S_q, S_k]
    dout_ptr,  # [B, N, S_q, D_v]
    lse_ptr,  # [B, N, S_q], contiguous
    delta_ptr,  # [B, N, S_q], contiguous
    dk_ptr,  # [B, N_kv, S_k, D]
    dv_ptr,  # [B, N_kv, S_k, D_v]
    N,
    group,
    S_q,
    S_k,
    starts_q_ptr,
    starts_k_ptr,
    used_ptr,
    B,  # sequences that lie one behind the other
    first,
    last,
    D,
    D_V,
    scale: tl.float64,
    slopes_ptr,
    stride_slopes,
    diagonal,
    softcap: tl.float64,
    seed_ptr,
    least: tl.uint32,
    growth: tl.float64,
    stride_qb,
    stride_qn,
    stride_qs,
    stride_kb,
    stride_kn,
    stride_ks,
    stride_vb,
    stride_vn,
    stride_vs,
    stride_mask_b,
    stride_mask_n,
    stride_mask_q,
    stride_mask_k,
    stride_dob,
    stride_don,
    stride_dos,
    stride_dkb,
    stride_dkn,
    stride_dks,
    stride_dvb,
    stride_dvn,
    stride_dvs,
    ACC: tl.constexpr,
    NEGATIVE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ENDS_MEET: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr,
):
    # The first keys are seen by the most queries under the causal rule: they start first.
    if CAUSAL:
        last = 0
    tiles = _tiles(starts_k_ptr, S_k, B, BLOCK_N)
    pid = tl.program_id(0)
    head_kv = pid // tiles
    N_kv = N // group
    b = (head_kv // N_kv).to(tl.int64)
    n_kv = (head_kv % N_kv).to(tl.int64)
    all_q = S_q
    tile = pid % tiles
    sequence = b
    if starts_q_ptr is not None:
        sequence, tile, q_0, k_0, S_q, S_k = _sequence(
            tile, starts_q_ptr, starts_k_ptr, used_ptr, B, True, BLOCK_N, BLOCK_B
        )
        if ENDS_MEET:
            diagonal = S_k - S_q
            if first is not None:
                first += diagonal
            if last is not None:
                last += diagonal
        q_ptr += q_0 * stride_qs
        k_ptr += k_0 * stride_ks
        v_ptr += k_0 * stride_vs
        dout_ptr += q_0 * stride_dos
        lse_ptr += q_0
        delta_ptr += q_0
        dk_ptr += k_0 * stride_dks
        dv_ptr += k_0 * stride_dvs
    key_0 = tile * BLOCK_N
    scale_acc = tl.full([], scale, ACC)
    growth_acc = tl.full([], growth, ACC)
    factor = _unit_factor(scale_acc, WIDE)

    keys = key_0 + tl.arange(0, BLOCK_N)
    ds = tl.arange(0, BLOCK_D)
    dvs = tl.arange(0, BLOCK_DV)
    keys_ok = (keys < S_k)[:, None]
    k_ptrs = _rows(k_ptr + b * stride_kb + n_kv * stride_kn, keys, stride_ks, ds)
    v_ptrs = _rows(v_ptr + b * stride_vb + n_kv * stride_vn, keys, stride_vs, dvs)
    k = load_tile(k_ptrs, keys_ok, (ds < D)[None, :], True, not WHOLE_D)
    v = load_tile(v_ptrs, keys_ok, (dvs < D_V)[None, :], True, not WHOLE_DV)

    # One loop over the queries of all heads that read these keys, so that loads of one head run
    # ahead during the last products of another. Tiles of scores are transposed, keys by queries:
    # both sums over queries have their left operand in registers. Keys past S_k gather rubbish,
    # each in a row of its own that is not stored.
    start = 0
    end = S_q
    if last is not None:
        start = tl.maximum(key_0 - last, 0) // BLOCK_M * BLOCK_M
    if first is not None:
        end = tl.minimum(S_q, key_0 + BLOCK_N - first)
    steps = tl.cdiv(tl.maximum(end - start, 0), BLOCK_M)
    banded: tl.constexpr = first is not None or last is not None
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], ACC)
    for step in range(group * steps):
        n = n_kv * group + step // steps
        rows = start + step % steps * BLOCK_M + tl.arange(0, BLOCK_M)
        rows_ok = rows < S_q
        q_ptrs = _rows(q_ptr + b * stride_qb + n * stride_qn, rows, stride_qs, ds)
        q = load_tile(q_ptrs, rows_ok[:, None], (ds < D)[None, :], True, not WHOLE_D)
        row_0 = (b * N + n) * all_q
        lse = _load_lse(lse_ptr + row_0 + rows, rows_ok, WIDE)
        mask_rows = mask_ptr
        if MASK != "none":
            mask_rows = mask_ptr + b * stride_mask_b + n * stride_mask_n
            mask_rows = mask_rows + keys.to(tl.int64)[:, None] * stride_mask_k
        mask_cols = rows.to(tl.int64)[None, :] * stride_mask_q
        inside = keys_ok & rows_ok[None, :]
        visible = _in_band(keys_ok, keys[:, None], rows[None, :], first, last)
        rule = _rule(factor, slopes_ptr, stride_slopes, sequence, n, S_q, diagonal, softcap, ACC)
        pt, products = _weights(
            k,
            q,
            lse[None, :],
            rule,
            rows[None, :],
            keys[:, None],
            mask_rows,
            mask_cols,
            visible,
            inside,
            ACC,
            NEGATIVE,
            MASK,
            CAP,
            ALIBI,
            SCALED,
            banded,
            WIDE,
        )
        dout_ptrs = _rows(dout_ptr + b * stride_dob + n * stride_don, rows, stride_dos, dvs)
        dout = load_tile(dout_ptrs, rows_ok[:, None], (dvs < D_V)[None, :], True, not WHOLE_DV)
        used = pt
        if DROPOUT:
            draw = draw_of(sequence * N + n, seed_ptr, least, growth_acc)
            keep = tl.trans(kept(draw, rows, key_0, BLOCK_N))
            used = tl.where(keep, pt, 0.0)
        dv = dot(to_storage(used, dout.dtype), dout, dv)
        delta = tl.load(delta_ptr + row_0 + rows, mask=rows_ok, other=0.0)
        dpt = dot(v, tl.trans(dout), tl.zeros([BLOCK_N, BLOCK_M], ACC))
        if DROPOUT:
            dpt = tl.where(keep, dpt * growth_acc, 0.0)
        dst = pt * (dpt - delta[None, :])
        if CAP:
            dst *= 1 - products * products
        dk = dot(to_storage(dst, q.dtype), q, dk)

    dk_ptrs = _rows(dk_ptr + b * stride_dkb + n_kv * stride_dkn, keys, stride_dks, ds)
    dv_ptrs = _rows(dv_ptr + b * stride_dvb + n_kv * stride_dvn, keys, stride_dvs, dvs)
    if DROPOUT:
        dv *= growth_acc
    dk = to_storage(dk * scale_acc, dk_ptr.dtype.element_ty)
    dv = to_storage(dv, dv_ptr.dtype.element_ty)
    tl.store(dk_ptrs, dk, mask=keys_ok & (ds < D)[None, :])
    tl.store(dv_ptrs, dv, mask=keys_ok & (dvs < D_V)[None, :])


@triton.jit
def _bwd_keys(
    dq,  # [BLOCK_M, BLOCK_D]
    q,  # [BLOCK_M, BLOCK_D]
    dout,  # [BLOCK_M, BLOCK_DV]
    lse,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    k_ptr,
    v_ptr,
    mask_rows,
    rows,
    start,
    stop,
    S_q,
    S_k,
    D,
    D_V,
    first,
    last,
    stride_ks,
    stride_vs,
    stride_mask_k,
    rule,
    draw,
    ACC: tl.constexpr,
    NEGATIVE: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALED: tl.constexpr,
    EDGE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr,
):
    """What keys [start, stop) add to dQ (but for the scale) of one tile of queries."""
    ds = tl.arange(0, BLOCK_D)
    dvs = tl.arange(0, BLOCK_DV)
    for n in range(start, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        keys_ok = keys < S_k
        k_ptrs = _rows(k_ptr, keys, stride_ks, ds)
        v_ptrs = _rows(v_ptr, keys, stride_vs, dvs)
        k = load_tile(k_ptrs, keys_ok[:, None], (ds < D)[None, :], EDGE, not WHOLE_D)
        v = load_tile(v_ptrs, keys_ok[:, None], (dvs < D_V)[None, :], EDGE, not WHOLE_DV)
        visible = keys_ok[None, :]
        inside = (rows < S_q)[:, None] & visible
        visible = _in_band(visible, keys[None, :], rows[:, None], first, last)
        mask_cols = keys.to(tl.int64)[None, :] * stride_mask_k
        p, products = _weights(
            q,
            k,
            lse[:, None],
            rule,
            rows[:, None],
            keys[None, :],
            mask_rows,
            mask_cols,
            visible,
            inside,
            ACC,
            NEGATIVE,
            MASK,
            CAP,
            ALIBI,
            SCALED,
            EDGE,
            WIDE,
        )
        dp = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], ACC))
        if DROPOUT:
            dp = tl.where(kept(draw, rows, n, BLOCK_N), dp * draw[4], 0.0)
        dscores = p * (dp - delta[:, None])
        if CAP:
            dscores *= 1 - products * products
        dq = dot(to_storage(dscores, k.dtype), k, dq)
    return dq


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr,  # [B, N, S_q, D]
    k_ptr,  # [B, N_kv, S_k, D]
    v_ptr,  # [B, N_kv, S_k, D_v]
    mask_ptr,  # [B, N, S_q, S_k]
    dout_ptr,  # [B, N, S_q, D_v]
    lse_ptr,  # [B, N, S_q], contiguous
    delta_ptr,  # [B, N, S_q], contiguous
    dq_ptr,  # [B, N, S_q, D]
    N,
    group,
    S_q,
    S_k,
    starts_q_ptr,
    starts_k_ptr,
    used_ptr,
    B,  # sequences that lie one behind the other
    first,
    last,
    D,
    D_V,
    scale: tl.float64,
    slopes_ptr,
    stride_slopes,
    diagonal,
    softcap: tl.float64,
    seed_ptr,
    least: tl.uint32,
    growth: tl.float64,
    stride_qb,
    stride_qn,
    stride_qs,
    stride_kb,
    stride_kn,
    stride_ks,
    stride_vb,
    stride_vn,
    stride_vs,
    stride_mask_b,
    stride_mask_n,
    stride_mask_q,
    stride_mask_k,
    stride_dob,
    stride_don,
    stride_dos,
    stride_dqb,
    stride_dqn,
    stride_dqs,
    ACC: tl.constexpr,
    NEGATIVE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ENDS_MEET: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr,
):
    if CAUSAL:
        last = 0
    tiles = _tiles(starts_q_ptr, S_q, B, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // tiles
    b = (head // N).to(tl.int64)
    n = (head % N).to(tl.int64)
    n_kv = n // group
    at = tl.cast(head, tl.int64) * S_q
    tile = tiles - 1 - pid % tiles
    sequence = b
    if starts_q_ptr is not None:
        sequence, tile, q_0, k_0, S_q, S_k = _sequence(
            tile, starts_q_ptr, starts_k_ptr, used_ptr, B, False, BLOCK_M, BLOCK_B
        )
        if ENDS_MEET:
            diagonal = S_k - S_q
            if first is not None:
                first += diagonal
            if last is not None:
                last += diagonal
        q_ptr += q_0 * stride_qs
        k_ptr += k_0 * stride_ks
        v_ptr += k_0 * stride_vs
        dout_ptr += q_0 * stride_dos
        dq_ptr += q_0 * stride_dqs
        at += q_0
    m = tile * BLOCK_M
    scale_acc = tl.full([], scale, ACC)
    factor = _unit_factor(scale_acc, WIDE)
    rule = _rule(factor, slopes_ptr, stride_slopes, sequence, n, S_q, diagonal, softcap, ACC)
    draw = draw_of(sequence * N + n, seed_ptr, least, tl.full([], growth, ACC))

    rows = m + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    dvs = tl.arange(0, BLOCK_DV)
    rows_ok = (rows < S_q)[:, None]
    q_ptrs = _rows(q_ptr + b * stride_qb + n * stride_qn, rows, stride_qs, ds)
    dout_ptrs = _rows(dout_ptr + b * stride_dob + n * stride_don, rows, stride_dos, dvs)
    q = load_tile(q_ptrs, rows_ok, (ds < D)[None, :], True, not WHOLE_D)
    dout = load_tile(dout_ptrs, rows_ok, (dvs < D_V)[None, :], True, not WHOLE_DV)
    at += rows
    lse = _load_lse(lse_ptr + at, rows < S_q, WIDE)
    delta = tl.load(delta_ptr + at, mask=rows < S_q, other=0.0)
    k_ptr += b * stride_kb + n_kv * stride_kn
    v_ptr += b * stride_vb + n_kv * stride_vn
    mask_rows = mask_ptr
    if MASK != "none":
        mask_rows = mask_ptr + b * stride_mask_b + n * stride_mask_n
        mask_rows = mask_rows + rows.to(tl.int64)[:, None] * stride_mask_q

    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    start, full, edge, end = _key_ranges(m, S_k, first, last, BLOCK_M, BLOCK_N)
    for part in tl.static_range(1 if first is None else 0, 3):
        dq = _bwd_keys(
            dq,
            q,
            dout,
            lse,
            delta,
            k_ptr,
            v_ptr,
            mask_rows,
            rows,
            start if part == 0 else full if part == 1 else edge,
            full if part == 0 else edge if part == 1 else end,
            S_q,
            S_k,
            D,
            D_V,
            first,
            last,
            stride_ks,
            stride_vs,
            stride_mask_k,
            rule,
            draw,
            ACC=ACC,
            NEGATIVE=NEGATIVE,
            MASK=MASK,
            CAP=CAP,
            ALIBI=ALIBI,
            DROPOUT=DROPOUT,
            SCALED=SCALED,
            EDGE=part != 1,
            WIDE=WIDE,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
            BLOCK_DV=BLOCK_DV,
            WHOLE_D=WHOLE_D,
            WHOLE_DV=WHOLE_DV,
        )

    dq_ptrs = _rows(dq_ptr + b * stride_dqb + n * stride_dqn, rows, stride_dqs, ds)
    dq = to_storage(dq * scale_acc, dq_ptr.dtype.element_ty)
    tl.store(dq_ptrs, dq, mask=rows_ok & (ds < D)[None, :])


@triton.jit(do_not_specialize=["own_b", "own_n", "own_q", "own_k"])
def attention_bwd_dmask_kernel(
    q_ptr,  # [B, N, S_q, D]
    k_ptr,  # [B, N_kv, S_k, D]
    v_ptr,  # [B, N_kv, S_k, D_v]
    mask_ptr,  # [B, N, S_q, S_k]
    dout_ptr,  # [B, N, S_q, D_v]
    lse_ptr,  # [B, N, S_q], contiguous
    delta_ptr,  # [B, N, S_q], contiguous
    dmask_ptr,  # [B or 1, N or 1, S_q or 1, S_k or 1], contiguous
    B,
    N,
    group,
    S_q,
    S_k,
    first,
    last,
    D,
    D_V,
    scale: tl.float64,
    slopes_ptr,
    stride_slopes,
    diagonal,
    softcap: tl.float64,
    seed_ptr,
    least: tl.uint32,
    growth: tl.float64,
    stride_qb,
    stride_qn,
    stride_qs,
    stride_kb,
    stride_kn,
    stride_ks,
    stride_vb,
    stride_vn,
    stride_vs,
    stride_mask_b,
    stride_mask_n,
    stride_mask_q,
    stride_mask_k,
    stride_dob,
    stride_don,
    stride_dos,
    own_b,  # how many sequences the mask has
    own_n,  # heads
    own_q,  # tiles of queries
    own_k,  # tiles of keys
    SUM_Q: tl.constexpr,  # the mask is the same for all queries
    SUM_K: tl.constexpr,  # for all keys
    ACC: tl.constexpr,
    NEGATIVE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr,
):
    """dS, one tile of the mask's gradient a program, which sums over all that the mask is the same
    for: in the same order always, and no dS is in memory."""
    if CAUSAL:
        last = 0
    tiles_q = tl.cdiv(S_q, BLOCK_M)
    tiles_k = tl.cdiv(S_k, BLOCK_N)
    pid = tl.program_id(0)
    own_tile_k = pid % own_k
    own_tile_q = pid // own_k % own_q
    own_head = pid // own_k // own_q
    # What there is to sum over. That these are not known to be 1 keeps the compiler from holding
    # all addresses through the loop, for which there are no registers.
    sums_n = N // own_n
    sums_q = tiles_q // own_q
    sums_k = tiles_k // own_k
    steps = B // own_b * sums_n * sums_q * sums_k
    if not SUM_Q and not SUM_K:
        if last is not None:
            steps = tl.where(own_tile_k * BLOCK_N > (own_tile_q + 1) * BLOCK_M - 1 + last, 0, steps)
        if first is not None:
            steps = tl.where(
                (own_tile_k + 1) * BLOCK_N - 1 < own_tile_q * BLOCK_M + first, 0, steps
            )

    factor = _unit_factor(tl.full([], scale, ACC), WIDE)
    ds = tl.arange(0, BLOCK_D)
    dvs = tl.arange(0, BLOCK_DV)
    dmask = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for step in range(steps):
        tile_k = own_tile_k + step % sums_k
        tile_q = own_tile_q + step // sums_k % sums_q
        at = step // sums_k // sums_q
        n = (own_head % own_n + at % sums_n).to(tl.int64)
        b = (own_head // own_n + at // sums_n).to(tl.int64)
        n_kv = n // group
        rows = tile_q * BLOCK_M + tl.arange(0, BLOCK_M)
        keys = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
        rows_ok = (rows < S_q)[:, None]
        keys_ok = (keys < S_k)[:, None]
        q_ptrs = _rows(q_ptr + b * stride_qb + n * stride_qn, rows, stride_qs, ds)
        k_ptrs = _rows(k_ptr + b * stride_kb + n_kv * stride_kn, keys, stride_ks, ds)
        q = load_tile(q_ptrs, rows_ok, (ds < D)[None, :], True, not WHOLE_D)
        k = load_tile(k_ptrs, keys_ok, (ds < D)[None, :], True, not WHOLE_D)
        row_0 = (b * N + n) * S_q
        lse = _load_lse(lse_ptr + row_0 + rows, rows < S_q, WIDE)
        mask_rows = mask_ptr + b * stride_mask_b + n * stride_mask_n
        mask_rows = mask_rows + rows.to(tl.int64)[:, None] * stride_mask_q
        mask_cols = keys.to(tl.int64)[None, :] * stride_mask_k
        inside = rows_ok & (keys < S_k)[None, :]
        visible = _in_band(inside, keys[None, :], rows[:, None], first, last)
        rule = _rule(factor, slopes_ptr, stride_slopes, b, n, S_q, diagonal, softcap, ACC)
        draw = draw_of(b * N + n, seed_ptr, least, tl.full([], growth, ACC))
        p, _ = _weights(
            q,
            k,
            lse[:, None],
            rule,
            rows[:, None],
            keys[None, :],
            mask_rows,
            mask_cols,
            visible,
            inside,
            ACC,
            NEGATIVE,
            MASK,
            CAP,
            ALIBI,
            SCALED,
            True,
            WIDE,
        )
        v_ptrs = _rows(v_ptr + b * stride_vb + n_kv * stride_vn, keys, stride_vs, dvs)
        dout_ptrs = _rows(dout_ptr + b * stride_dob + n * stride_don, rows, stride_dos, dvs)
        v = load_tile(v_ptrs, keys_ok, (dvs < D_V)[None, :], True, not WHOLE_DV)
        dout = load_tile(dout_ptrs, rows_ok, (dvs < D_V)[None, :], True, not WHOLE_DV)
        delta = tl.load(delta_ptr + row_0 + rows, mask=rows < S_q, other=0.0)
        dp = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], ACC))
        if DROPOUT:
            dp = tl.where(kept(draw, rows, tile_k * BLOCK_N, BLOCK_N), dp * draw[4], 0.0)
        dmask += p * (dp - delta[:, None])

    # [BLOCK_M or 1, BLOCK_N or 1]
    rows = own_tile_q * BLOCK_M + tl.arange(0, 1 if SUM_Q else BLOCK_M)
    keys = own_tile_k * BLOCK_N + tl.arange(0, 1 if SUM_K else BLOCK_N)
    if SUM_Q:
        dmask = tl.sum(dmask, 0, keep_dims=True)
    if SUM_K:
        dmask = tl.sum(dmask, 1, keep_dims=True)
    size_q = 1 if SUM_Q else S_q
    size_k = 1 if SUM_K else S_k
    to = _rows(dmask_ptr + own_head.to(tl.int64) * size_q * size_k, rows, size_k, keys)
    dmask = to_storage(dmask, dmask_ptr.dtype.element_ty)
    tl.store(to, dmask, mask=(rows < size_q)[:, None] & (keys < size_k)[None, :])


class Places(NamedTuple):
    """Where sequences lie one behind the other in q, k and v of batch size 1, contiguous integers.

    None of them: each batch has one sequence of all its rows.
    """

    starts_q: Tensor | None = None  # [B + 1]
    starts_k: Tensor | None = None  # [B + 1]; None where there are pages
    used: Tensor | None = None  # [B], how many of its keys count; None for all
    pages: Tensor | None = None  # [B, most pages of a sequence]; None where keys are in order
    page_size: int = 0
    ends_meet: bool = False  # the band is from where the last query stands at the last key

    @property
    def packed(self) -> bool:
        return self.starts_q is not None

    @property
    def sequences(self) -> int:
        return 0 if self.starts_q is None else self.starts_q.shape[0] - 1

    def tiles(self, rows: int, block: int) -> int:
        """`_tiles` of as many rows."""
        return rows // block + self.sequences if self.packed else _common.cdiv(rows, block)


#: One sequence in each batch.
ONE = Places()


class Form(NamedTuple):
    """What the scores and weights are but for a mask, as the kernels take it."""

    slopes: Tensor | None = None  # [N] or [B, N], contiguous, in the dtype of the arithmetic
    step: int = 0  # numbers from one sequence's slopes to the next's
    diagonal: int = 0  # the own place of query i is key i + diagonal
    softcap: float = 0.0
    seed: Tensor | None = None  # [1], int64
    least: int = 0  # a weight is dropped where its number of 32 bits is less
    growth: float = 1.0  # of the others

    @property
    def plain(self) -> bool:
        """Whether the scores are scaled products, and all weights are kept."""
        return self.slopes is None and self.seed is None and not self.softcap

    @property
    def numbers(self) -> tuple[int, int, float, int, float]:
        """All but the tensors."""
        return self.step, self.diagonal, self.softcap, self.least, self.growth

    @staticmethod
    def of(slopes: Tensor | None, seed: Tensor | None, numbers: tuple[Any, ...]) -> "Form":
        """That of these tensors and `numbers`."""
        step, diagonal, softcap, least, growth = numbers
        return Form(slopes, step, diagonal, softcap, seed, least, growth)


def _form(
    q: Tensor,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    diagonal: int,
    softcap: float,
    dropout_p: float,
) -> Form:
    """The form of a call with `dropout_p` where there is a seed."""
    step = 0
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(compute_dtype(q.dtype)).contiguous()
        step = alibi_slopes.shape[1] if alibi_slopes.dim() > 1 else 0
    least = min(int(dropout_p * 2**32), WORD.value)
    growth = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return Form(alibi_slopes, step, diagonal, softcap, seed, least, growth)


def _options(
    tables: dict,
    q: Tensor,
    v: Tensor,
    mask: Tensor | None,
    band: tuple[int | None, int | None],
    places: Places,
    scale: float,
    form: Form,
) -> dict[str, object]:
    """The constants of a launch with the block sizes of `tables`."""
    D, D_v = q.shape[-1], v.shape[-1]
    block_d, block_dv = block_size(D, LEAST_BLOCK_D), block_size(D_v, LEAST_BLOCK_D)
    causal = band == (None, 0) and not places.packed
    packed = places.packed or band not in ((None, None), (None, 0))
    whole = D == block_d == D_v
    config = _configs.attention(
        tables,
        capability(q.device),
        q.dtype,
        max(block_d, block_dv),
        whole,
        packed,
        mask is not None,
        not form.plain,
    )
    kind = "none" if mask is None else "bool" if mask.dtype == torch.uint8 else "float"
    scaled = kind == "float" or form.softcap > 0 or form.slopes is not None
    return {
        "ACC": TRITON_DTYPES[compute_dtype(q.dtype)],
        "NEGATIVE": scale < 0,
        "CAUSAL": causal,
        "ENDS_MEET": places.ends_meet,
        "MASK": kind,
        "CAP": form.softcap > 0,
        "ALIBI": form.slopes is not None,
        "DROPOUT": form.seed is not None,
        "SCALED": scaled,
        "WIDE": q.dtype == compute_dtype(q.dtype) or scaled,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "BLOCK_B": _common.block_size(max(places.sequences, 1)),
        "WHOLE_D": block_d == D,
        "WHOLE_DV": block_dv == D_v,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **LAUNCH,
    }


def _dense(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs as kernels take them; a bool mask is read as bytes."""
    q, k, v = with_dense_rows(q), with_dense_rows(k), with_dense_rows(v)
    if attn_mask is None:
        return q, k, v, None
    mask = attn_mask
    if mask.dtype == torch.bool and q.dtype == torch.float64:
        # added instead: Triton compiles no float64 product of weights that hang on bytes
        mask = q.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    elif mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return q, k, v, mask.expand(*q.shape[:3], k.shape[2])


def _steps(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """The strides of what `_dense` returns."""
    steps = q.stride()[:3] + k.stride()[:3] + v.stride()[:3]
    return steps + ((0, 0, 0, 0) if mask is None else mask.stride())


def _on_hopper(
    table: dict,
    scale: float,
    attn_mask: Tensor | None,
    band: tuple[int | None, int | None],
    places: Places,
    form: Form,
    *tensors: Tensor,
) -> bool:
    """Whether the kernels in Gluon run a call on q, k, v (and dout): 16-bit floats on sm_90 of the
    head dims in `table`, plain scores, no mask but the causal one, all within reach of the copy
    engine.

    All else runs on the kernels of this file.
    """
    q, _, v, *_ = tensors
    return (
        _hopper is not None
        and capability(q.device) // 10 == 9
        and _configs.storage(q.dtype) == torch.float16
        and (q.shape[-1], v.shape[-1]) in table
        and attn_mask is None
        and band in ((None, None), (None, 0))
        and not places.packed
        and form.plain
        and scale > 0
        and all(map(_hopper.reachable, tensors))
    )


def _room(like: Tensor, places: Places) -> Tensor:
    """Where a gradient goes: zeros where rows may belong to no sequence."""
    made = empty_rows_like(like)
    return made.zero_() if places.packed else made


def _fwd_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    stats: Tensor | None,
    lack: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    used: Tensor | None,
    pages: Tensor | None,
    numbers: tuple[Any, ...],
    page_size: int,
    ends_meet: bool,
    band: tuple[int | None, int | None],
    scale: float,
) -> Call:
    places = Places(starts_q, starts_k, used, pages, page_size, ends_meet)
    form = Form.of(slopes, seed, numbers)
    table = _configs.ATTENTION_FWD_SM90
    if sinks is None and _on_hopper(table, scale, mask, band, places, form, q, k, v):
        return _attention_sm90.plan(q, k, v, out, lse, band == (None, 0), scale)
    B, N, S_q, D = q.shape
    S_k, D_v = v.shape[2:]
    options = _options(_configs.ATTENTION_FWD, q, v, mask, band, places, scale, form)
    args = (
        q,
        k,
        v,
        mask,
        out,
        lse,
        stats,
        lack,
        N,
        N // max(k.shape[1], 1),
        S_q,
        S_k,
        starts_q,
        starts_k,
        used,
        places.sequences,
        *band,
        pages,
        0 if pages is None else pages.shape[1],
        page_size,
        D,
        D_v,
        scale,
        sinks,
        *form,
        *_steps(q, k, v, mask),
        *out.stride()[:3],
    )
    grid = (places.tiles(S_q, options["BLOCK_M"]) * B * N,)
    return Call(attention_fwd_kernel, grid, args, options)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    band: tuple[int | None, int | None],
    scale: float,
    softcap: float = 0.0,
    diagonal: int = 0,
    dropout_p: float = 0.0,
    keep: bool = True,
    places: Places = ONE,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Attention and the log-sum-exp of the scores.

    Args:
        q: [B, N, S_q, D].
        k: [B, N_kv, S_k, D]; N is a multiple of N_kv.
        v: [B, N_kv, S_k, D_v].
        attn_mask: None, or [B, N, S_q, S_k] of any strides, or 1 for any of them, bool (True:
            attend) or added to the scores.
        sinks: [N], a score more in the row of each query of a head.
        alibi_slopes: [N] or [B, N], what a score loses a step from the query's own place.
        seed: [1] in int64, of the dropout.
        band: the first and last j - i at which query i sees key j; None for no bound.
        scale: what the scores are multiplied by.
        softcap: c > 0 makes c * tanh(score / c) of a scaled score.
        diagonal: the own place of query i is key i + diagonal; of packed sequences `places` says.
        dropout_p: the probability of dropping a weight.
        places: where sequences are packed.
        keep: whether there may be a backward pass.

    Returns:
        ``((out [B, N, S_q, D_v], lse [B, N, S_q]), saved)``; 0 and -inf in rows of no sequence.
    """
    B, N, S_q, D = q.shape
    D_v = v.shape[3]
    saved = (q, k, v, attn_mask, sinks, alibi_slopes, seed)
    form = _form(q, alibi_slopes, seed, diagonal, softcap, dropout_p)
    q, k, v, mask = _dense(q, k, v, attn_mask)
    # Laid out as q where that is possible: what follows attention reshapes without a copy.
    out = empty_rows_like(q) if D_v == D else q.new_empty(B, N, S_q, D_v)
    lse = torch.empty(B, N, S_q, dtype=compute_dtype(q.dtype), device=q.device)
    row_stats = attention_extras(*saved)[0] if keep and _added(attn_mask) else lse
    if places.packed:
        out.zero_()
        lse.fill_(float("-inf"))
    if lse.numel() > 0:
        sinks = None if sinks is None else sinks.contiguous()
        more = (None, None) if row_stats is lse else row_stats
        tensors = (q, k, v, mask, out, lse, *more, sinks, form.slopes, form.seed, *places[:4])
        launch(_fwd_plan, tensors, form.numbers, *places[4:], band, scale)
    return (out, lse), (*saved, out, row_stats)


def _added(attn_mask: Tensor | None) -> bool:
    return attn_mask is not None and attn_mask.dtype != torch.bool


def attention_extras(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, *_: Tensor | None, **options: object
) -> tuple[Tensor]:
    """Room for what `attention_fwd` saves behind out: lse and, under an added mask, what exp(S -
    lse) lacks of a weight."""
    both = (2,) if _added(attn_mask) else ()
    return (q.new_empty(*both, *q.shape[:3], dtype=compute_dtype(q.dtype)),)


def _delta_plan(
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    lack: Tensor | None,
    to: Tensor | None,
    delta: Tensor,
    units: Tensor | None,
) -> Call:
    B, N, S_q, D_v = out.shape
    config, rows = _configs.ATTENTION_DELTA, delta.shape[2]
    args = (
        out,
        dout,
        lse,
        dlse,
        lack,
        to,
        delta,
        units,
        N,
        S_q,
        rows,
        D_v,
        *out.stride()[:3],
        *dout.stride()[:3],
    )
    constants = {
        "ACC": TRITON_DTYPES[compute_dtype(out.dtype)],
        "HAS_DLSE": dlse is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_DV": block_size(D_v, LEAST_BLOCK_D),
        "num_warps": config.num_warps,
        **LAUNCH,
    }
    grid = (_common.cdiv(rows, config.block_m) * B * N,)
    return Call(attention_bwd_delta_kernel, grid, args, constants)


def _bwd_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    slopes: Tensor | None,
    seed: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    used: Tensor | None,
    numbers: tuple[Any, ...],
    ends_meet: bool,
    band: tuple[int | None, int | None],
    scale: float,
) -> Call:
    """That of dq or, without it, that of dk and dv."""
    places = Places(starts_q, starts_k, used, ends_meet=ends_meet)
    form = Form.of(slopes, seed, numbers)
    B, N, S_q, D = q.shape
    N_kv, S_k, D_v = v.shape[1:]
    made = (dk, dv) if dq is None else (dq,)
    table = _configs.ATTENTION_DKV if dq is None else _configs.ATTENTION_DQ
    options = _options(table, q, v, mask, band, places, scale, form)
    args = (
        q,
        k,
        v,
        mask,
        dout,
        lse,
        delta,
        *made,
        N,
        N // max(N_kv, 1),
        S_q,
        S_k,
        starts_q,
        starts_k,
        used,
        places.sequences,
        *band,
        D,
        D_v,
        scale,
        *form,
        *_steps(q, k, v, mask),
        *dout.stride()[:3],
        *(step for t in made for step in t.stride()[:3]),
    )
    if dq is None:
        grid = (places.tiles(S_k, options["BLOCK_N"]) * B * N_kv,)
        return Call(attention_bwd_dkv_kernel, grid, args, options)
    grid = (places.tiles(S_q, options["BLOCK_M"]) * B * N,)
    return Call(attention_bwd_dq_kernel, grid, args, options)


def _dmask_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    slopes: Tensor | None,
    seed: Tensor | None,
    dmask: Tensor,
    numbers: tuple[Any, ...],
    band: tuple[int | None, int | None],
    scale: float,
) -> Call:
    form = Form.of(slopes, seed, numbers)
    B, N, S_q, D = q.shape
    N_kv, S_k, D_v = v.shape[1:]
    options = _options(_configs.ATTENTION_DMASK, q, v, mask, band, ONE, scale, form)
    del options["ENDS_MEET"], options["BLOCK_B"]
    blocks = (1, 1, options["BLOCK_M"], options["BLOCK_N"])
    own = tuple(map(_common.cdiv, dmask.shape, blocks))
    args = (
        q,
        k,
        v,
        mask,
        dout,
        lse,
        delta,
        dmask,
        B,
        N,
        N // max(N_kv, 1),
        S_q,
        S_k,
        *band,
        D,
        D_v,
        scale,
        *form,
        *_steps(q, k, v, mask),
        *dout.stride()[:3],
        *own,
        dmask.shape[2] == 1,
        dmask.shape[3] == 1,
    )
    return Call(attention_bwd_dmask_kernel, (math.prod(own),), args, options)


def attention_bwd(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, Tensor | None],
    *,
    band: tuple[int | None, int | None],
    scale: float,
    softcap: float = 0.0,
    diagonal: int = 0,
    dropout_p: float = 0.0,
    needs: tuple[bool, ...],
    places: Places = ONE,
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, an added mask and the sinks.

    Args:
        saved: what `attention_fwd` returned: (q, k, v, attn_mask, sinks, alibi_slopes, seed, out,
            row_stats), with None for what there is not; lse may be in the place of row_stats.
        grads: (dout [B, N, S_q, D_v], dlse [B, N, S_q]), None for zeros.
        band, scale, softcap, diagonal, dropout_p, places: as in `attention_fwd`.
        needs: which of the gradients are wanted.

    Returns:
        ``(dq, dk, dv, dmask, dsinks, None, None)``, None where not wanted; dmask is summed over
        what was broadcast.
    """
    q, k, v, attn_mask, sinks, alibi_slopes, seed, out, row_stats = saved
    lse, lack = (row_stats, None) if row_stats.dim() == 3 else row_stats
    dout, dlse = grads
    B, N, S_q, _ = q.shape
    form = _form(q, alibi_slopes, seed, diagonal, softcap, dropout_p)
    q, k, v, mask = _dense(q, k, v, attn_mask)
    out = with_dense_rows(out)
    dout = torch.zeros_like(out) if dout is None else with_dense_rows(dout)

    table = _configs.ATTENTION_DQ_SM90
    on_hopper = _on_hopper(table, scale, mask, band, places, form, q, k, v, dout)
    # units[0] is lse as kernels on Hopper take it, units[1] is delta; there, whole tiles of both.
    rows = _common.cdiv(S_q, _hopper.BLOCK.value) * _hopper.BLOCK.value if on_hopper else S_q
    units = torch.empty(1 + on_hopper, B, N, rows, dtype=lse.dtype, device=lse.device)
    delta = units[-1]
    if delta.numel() > 0:
        dlse = None if dlse is None else dlse.contiguous()
        to = None if lack is None else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        more = (lack, to, delta, units[0] if on_hopper else None)
        launch(_delta_plan, (out, dout, lse, dlse, *more))
        dout = dout if to is None else to
    dsinks = None
    if needs[4]:
        # A sink is a score whose dP is 0. `delta` may have rows behind S_q, lse be -inf.
        weight = torch.exp(sinks[:, None] - lse.masked_fill(lse == float("-inf"), float("inf")))
        dsinks = (weight * -delta[..., :S_q]).sum((0, 2)).to(sinks.dtype)
    if on_hopper:
        causal = band == (None, 0)
        made = _attention_sm90_bwd.attention_bwd_sm90(q, k, v, dout, units, causal, scale, needs)
        return (*made, None, dsinks, None, None)

    dq = dk = dv = None
    given = (q, k, v, mask, dout, lse, delta, form.slopes, form.seed)
    more = (form.numbers, places.ends_meet, band, scale)
    if needs[0]:
        dq = _room(q, places)
        if dq.numel() > 0:
            launch(_bwd_plan, (*given, dq, None, None, *places[:3]), *more)
    if needs[1] or needs[2]:
        dk, dv = _room(k, places), _room(v, places)
        if dk.numel() > 0:
            launch(_bwd_plan, (*given, None, dk, dv, *places[:3]), *more)
    dmask = None
    if needs[3]:
        dmask = attn_mask.new_empty(attn_mask.shape)
        if dmask.numel() > 0:
            launch(_dmask_plan, (*given, dmask), form.numbers, band, scale)
    return dq, dk if needs[1] else None, dv if needs[2] else None, dmask, dsinks, None, None
