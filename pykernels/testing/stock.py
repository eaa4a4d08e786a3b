"""The same computations in stock PyTorch, with the arguments of `pykernels.functional`.

They are what the README names as the equivalent lines, tests measure against and benchmarks time.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pykernels.ops.attention import draw_seed
from pykernels.reference._philox import keep_mask


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Sequence[int] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer of torch.nn.RNN on x [T, B, I] with these weights -> y [T, B, H], h_n [B, H]."""
    layer = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[nonlinearity]
    h0 = x.new_zeros(x.shape[1], w_hh.shape[1]) if h0 is None else h0
    y, (h_n,) = _layer(layer, x, [w_ih, w_hh, b_ih, b_hh], [h0], lengths, reverse)
    return y, h_n


def gru(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    lengths: Sequence[int] | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer of torch.nn.GRU, as `rnn`."""
    h0 = x.new_zeros(x.shape[1], w_hh.shape[1]) if h0 is None else h0
    y, (h_n,) = _layer(torch.gru, x, [w_ih, w_hh, b_ih, b_hh], [h0], lengths, reverse)
    return y, h_n


def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    w_hr: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
) -> Any:
    """One layer of torch.nn.LSTM, as `rnn`.

    It returns no cell states but the last, and takes no projection that is as wide as the cells:
    these calls are a loop over torch.lstm_cell.
    """
    H, R = w_hh.shape[0] // 4, w_hh.shape[1]
    h0 = x.new_zeros(x.shape[1], R) if h0 is None else h0
    c0 = x.new_zeros(x.shape[1], H) if c0 is None else c0
    weights = [w_ih, w_hh, b_ih, b_hh, w_hr]
    if return_cell_states or (w_hr is not None and R == H):
        y, last, c = _lstm_loop(x, weights, h0, c0, lengths, reverse)
        return (y, last, c) if return_cell_states else (y, last)
    y, last = _layer(torch.lstm, x, weights, [h0, c0], lengths, reverse)
    return y, tuple(last)


def _layer(
    layer: Callable[..., Any],
    x: Tensor,
    weights: list[Tensor | None],
    states: list[Tensor],
    lengths: Sequence[int] | None,
    reverse: bool,
) -> tuple[Tensor, list[Tensor]]:
    """One of torch's recurrent functions on x [T, B, I] and states [B, .] -> y, the last states.

    torch's layers refuse T = 0 and have no reversed direction alone: the first returns the states,
    as no step was made, the second flips time before and after.
    """
    T, B, _ = x.shape
    if T == 0:
        return x.new_zeros(0, *states[0].shape), [t.clone() for t in states]
    flip = _flip(T, B, lengths, x.device) if reverse else None
    # cuDNN's layers ask for dense tensors
    given = [w.contiguous() for w in weights if w is not None]
    x = x.contiguous() if flip is None else x[flip]
    # arguments: has_biases, num_layers, dropout, train, bidirectional
    rest = (given, weights[2] is not None, 1, 0.0, True, False)
    if lengths is None:
        hx = [t[None].contiguous() for t in states]
        y, *last = layer(x, hx if len(hx) > 1 else hx[0], *rest, False)  # not batch first
    else:
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        data, batch_sizes, order, place = packed
        hx = [t[None, order] for t in states]
        y, *last = layer(data, batch_sizes, hx if len(hx) > 1 else hx[0], *rest)
        y, _ = pad_packed_sequence(PackedSequence(y, batch_sizes, order, place), total_length=T)
        last = [t[:, place] for t in last]
    return (y if flip is None else y[flip]), [t[0] for t in last]


def _flip(T: int, B: int, lengths: Sequence[int] | None, device: torch.device) -> Any:
    """What indexes [T, B, .] so that each sequence runs from its own last step to its first."""
    t = torch.arange(T, device=device)
    if lengths is None:
        return T - 1 - t
    ends, t = torch.tensor(lengths, device=device), t[:, None]
    return torch.where(t < ends, ends - 1 - t, t), torch.arange(B, device=device)


def _lstm_loop(
    x: Tensor,
    weights: list[Any],
    h: Tensor,
    c: Tensor,
    lengths: Sequence[int] | None,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """torch.lstm_cell step by step -> y, (h_n, c_n), c.

    A projected state enters the cell as part of its input.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    T, B, _ = x.shape
    ends = torch.tensor([T] * B if lengths is None else lengths, device=x.device)
    y, cells = [h.new_zeros(h.shape)] * T, [c.new_zeros(c.shape)] * T
    for t in reversed(range(T)) if reverse else range(T):
        if w_hr is None:
            h_t, c_t = torch.lstm_cell(x[t], (h, c), w_ih, w_hh, b_ih, b_hh)
        else:
            both, w_both = torch.cat([x[t], h], 1), torch.cat([w_ih, w_hh], 1)
            none, w_none = torch.zeros_like(c), w_hh.new_zeros(len(w_hh), c.shape[1])
            m_t, c_t = torch.lstm_cell(both, (none, c), w_both, w_none, b_ih, b_hh)
            h_t = m_t @ w_hr.T
        counts = (t < ends)[:, None]
        h, c = torch.where(counts, h_t, h), torch.where(counts, c_t, c)
        y[t], cells[t] = torch.where(counts, h_t, 0.0), torch.where(counts, c_t, 0.0)
    if T == 0:
        return x.new_zeros(0, *h.shape), (h.clone(), c.clone()), x.new_zeros(0, *c.shape)
    return torch.stack(y), (h, c), torch.stack(cells)


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
    kept: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """F.scaled_dot_product_attention -> out [B, N, S_q, D_v].

    With `return_lse` also lse [B, N, S_q], in plain torch, as is out with what torch's function
    lacks: `softcap`, `sinks`, `alibi_slopes`, and `dropout_p`, which leaves the weights `kept`, by
    default those that this package draws; and as stock torch gives NaN gradients for rows that see
    no key on some paths, such rows are then computed unmasked and set to what this package defines:
    out = 0, lse = -inf, no gradient.
    """
    formula = softcap > 0 or dropout_p > 0 or sinks is not None or alibi_slopes is not None
    if not return_lse and not formula and window is None and causal_alignment == "top-left":
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return _torchs_attention(q, k, v, attn_mask, **options)
    s_q, s_k = q.shape[2], k.shape[2]
    keep = torch.ones(s_q, s_k, dtype=torch.bool, device=q.device)
    key = torch.arange(s_k, device=q.device)
    own = torch.arange(s_q, device=q.device)[:, None]
    if causal_alignment == "bottom-right":
        own = own + s_k - s_q
    left, right = (None, None) if window is None else window
    if is_causal:
        keep = keep & (key <= own)
    if left is not None:
        keep = keep & (key >= own - left)
    if right is not None:
        keep = keep & (key <= own + right)
    if attn_mask is not None:
        keep = keep & (attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf)
    alive = keep.any(-1, keepdim=True)  # [..., S_q, 1]
    keep = keep | ~alive
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        mask = torch.where(keep & alive, attn_mask, torch.where(keep, 0.0, -math.inf).to(q.dtype))
    else:
        mask = keep if attn_mask is not None or not keep.all() else None

    # The log-sum-exp of scores of this size has lost the logarithm of the number of keys. Torch's
    # fused kernels and its logsumexp take it in backward, and every weight of the row for 1.
    far = False
    if mask is not None and mask.is_floating_point() and mask.numel() > 0:
        far = bool((mask.amax(-1).abs() > 1 / torch.finfo(torch.float32).eps).any())
    logsumexp = _logsumexp if far else functools.partial(torch.logsumexp, dim=-1)
    if not formula:
        out = _torchs_attention(q, k, v, mask, scale=scale, plain=far, enable_gqa=enable_gqa)
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * (own - key).abs()
    if mask is not None:
        scores = scores.masked_fill(~keep, -math.inf) if mask is keep else scores + mask
    if sinks is not None:
        scores = scores.masked_fill(~alive, -math.inf)
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    if formula:
        weights = scores.softmax(-1)[..., :s_k]
        if dropout_p:
            if kept is None:
                kept = keep_mask(draw_seed(q.device), dropout_p, *weights.shape)
            weights = weights * kept / (1 - dropout_p) if dropout_p < 1 else 0 * weights
        out = weights @ v
    if sinks is not None:
        return _both(out, logsumexp(scores), return_lse)
    lse = logsumexp(scores) if s_k else q.sum(-1) * 0
    out = torch.where(alive, out, 0.0)
    return _both(out, torch.where(alive.squeeze(-1), lse, -math.inf), return_lse)


def _logsumexp(scores: Tensor) -> Tensor:
    """torch.logsumexp over the keys, with a gradient that is right for scores of any size."""
    top = scores.detach().amax(-1, keepdim=True)
    return top.squeeze(-1) + (scores - top).logsumexp(-1)


def _torchs_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    plain: bool = False,
    **options: Any,
) -> Tensor:
    """F.scaled_dot_product_attention, as matrix products and a softmax where its fused kernels err:
    where the caller knows of it and says `plain`, and in places on a GPU.

    There they read past what is aligned (an error that ends the process's use of the GPU),
    divide by a size of zero, and give NaN for a scale that is not positive.
    """
    tensors = [q, k, v] if mask is None else [q, k, v, mask]
    if q.is_cuda:
        plain |= scale is not None and scale <= 0
        plain |= any(t.numel() == 0 or t.data_ptr() % 16 != 0 for t in tensors)
    with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, **options)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of one sequence after the other, its pages put together."""
    seed = draw_seed(q.device) if dropout_p else None
    outs, lses = [], []
    for b in range(len(cu_seqlens_q) - 1):
        rows = q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]
        if block_table is None:
            mine = slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
            keys, values = k[mine], v[mine]
        else:
            keys, values = (torch.cat([pool[page] for page in block_table[b]]) for pool in (k, v))
        if seqused_k is not None:
            keys, values = keys[: seqused_k[b]], values[: seqused_k[b]]
        one, *two = (t.transpose(0, 1)[None] for t in (rows, keys, values))
        kept = None
        if dropout_p:
            sizes = (1, q.shape[1], rows.shape[0], keys.shape[0])
            kept = keep_mask(seed, dropout_p, *sizes, sequence=b)
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() > 1:
            slopes = slopes[b : b + 1]
        out, lse = attention(
            one,
            *two,
            alibi_slopes=slopes,
            dropout_p=dropout_p,
            return_lse=True,
            kept=kept,
            **options,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return _both(torch.cat(outs), torch.cat(lses, 1), return_lse)


def _both(out: Tensor, lse: Tensor, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    return (out, lse) if return_lse else out


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """F.cross_entropy of F.linear -> loss, a number or [...] as target.

    With `return_lse` also lse [...]. The z-loss, which torch has not, is added in plain torch.
    """
    z = F.linear(x, weight, bias)
    rows, classes = z.reshape(-1, len(weight)), target.reshape(-1)
    loss = F.cross_entropy(
        rows,
        classes,
        class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if z_loss:
        counted = classes != ignore_index
        squares = z_loss * (rows.logsumexp(-1) ** 2).masked_fill(~counted, 0)
        if reduction == "mean":
            squares = squares.sum() / counted.sum()
        loss = loss + (squares.sum() if reduction == "sum" else squares)
    loss = loss.reshape(target.shape) if reduction == "none" else loss
    wide = torch.promote_types(z.dtype, torch.float32)
    return (loss, z.to(wide).logsumexp(-1)) if return_lse else loss
