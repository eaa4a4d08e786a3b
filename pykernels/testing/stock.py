"""The same computations in stock PyTorch, with the arguments of `pykernels.functional`.

They are what the README names as the equivalent lines, tests measure against and benchmarks time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer of torch.nn.RNN on x [T, B, I] with the given weights -> y [T, B, H], h_n [B, H].

    torch.nn.RNN refuses T = 0 and has no reversed direction alone: the first returns h0, as no
    step was made, the second flips time before and after.
    """
    if h0 is None:
        h0 = x.new_zeros(x.shape[1], w_hh.shape[0])
    if x.shape[0] == 0:
        return x.new_zeros(0, *h0.shape), h0.clone()
    weights = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
    layer = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[nonlinearity]
    # arguments: has_biases, num_layers, dropout, train, bidirectional, batch_first
    y, h_n = layer(
        x.flip(0) if reverse else x, h0[None], weights, b_ih is not None, 1, 0.0, True, False, False
    )
    return (y.flip(0) if reverse else y), h_n[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """F.scaled_dot_product_attention -> out [B, N, S_q, D_v].

    With `return_lse` also lse [B, N, S_q], in plain torch; and as stock torch gives NaN gradients
    for rows that see no key on some paths, such rows are then computed unmasked and set to what
    this package defines: out = 0, lse = -inf, no gradient.
    """
    if not return_lse:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    s_q, s_k = q.shape[2], k.shape[2]
    keep = torch.ones(s_q, s_k, dtype=torch.bool, device=q.device)
    if is_causal:
        keep = keep.tril()
    if attn_mask is not None:
        keep = keep & (attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf)
    alive = keep.any(-1, keepdim=True)  # [..., S_q, 1]
    keep = keep | ~alive
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        mask = torch.where(keep & alive, attn_mask, torch.where(keep, 0.0, -math.inf).to(q.dtype))
    else:
        mask = keep if attn_mask is not None or is_causal else None

    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
    k = k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1) if enable_gqa else k
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~keep, -math.inf) if mask is keep else scores + mask
    lse = scores.logsumexp(-1) if s_k else q.sum(-1) * 0
    return torch.where(alive, out, 0.0), torch.where(alive.squeeze(-1), lse, -math.inf)
