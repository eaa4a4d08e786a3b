"""The gradient of attention from out and lse, which may be those of more keys than are here.

    S = c(scale * Q K^T) + mask       P = exp(S - lse)       all else as in `attention_bwd`

T. Dao et al., "FlashAttention" (2022), algorithm 4. Keys may be attended to in pieces: with out and
lse of all of them, P is the weight of these keys among all. Axes and options are those of
`attention`; a sink, which lse has counted, takes part for its own gradient alone.
"""

import functools
import math

import torch

from pykernels.reference import attention as one

DTYPES = one.DTYPES
FEATURES = one.FEATURES - {"dropout"}


def attention_backward(
    dout, q, k, v, out, lse, attn_mask, sinks, alibi_slopes, dlse, *, mask_grad=False, **options
):
    """``dq, dk, dv, dattn_mask, dsinks``, with None for what there is not; differentiable."""

    saved = (q, k, v, attn_mask, sinks, alibi_slopes, None, out, lse)
    needs = (True, True, True, mask_grad, sinks is not None, False, False)
    options["weights"] = functools.partial(weights, lse=lse)
    return one.attention_bwd(saved, (dout, dlse), needs=needs, **options)[:5]


def weights(s, lse):
    """P = exp(S - lse); zero in a row that sees no key anywhere."""
    seen = lse.masked_fill(lse == -math.inf, math.inf)
    return torch.exp(s - seen[..., None]).to(s.dtype)


def attention_backward_fwd(*tensors, keep=True, **options):
    """See `pykernels._backends` for the contract."""
    with torch.no_grad():
        return attention_backward(*tensors, **options), tensors


def attention_backward_bwd(saved, grads, *, needs, mask_grad=False, scale, softcap=0.0, **options):
    """By the chain rule, for every backend. With Z = scale * Q K^T, c' = 1 - (c(Z)/softcap)^2,
    delta = out . dout - dlse and A = dout V^T - delta, the gradients are made of dS = P * A,
    P_sink * -delta and P^T dout. Of their own gradients gQ, gK, gV, gmask and gsinks:

    E = scale * (gQ K^T + Q gK^T)     U = E * c' + gmask       W = P * U
    R = P * (A * U + dout gV^T)       ddelta = -sum_j W - gsinks P_sink
    dZ = c' * (R - 2 E * dS * c(Z)/softcap^2)

    are those of dS c', of dS, of A, of S, of delta and of Z, by which each tensor has its own.
    """
    dout, q, k, v, out, lse, attn_mask, sinks, alibi_slopes, dlse = saved
    gq, gk, gv = (
        torch.zeros_like(t) if grad is None else grad
        for t, grad in zip((q, k, v), grads[:3], strict=True)
    )
    gmask, gsinks = (0 if grad is None else grad for grad in grads[3:])
    keys, values, gk, gv = (one.repeat_heads(t, q) for t in (k, v, gk, gv))

    c = one.scores(q, k, scale=scale, softcap=softcap)
    slope, bend = (1 - (c / softcap) ** 2, 2 * c / softcap**2) if softcap else (1, 0)
    options = {"scale": scale, "softcap": softcap, **options}
    s = one.with_sinks(one.scores(q, k, attn_mask, alibi_slopes, **options), sinks)
    p, p_sink = weights(s, lse).split([k.shape[2], s.shape[-1] - k.shape[2]], -1)
    delta = (out * dout).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None].to(q.dtype)
    a = dout @ values.mT - delta
    ds = p * a

    e = scale * (gq @ keys.mT + q @ gk.mT)
    u = e * slope + gmask
    w = p * u
    r = p * (a * u + dout @ gv.mT)
    dz = slope * (r - e * ds * bend)
    ddelta, dlse_of_s = -w.sum(-1, keepdim=True), -r.sum(-1)
    dsinks = None
    if sinks is not None:
        by_sink = torch.reshape(gsinks, (-1, 1, 1)) * p_sink if grads[4] is not None else 0 * p_sink
        ddelta = ddelta - by_sink
        dlse_of_s = dlse_of_s + (by_sink * delta)[..., 0]
        dsinks = -(by_sink * delta).sum((0, 2, 3))
    return (
        w @ values + p @ gv + ddelta * out,
        scale * (dz @ keys + ds * slope @ gk),
        one.sum_groups(scale * (dz.mT @ q + (ds * slope).mT @ gq), k),
        one.sum_groups(w.mT @ dout, v),
        ddelta * dout,
        dlse_of_s.to(lse.dtype),
        r.sum_to_size(attn_mask.shape) if needs[6] else None,
        dsinks,
        None,
        None if dlse is None else -ddelta[..., 0].to(dlse.dtype),
    )
