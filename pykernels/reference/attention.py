"""Scaled dot-product attention and its gradient, as the paper writes them.

    S = c(scale * Q K^T) + mask     P = softmax(S)        out = P V        lse = log sum exp(S)

A. Vaswani et al., "Attention is all you need" (2017). The whole [S_q, S_k] matrix is built. A query
that may see no key gets out = 0, lse = -inf and no gradient. A band (first, last) lets query i see
key j only where first <= j - i <= last, with None for no bound: (None, 0) is the causal rule. The
function c is c(x) = softcap * tanh(x / softcap), or c(x) = x where softcap is 0. A sink is a score
of its own in the row of each query of a head, that of a key whose value is 0. ALiBi's slope m of a
head subtracts m |i + diagonal - j| from a score. Of the weights, dropout keeps some, which grow by
1/(1 - dropout_p). Axes:
B batch, N heads, S_q queries, S_k keys, D head dim; with N_kv < N heads of K and V, query head n
reads head n // (N // N_kv).
"""

import math

import torch

from pykernels.reference._philox import keep_mask

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
FEATURES = frozenset(
    {"alibi", "dropout", "large_head", "mask_grad", "sinks", "softcap", "v_head_dim", "window"}
)

#: Every query sees every key.
ALL = (None, None)


def scores(
    q, k, attn_mask=None, alibi_slopes=None, *, band=ALL, scale=None, softcap=0.0, diagonal=0
):
    """``S [B, N, S_q, S_k]``; -inf where a query may not see a key."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    s = scale * (q @ repeat_heads(k, q).transpose(-2, -1))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        i, j = (torch.arange(n, device=q.device) for n in (q.shape[2], k.shape[2]))
        steps = (i[:, None] + diagonal - j).abs()
        s = s - alibi_slopes.to(s.dtype)[..., None, None] * steps
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        s = s.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        s = s + attn_mask
    return s.masked_fill(~visible(s, *band), -math.inf)


def visible(s, first, last):
    """Which keys each query sees, ``[S_q, S_k]``."""
    seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
    seen = seen if first is None else seen.triu(first)
    return seen if last is None else seen.tril(last)


def attention(
    q,
    k,
    v,
    attn_mask=None,
    sinks=None,
    alibi_slopes=None,
    seed=None,
    *,
    band=ALL,
    scale=None,
    softcap=0.0,
    diagonal=0,
    dropout_p=0.0,
    sequence=0,
    return_lse=False,
):
    """``out [B, N, S_q, D_v]`` and, on request, ``lse [B, N, S_q]``; differentiable by autograd."""
    options = {"band": band, "scale": scale, "softcap": softcap, "diagonal": diagonal}
    s = with_sinks(scores(q, k, attn_mask, alibi_slopes, **options), sinks)
    p = dropped(probabilities(s)[..., : k.shape[2]], seed, dropout_p, sequence)
    out = p @ repeat_heads(v, q)
    return (out, logsumexp(s)) if return_lse else out


def with_sinks(s, sinks):
    """The scores, and behind them in each row the sink of its head."""
    if sinks is None:
        return s
    return torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:-1], 1)], -1)


def dropped(p, seed, dropout_p, sequence=0):
    """The weights, or any numbers beside them, that dropout leaves, grown by 1/(1 - dropout_p)."""
    if dropout_p == 0:
        return p
    grown = p / (1 - dropout_p) if dropout_p < 1 else 0 * p
    return grown.masked_fill(~keep_mask(seed, dropout_p, *p.shape, sequence), 0)


def probabilities(s):
    """P = softmax(S); zero, with zero gradient, in a row that sees no key."""
    blind = (s == -math.inf).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(blind, 0), -1).masked_fill(blind, 0)


def logsumexp(s):
    """log sum exp over the keys; -inf, with zero gradient, for a row that sees none."""
    blind = (s == -math.inf).all(-1)
    return torch.logsumexp(s.masked_fill(blind[..., None], 0), -1).masked_fill(blind, -math.inf)


def repeat_heads(kv, q):
    """``kv [B, N_kv, S_k, D]`` with each head repeated for its group of query heads."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1) if kv.shape[1] else kv


def attention_fwd(q, k, v, attn_mask, sinks, alibi_slopes, seed, *, keep=True, **options):
    """See `pykernels._backends` for the contract."""
    tensors = (q, k, v, attn_mask, sinks, alibi_slopes, seed)
    with torch.no_grad():
        out, lse = attention(*tensors, return_lse=True, **options)
        lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    return (out, lse), (*tensors, out, lse)


def attention_extras(q, *others, **options):
    """See `pykernels._backends` for the contract."""
    return (q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)),)


def attention_bwd(
    saved,
    grads,
    *,
    needs,
    weights=probabilities,
    scale,
    softcap=0.0,
    dropout_p=0.0,
    sequence=0,
    **options,
):
    """With delta_i = out_i . dout_i - dlse_i, one number a query (T. Dao et al., FlashAttention):

    dV = P^T dout        dP = dout V^T        dS = P * (dP - delta)
    dQ = scale * dS' K   dK = scale * dS'^T Q  dmask = dS summed over what was broadcast

    where dS' is dS times the slope of the cap, 1 - tanh^2. A sink, whose value is 0, has
    dS = P * (0 - delta), summed over batch and queries. Under dropout, what dV and dP are
    made of is dropped as the weights were. `weights` makes P of S.
    """
    # at the end lse, or what a backend keeps in its place
    q, k, v, attn_mask, sinks, alibi_slopes, seed, out, _ = saved
    dout, dlse = grads
    dout = torch.zeros_like(out) if dout is None else dout
    options = {"scale": scale, "softcap": softcap, **options}
    s = with_sinks(scores(q, k, attn_mask, alibi_slopes, **options), sinks)
    p, p_sink = weights(s).split([k.shape[2], s.shape[-1] - k.shape[2]], -1)
    delta = (out * dout).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None].to(q.dtype)
    dp = dropped(dout @ repeat_heads(v, q).transpose(-2, -1), seed, dropout_p, sequence)
    ds = p * (dp - delta)
    dmask = ds
    if softcap:
        ds = ds * (1 - (scores(q, k, scale=scale, softcap=softcap) / softcap) ** 2)
    dq = scale * (ds @ repeat_heads(k, q))
    dk = sum_groups(scale * (ds.transpose(-2, -1) @ q), k)
    dv = sum_groups(dropped(p, seed, dropout_p, sequence).transpose(-2, -1) @ dout, v)
    dmask = dmask.sum_to_size(attn_mask.shape) if needs[3] else None
    dsinks = (p_sink * -delta).sum((0, 2, 3)) if needs[4] else None
    return dq, dk, dv, dmask, dsinks, None, None


def sum_groups(grad, kv):
    """Adds up the gradients of the query heads that read one head of K or V: repeat_heads^T."""
    B, N_kv, S_k, D = kv.shape
    group = grad.shape[1] // max(1, N_kv)
    return grad.reshape(B, N_kv, group, S_k, D).sum(2)
