"""Self-attention: `attention`, and torch's `scaled_dot_product_attention` on top of it."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pykernels import _autocast, _backends, _checks
from pykernels.ops import _autograd, _calls, _library
from pykernels.ops._calls import Call


class AttentionFunction(_autograd.Function):
    """Autograd over one backend's ``attention_fwd`` and ``attention_bwd``; differentiable twice."""


def _empty(q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


def _formula(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    reference = _backends.module("reference", "attention")
    out, lse = reference.attention(*tensors, **options, return_lse=True)
    return out, lse.to(torch.promote_types(out.dtype, torch.float32))


def _axes(*tensors: Any, dropout_p: float = 0.0, **options: Any) -> Any:
    if dropout_p > 0:
        return None  # what is dropped is drawn by the place in the batch
    slopes = 0 if tensors[5] is not None and tensors[5].dim() == 2 else None
    return (0, 0, 0, 0, None, slopes, None), (0, 0, -3)


_library.Operator(
    "attention",
    tensors="Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, "
    "Tensor? seed",
    options="SymInt?[2] band, float scale, float softcap=0.0, SymInt diagonal=0, "
    "float dropout_p=0.0",
    outputs="out lse",
    extras="row_stats",
    empty=_empty,
    formula=_formula,
    axes=_axes,
)


#: Bytes of a head, in the dtype of the arithmetic, above which it is a "large_head": several such
#: rows of queries, keys and their gradients are more than a GPU's multiprocessor holds.
LARGE_HEAD = 1024


_NONE: frozenset[str] = frozenset()
#: The first and last j - i at which query i sees key j; None for no bound.
Band = tuple[int | None, int | None]
ALIGNMENTS = ("top-left", "bottom-right")


def features(
    dtype: torch.dtype,
    D: int,
    D_v: int,
    band: Band,
    softcap: float = 0.0,
    sinks: bool = False,
    alibi: bool = False,
    dropout: bool = False,
) -> frozenset[str]:
    """The optional features that heads of these sizes, a band and so on ask of a backend."""
    large = max(D, D_v) * max(dtype.itemsize, 4) > LARGE_HEAD
    window = band not in ((None, None), (None, 0))
    if D_v == D and not (large or window or softcap or sinks or alibi or dropout):
        return _NONE
    asked = {
        "v_head_dim": D_v != D,
        "large_head": large,
        "window": window,
        "softcap": softcap > 0,
        "sinks": sinks,
        "alibi": alibi,
        "dropout": dropout,
    }
    return frozenset(name for name, is_asked in asked.items() if is_asked)


def band_of(
    S_q: int,
    S_k: int,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    causal_alignment: str,
) -> Band:
    """Which keys the causal rule and a window leave to each query."""
    diagonal = diagonal_of(S_q, S_k, causal_alignment)
    left, right = (None, None) if window is None else window
    if is_causal:
        right = 0  # a window's is at least that
    first = None if left is None else diagonal - left
    return first, None if right is None else diagonal + right


def options_of(
    q: Tensor,
    band: Band,
    scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    diagonal: int,
) -> dict[str, Any]:
    """What a backend takes beside tensors: no more than the call asks for."""
    options: dict[str, Any] = {
        "band": band,
        "scale": 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
    }
    if softcap:
        options["softcap"] = float(softcap)
    if alibi_slopes is not None:
        options["diagonal"] = diagonal
    return options


def diagonal_of(S_q: int, S_k: int, causal_alignment: str) -> int:
    """d such that the own place of query i is key i + d."""
    return S_k - S_q if causal_alignment == "bottom-right" else 0


def draw_seed(device: torch.device) -> Tensor:
    """The seed of a call's dropout, [1] in int64, from torch's generator of the device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)


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
    q, k, v, attn_mask, sinks, alibi_slopes = tensors
    _checks.flags("attention", is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse)
    check_inputs("attention", q, k, v, attn_mask, sinks, alibi_slopes, enable_gqa)
    check_options("attention", scale, window, softcap, causal_alignment, dropout_p)
    S_q, S_k = q.shape[2], k.shape[2]
    band = band_of(S_q, S_k, is_causal, window, causal_alignment)
    diagonal = diagonal_of(S_q, S_k, causal_alignment)
    return _call(tensors, backend, band, scale, softcap, diagonal, dropout_p, return_lse)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "top-left",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "top-left",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "top-left",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "top-left",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact attention that never builds the matrix of scores.

    .. math:: \mathrm{out} = \mathrm{softmax}(\mathrm{scale} \cdot Q K^T + \mathrm{mask}) V

    A. Vaswani et al., "Attention is all you need" (2017); computed tile by tile with an online
    softmax as in T. Dao, "FlashAttention-2" (2023). Unlike torch's function it may return the
    log-sum-exp of the scores, differentiable too, so that pieces computed apart can be merged.

    Args:
        q: queries, [B, N, S_q, D], any floating dtype.
        k: keys, [B, N_kv, S_k, D].
        v: values, [B, N_kv, S_k, D_v].
        attn_mask: broadcastable to [B, N, S_q, S_k]: boolean, True where a query may see a key, or
            of q's dtype and added to the scores; if it requires a gradient, that is summed over
            what was broadcast.
        is_causal: query i sees no key behind its own place, which is key i or as
            `causal_alignment` has it; with `attn_mask` and `window` all apply.
        window: (left, right): a query sees so many keys before its own place and behind it, all
            where None. Keys outside cost no time.
        causal_alignment: what the own place of query i is: key i ("top-left", as torch), or, so
            that the last query stands at the last key, key i + S_k - S_q ("bottom-right").
        scale: 1/sqrt(D) if None.
        softcap: c > 0 makes c * tanh(score / c) of the scaled scores, before any mask (Gemma Team,
            "Gemma 2", 2024); 0 leaves them alone.
        sinks: [N] of q's dtype: by head, a score that takes part in each softmax, as of one more
            key that no mask hides and whose value is 0 (OpenAI, "gpt-oss", 2025); has a gradient.
        alibi_slopes: [N] or [B, N], any floating dtype: a score loses the head's slope for each key
            between it and the query's own place (O. Press et al., "Train short, test long", 2022);
            after `softcap`. Has no gradient.
        dropout_p: the probability of dropping a weight, which the softmax has counted; the others
            grow by 1/(1 - dropout_p). The draw is a function of a seed from torch's generator and
            the weight's place, so that backward repeats it and none is stored.
        enable_gqa: let N be a multiple of N_kv; query head n reads head n // (N // N_kv).
        return_lse: return ``(out, lse)``.
        backend: "cpp", "triton" or "reference"; None takes the fastest that serves the call.

    Returns:
        ``out`` [B, N, S_q, D_v] in q's dtype, or ``(out, lse)`` with ``lse`` [B, N, S_q] in float32
        (float64 for float64), rounded at the size of a score: weights made from it are no better.
        A query that sees no key gets out = 0, lse = -inf (or its sink) and no gradient. From the
        kernels the axes of out lie in memory in the order of q's, if q's last one is contiguous;
        where compilers and transforms look on, from the reference and of a D_v that is not D on a
        GPU, out is contiguous.

    Raises:
        TypeError: something is no tensor, dtypes differ or are not floating, scale is no number,
            window is no pair of integers, a flag is no bool.
        ValueError: a rank, size, device, alignment or backend is wrong; D is zero; window is
            negative; dropout_p is no probability; alibi_slopes requires a gradient.
    """
    tensors = (q, k, v, attn_mask, sinks, alibi_slopes)
    call = _checked(
        tensors,
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
    seed = draw_seed(q.device) if dropout_p > 0 else None
    out, lse = call.outputs((q, k, v, four_axes(attn_mask), sinks, alibi_slopes, seed))
    return (out, lse) if return_lse else out


@_calls.once
def _checked_stock(
    tensors: tuple[Any, ...],
    backend: None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Call | _Folded:
    op = "scaled_dot_product_attention"
    query, key, value, attn_mask = tensors
    _checks.tensor(op, "query", query)
    if key is None or value is None:
        _checks.tensor(op, "key", key)
        _checks.tensor(op, "value", value)
    _checks.alike(op, query, ("key", "value"), (key, value))
    _checks.floating(op, "query", query)
    for name, given in (("query", query), ("key", key), ("value", value)):
        if given.dim() < 2:
            _checks.fail(op, name, "[..., S, D]", list(given.shape))
    _check_dropout(op, dropout_p)
    _check_scale(op, scale)
    _checks.flags(op, is_causal=is_causal, enable_gqa=enable_gqa)
    S_q, D = query.shape[-2:]
    S_k, D_v = key.shape[-2], value.shape[-1]
    _checks.positive(op, "head dim D", D)
    if key.shape[-1] != D:
        _checks.shape(op, "key", key, "..., S_k, D", (*key.shape[:-1], D))
    if value.shape[-2] != S_k:
        _checks.shape(op, "value", value, "..., S_k, D_v", (*value.shape[:-2], S_k, D_v))
    if attn_mask is not None:
        attn_mask = _of_dtype(attn_mask, query)
        _check_mask(op, attn_mask, query)
    lead, heads, kv_heads = _leading(op, query, key, value, enable_gqa)
    if attn_mask is not None:
        sizes = (*lead, heads, S_q, S_k)[2:]
        _checks.broadcastable(op, "attn_mask", attn_mask, "..., N, S_q, S_k", sizes)
    band = (None, 0) if is_causal else (None, None)
    call = _call((*tensors, None, None), None, band, scale, 0.0, 0, dropout_p, False)
    folded = (query, heads), (key, kv_heads), (value, kv_heads)
    if attn_mask is None and all(t.shape[:-2] == (math.prod(lead), n) for t, n in folded):
        return call
    return _Folded(call, lead, heads, kv_heads)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, the same signature to the letter.

    It is `attention`, where the sources stand, for any number of leading axes.

    Args:
        query: [..., S_q, D] or, with heads, [..., N, S_q, D]; any floating dtype.
        key: [..., N_kv, S_k, D].
        value: [..., N_kv, S_k, D_v].
        attn_mask: broadcastable to [..., N, S_q, S_k]; boolean (True = attend), or float32 or of
            query's dtype and added to the scores.
        dropout_p: the probability of dropping a weight, as `attention` does: with torch's seed, but
            not with torch's numbers.
        is_causal: query i sees the keys j <= i only; with `attn_mask` both apply.
        scale: 1/sqrt(D) if None.
        enable_gqa: let the heads of query be a multiple of those of key and value.

    Returns:
        [..., N, S_q, D_v] in the dtype of query; zeros for a query that sees no key. It lies in
        memory as that of `attention` does.

    Raises:
        TypeError, ValueError: as `attention`; also for a `dropout_p` outside [0, 1].
    """
    query, key, value, attn_mask = _autocast.cast(query, key, value, attn_mask)
    tensors = (query, key, value, attn_mask)
    call = _checked_stock(tensors, None, dropout_p, is_causal, scale, enable_gqa)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    out: Tensor
    out, _ = call.outputs((*tensors, None, None, seed))
    return out


class _Folded:
    """A call on tensors that have any axes before the heads, or none."""

    def __init__(self, call: Call, lead: tuple[int, ...], heads: int, kv_heads: int) -> None:
        """`lead` are the sizes of all axes before the heads once they are broadcast."""
        self.call, self.lead, self.heads, self.kv_heads = call, lead, heads, kv_heads

    def outputs(self, tensors: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """The outputs, the first of them with the axes of the tensors."""
        query, key, value, attn_mask, *rest = tensors
        if attn_mask is not None:
            attn_mask = _fold_mask(_of_dtype(attn_mask, query), self.lead)
        q = _fold(query, self.lead, self.heads)
        k, v = (_fold(t, self.lead, self.kv_heads) for t in (key, value))
        out, lse = self.call.outputs((q, k, v, attn_mask, *rest))
        return out.reshape(*(*self.lead, self.heads)[2:], *out.shape[2:]), lse

    def unseen(self, is_recorded: bool) -> _Folded:
        """As `Call.unseen`."""
        return _Folded(self.call.unseen(is_recorded), self.lead, self.heads, self.kv_heads)


def _leading(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], int, int]:
    """The common sizes before the heads, the heads of query, and those of key and value.

    Two axes of size one stand before what the tensors have, so that [S, D] has heads too.
    """
    shapes = [(1, 1, *t.shape[:-2]) for t in (query, key, value)]
    try:
        if enable_gqa:
            heads, kv_heads = shapes[0][-1], shapes[1][-1]
            if kv_heads != shapes[2][-1] or not _groups(heads, kv_heads):
                _checks.fail(
                    op,
                    "query",
                    "of a multiple of the equal heads of key and value",
                    " and ".join(str(list(t.shape)) for t in (query, key, value)),
                )
            lead = torch.broadcast_shapes(*(shape[:-1] for shape in shapes))
        else:
            same = shapes[0] == shapes[1] == shapes[2]  # torch takes long to find that out
            *lead, heads = shapes[0] if same else torch.broadcast_shapes(*shapes)
            kv_heads = heads
    except RuntimeError:
        _checks.fail(
            op,
            "key",
            f"broadcastable with query {list(query.shape)} and value "
            f"{list(value.shape)} before the last two axes",
            list(key.shape),
        )
    return tuple(lead), heads, kv_heads


def _groups(heads: int, kv_heads: int) -> bool:
    """Whether the query heads fall into groups, one or more of them to each head of K and V."""
    return heads == kv_heads or (heads > 0 and kv_heads > 0 and heads % kv_heads == 0)


def _fold(t: Tensor, lead: tuple[int, ...], heads: int) -> Tensor:
    """[..., N, rows, columns] with all sizes before the heads folded into one batch axis."""
    rows = t.shape[-2:]
    folded = (math.prod(lead), heads, *rows)
    return t if t.shape == folded else t.expand(*lead, heads, *rows).reshape(folded)


def _fold_mask(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """`_fold` of what broadcasts: an axis of size one stays one, the batch if all of it is one."""
    mask = mask[(None,) * (len(lead) + 3 - mask.dim())]
    if any(size != 1 for size in mask.shape[:-3]):
        mask = mask.expand(*lead, *mask.shape[-3:])
    return mask.flatten(0, -4)


def _of_dtype(attn_mask: Any, query: Tensor) -> Any:
    """The mask in the dtype of the query if it is of float32, which torch takes with any."""
    is_float32 = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.float32
    return attn_mask.to(query.dtype) if is_float32 else attn_mask


def four_axes(attn_mask: Tensor | None) -> Tensor | None:
    """The mask with all its axes, [B, N, S_q, S_k] or what broadcasts to that."""
    if attn_mask is None or attn_mask.dim() == 4:
        return attn_mask
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def _check_mask(op: str, attn_mask: Tensor, like: Tensor) -> None:
    boolean = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool
    _checks.tensor(op, "attn_mask", attn_mask, None if boolean else like)
    _checks.device(op, "attn_mask", attn_mask, like)


def _check_window(op: str, window: Any) -> None:
    """`window` is a pair of integers from 0 on, or None."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: `window` must be a pair (left, right), got {window!r}")
    for side in window:
        if side is not None and not _checks.is_integer(side):
            raise TypeError(f"{op}: `window` must be of integers or None, got {window!r}")
        if side is not None and side < 0:
            _checks.fail(op, "window", "of sides of at least 0, or None", window)


def check_inputs(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    enable_gqa: bool,
) -> None:
    """The tensors, of the sizes that `attention` says."""
    _checks.tensor(op, "q", q)
    if k is None or v is None:
        _checks.tensor(op, "k", k)
        _checks.tensor(op, "v", v)
    _checks.alike(op, q, ("k", "v"), (k, v))
    _checks.floating(op, "q", q)
    _checks.rank(op, "q", q, "B, N, S_q, D")
    _checks.rank(op, "k", k, "B, N_kv, S_k, D")
    _checks.rank(op, "v", v, "B, N_kv, S_k, D_v")
    B, N, S_q, D = q.shape
    _, N_kv, S_k, _ = k_shape = k.shape
    check_heads(op, q, k, N, N_kv, enable_gqa)
    _checks.positive(op, "head dim D", D)
    if k_shape[0] != B or k_shape[3] != D:
        _checks.shape(op, "k", k, "B, N_kv, S_k, D", (B, N_kv, S_k, D))
    if v.shape[:3] != k_shape[:3]:
        _checks.shape(op, "v", v, "B, N_kv, S_k, D_v", (B, N_kv, S_k, v.shape[3]))
    if attn_mask is not None:
        _check_mask(op, attn_mask, q)
        _checks.broadcastable(op, "attn_mask", attn_mask, "B, N, S_q, S_k", (B, N, S_q, S_k))
    check_head_tensors(op, q, sinks, alibi_slopes, B, N)


def check_heads(op: str, q: Tensor, k: Tensor, N: int, N_kv: int, enable_gqa: bool) -> None:
    """N query heads may read N_kv heads of keys."""
    if enable_gqa:
        if not _groups(N, N_kv):
            _checks.fail(op, "q", f"of a multiple of N_kv = {N_kv} heads", list(q.shape))
    elif N_kv != N:
        _checks.fail(op, "k", f"of N = {N} heads unless enable_gqa is True", list(k.shape))


def check_options(
    op: str,
    scale: float | None,
    window: Any,
    softcap: float,
    causal_alignment: str,
    dropout_p: float,
) -> None:
    """The options that are no tensors."""
    _check_scale(op, scale)
    if window is not None:
        _check_window(op, window)
    _checks.number(op, "softcap", softcap)
    if not 0 <= softcap < math.inf:
        _checks.fail(op, "softcap", "at least 0 and finite", softcap)
    _checks.choice(op, "causal_alignment", causal_alignment, ALIGNMENTS)
    _check_dropout(op, dropout_p)


def check_head_tensors(
    op: str, q: Tensor, sinks: Tensor | None, alibi_slopes: Tensor | None, B: int, N: int
) -> None:
    """The numbers by head of B sequences."""
    if sinks is not None:
        _checks.tensor(op, "sinks", sinks, q)
        _checks.shape(op, "sinks", sinks, "N", (N,))
    if alibi_slopes is not None:
        _check_slopes(op, alibi_slopes, q, B, N)


def _check_slopes(op: str, slopes: Tensor, q: Tensor, B: int, N: int) -> None:
    name = "alibi_slopes"
    _checks.tensor(op, name, slopes)
    _checks.floating(op, name, slopes)
    _checks.device(op, name, slopes, q)
    if slopes.shape != (N,) and slopes.shape != (B, N):
        _checks.fail(op, name, f"[N] or [B, N] = [{N}] or [{B}, {N}]", list(slopes.shape))
    if slopes.requires_grad and torch.is_grad_enabled():
        _checks.fail(op, name, "without a gradient: pass a learned bias as attn_mask", "one")


def _check_dropout(op: str, dropout_p: float) -> None:
    _checks.number(op, "dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        _checks.fail(op, "dropout_p", "between 0 and 1", dropout_p)


def _check_scale(op: str, scale: float | None) -> None:
    if scale is not None:
        _checks.number(op, "scale", scale)


def _call(
    tensors: tuple[Any, ...],
    backend: str | None,
    band: Band,
    scale: float | None,
    softcap: float,
    diagonal: int,
    dropout_p: float,
    return_lse: bool,
) -> Call:
    """A call of checked arguments: q, k, v, attn_mask, sinks, alibi_slopes, and the rest."""
    q, _, v, mask, sinks, alibi_slopes = tensors
    wanted = features(
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        band,
        softcap,
        sinks is not None,
        alibi_slopes is not None,
        dropout_p > 0,
    )
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        wanted |= {"mask_grad"}
    chosen = _backends.select("attention", backend, q.device, q.dtype, wanted)
    options = options_of(q, band, scale, softcap, alibi_slopes, diagonal)
    if dropout_p > 0:
        options["dropout_p"] = float(dropout_p)
    skip = () if return_lse else (1,)
    return Call("attention", AttentionFunction, chosen, options, skip)
