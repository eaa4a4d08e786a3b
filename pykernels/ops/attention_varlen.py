"""Self-attention of sequences of different lengths that lie one behind the other."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pykernels import _backends, _checks
from pykernels.ops import _autograd, _calls, _library
from pykernels.ops import attention as _attention
from pykernels.ops._calls import Call

OP = "attention_varlen"


class AttentionVarlenFunction(_autograd.Function):
    """Autograd over one backend's ``attention_varlen_fwd`` and ``_bwd``; differentiable twice."""


@_calls.once
def _checked(
    tensors: tuple[Any, ...],
    backend: str | None,
    is_causal: bool,
    window: Any,
    causal_alignment: str,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    enable_gqa: bool,
    return_lse: bool,
) -> Call:
    q, k, v, sinks, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table = tensors
    _checks.flags(OP, is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse)
    paged = block_table is not None
    pages = "P, page_size, " if paged else "T_k, "
    for name, value, axes in (
        ("q", q, "T_q, N, D"),
        ("k", k, pages + "N_kv, D"),
        ("v", v, pages + "N_kv, D_v"),
    ):
        _checks.tensor(OP, name, value, q if name != "q" else None)
        _checks.rank(OP, name, value, axes)
    _checks.floating(OP, "q", q)
    N, D = q.shape[1:]
    N_kv = k.shape[-2]
    _attention.check_heads(OP, q, k, N, N_kv, enable_gqa)
    _checks.positive(OP, "head dim D", D)
    _checks.shape(OP, "k", k, pages + "N_kv, D", (*k.shape[:-2], N_kv, D))
    _checks.shape(OP, "v", v, pages + "N_kv, D_v", (*k.shape[:-2], N_kv, v.shape[-1]))
    _integers("cu_seqlens_q", cu_seqlens_q, q, "B + 1", None)
    B = cu_seqlens_q.shape[0] - 1
    if paged:
        if cu_seqlens_k is not None:
            _checks.fail(OP, "cu_seqlens_k", "None with block_table", "a tensor")
        _integers("block_table", block_table, k, "B, pages", (B, None))
        if seqused_k is None:
            _checks.fail(OP, "seqused_k", "given with block_table", None)
    else:
        _integers("cu_seqlens_k", cu_seqlens_k, k, "B + 1", (B + 1,))
    if seqused_k is not None:
        _integers("seqused_k", seqused_k, q, "B", (B,))
    _attention.check_options(OP, scale, window, softcap, causal_alignment, dropout_p)
    _attention.check_head_tensors(OP, q, sinks, alibi_slopes, B, N)
    if paged and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        _checks.fail(OP, "block_table", "None where a gradient is wanted", "a tensor")
    band = _attention.band_of(0, 0, is_causal, window, "top-left")
    wanted = _attention.features(
        q.dtype,
        D,
        v.shape[-1],
        band,
        softcap,
        sinks is not None,
        alibi_slopes is not None,
        dropout_p > 0,
    )
    options: dict[str, Any] = {
        "band": band,
        "ends_meet": causal_alignment == "bottom-right",
        "scale": 1 / math.sqrt(D) if scale is None else float(scale),
        "softcap": float(softcap),
        "dropout_p": float(dropout_p),
    }
    chosen = _backends.select(OP, backend, q.device, q.dtype, wanted)
    return Call(OP, AttentionVarlenFunction, chosen, options, () if return_lse else (1,))


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "bottom-right",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "bottom-right",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "bottom-right",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "bottom-right",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`attention` of B sequences of different lengths, packed one behind the other.

    No step is padding, and none is computed. Each sequence b is attention by itself:

    .. math:: \mathrm{out}_b = \mathrm{softmax}(\mathrm{scale} \cdot Q_b K_b^T) V_b

    The arguments are those of `torch.nn.attention.varlen.varlen_attn` under the names of T. Dao's
    flash-attn; `is_causal` and `window` are as in `attention`.

    Under torch.compile the values of `cu_seqlens_q` and so on are checked where the graph runs,
    with the same errors; `max_seqlen_q` and `max_seqlen_k` are not. Under vmap what is mapped is
    taken for more heads; mapped places, grouped heads and dropout take one call after the other.

    Args:
        q: queries, [T_q, N, D], any floating dtype.
        k: keys, [T_k, N_kv, D]; or, with `block_table`, pages of them, [P, page_size, N_kv, D].
        v: values, [T_k, N_kv, D_v], or [P, page_size, N_kv, D_v].
        cu_seqlens_q: [B + 1], int32 or int64, from 0 on: sequence b is rows cu_seqlens_q[b] up to
            cu_seqlens_q[b + 1] of q. Rows behind the last get zeros.
        cu_seqlens_k: the same of k and v; None for cu_seqlens_q. Not with `block_table`.
        max_seqlen_q, max_seqlen_k: at least the longest sequence, where given; here for code that
            passes them, since they are known from the above.
        causal_alignment: what the own place of a query is: "bottom-right", so that the last query
            stands at the last key, or "top-left".
        scale, softcap, sinks, dropout_p, enable_gqa: as in `attention`.
        alibi_slopes: [N] or [B, N], as in `attention`.
        seqused_k: [B], int32 or int64: only so many of a sequence's keys count.
        block_table: [B, pages], int32 or int64, with `seqused_k`: key j of sequence b is row
            ``j % page_size`` of page ``block_table[b, j // page_size]``, as in a cache that
            grows page by page (W. Kwon et al., "PagedAttention", 2023). No gradients.
        return_lse: return ``(out, lse)``.
        backend: "cpp", "triton" or "reference"; None takes the fastest that serves the call.

    Returns:
        ``out`` [T_q, N, D_v] in q's dtype, or ``(out, lse)`` with ``lse`` [N, T_q] in float32
        (float64 for float64); differentiable, both. A query that sees no key gets out = 0,
        lse = -inf (or its sink) and no gradient.

    Raises:
        TypeError: something is no tensor, dtypes differ or are not floating, or not integer, or a
            flag is no bool.
        ValueError: a rank, size, device, alignment or backend is wrong; cu_seqlens decrease or
            overrun; seqused_k exceeds what is there; block_table points outside, or stands without
            seqused_k, or a gradient is wanted through it.
    """
    if cu_seqlens_k is None and block_table is None:
        cu_seqlens_k = cu_seqlens_q
    places = (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    call = _checked(
        (q, k, v, sinks, alibi_slopes, *places),
        backend,
        is_causal,
        window,
        causal_alignment,
        scale,
        softcap,
        dropout_p,
        enable_gqa,
        return_lse,
    )
    seed = _attention.draw_seed(q.device) if dropout_p > 0 else None
    tensors = (q, k, v, sinks, alibi_slopes, seed, *places)
    most = (max_seqlen_q, max_seqlen_k)
    if most != (None, None) and not _library.looked_at(call.backend, tensors):
        _check_longest(most, tensors)
    out, lse = call.outputs(tensors, check=_check_values)
    return (out, lse) if return_lse else out


def _integers(
    name: str, value: Any, like: Tensor, axes: str, sizes: tuple[int | None, ...] | None
) -> None:
    """`value` is a tensor of integers of that shape, on the device of `like`; None for any size."""
    _checks.tensor(OP, name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: `{name}` must be of int32 or int64, got {value.dtype}")
    _checks.device(OP, name, value, like)
    _checks.rank(OP, name, value, axes)
    wanted = value.shape if sizes is None else sizes
    pairs = zip(value.shape, wanted, strict=True)
    _checks.shape(OP, name, value, axes, [have if n is None else n for have, n in pairs])


def _check_values(
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
    **options: Any,
) -> None:
    """Where the sequences lie."""
    lengths_q = _lengths("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    lengths_k: list[int] = []
    if cu_seqlens_k is not None:
        lengths_k = _lengths("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if seqused_k is not None:
        room = (
            lengths_k
            if block_table is None
            else [block_table.shape[1] * k.shape[1]] * len(lengths_q)
        )
        used = seqused_k.tolist()
        if any(not 0 <= n <= m for n, m in zip(used, room, strict=True)):
            _checks.fail(OP, "seqused_k", f"from 0 to {room}, the keys that are there", used)
        if block_table is not None:
            _check_pages(block_table, used, k)


def _check_longest(most: tuple[int | None, int | None], tensors: tuple[Any, ...]) -> None:
    """No sequence is longer than max_seqlen_q and max_seqlen_k, which `most` are."""
    cu_seqlens_q, cu_seqlens_k, seqused_k, _ = tensors[6:]
    names = ("max_seqlen_q", "max_seqlen_k")
    for name, given, starts in zip(names, most, (cu_seqlens_q, cu_seqlens_k), strict=True):
        if given is None:
            continue
        if starts is None:  # pages
            longest = max(seqused_k.tolist(), default=0)
        else:
            values = starts.tolist()
            longest = max((end - begin for begin, end in itertools.pairwise(values)), default=0)
        if given < longest:
            _check_values(*tensors)  # what is no place has no length
            _checks.fail(OP, name, f"at least the longest sequence, {longest}", given)


def _lengths(name: str, starts: Tensor, rows: int) -> list[int]:
    """The lengths of the sequences that begin at `starts`, which are checked."""
    values = starts.tolist()
    if not values or values[0] != 0 or values != sorted(values) or values[-1] > rows:
        _checks.fail(OP, name, f"from 0 on, never decreasing, up to {rows} rows", values)
    return [end - begin for begin, end in itertools.pairwise(values)]


def _check_pages(block_table: Tensor, used: list[int], k: Tensor) -> None:
    """Every page that a used key is in exists."""
    pages, size = k.shape[:2]
    for b, (row, count) in enumerate(zip(block_table.tolist(), used, strict=True)):
        for page in row[: math.ceil(count / size) if size else 0]:
            if not 0 <= page < pages:
                _checks.fail(
                    OP, "block_table", f"of pages from 0 to {pages - 1}", f"{page} in row {b}"
                )


def _empty(q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:2], v.shape[-1]), lse


def _formula(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = _backends.module("reference", OP).attention_varlen(*tensors, **options)
    return out, lse.to(torch.promote_types(out.dtype, torch.float32))


def _axes(q: Tensor, k: Tensor, *others: Any, dropout_p: float, **options: Any) -> Any:
    """What is mapped is more heads, as the sequences lie where they lie."""
    if dropout_p > 0 or q.shape[1] != k.shape[-2]:
        return None  # what is dropped is drawn by the head, and groups of heads stay together
    return (-2, -2, -2, 0, -1, None, None, None, None, None), (-2, -2, -2)


_library.Operator(
    OP,
    tensors="Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, "
    "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? block_table",
    options="SymInt?[2] band, bool ends_meet, float scale, float softcap, float dropout_p",
    outputs="out lse",
    extras="row_stats",
    empty=_empty,
    formula=_formula,
    axes=_axes,
    check=_check_values,
    reads_values=True,
)
