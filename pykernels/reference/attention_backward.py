"""The gradient of attention from out and lse, which may be those of more keys than are here.

    S = c(scale * Q K^T) + mask       P = exp(S - lse)       all else as in `attention_bwd`

T. Dao et al., "FlashAttention" (2022), algorithm 4. Keys may be attended to in pieces: with out and
lse of all of them, P is the weight of these keys among all. Axes and options are those of
`attention`; a sink, which lse has counted, takes part for its own gradient alone.
"""

import math

import torch

from pykernels.reference import attention as one

DTYPES = one.DTYPES
FEATURES = one.FEATURES - {"dropout"}


def attention_backward(
    dout, q, k, v, out, lse, attn_mask, sinks, alibi_slopes, dlse, *, mask_grad=False, **options
):
    """``dq, dk, dv, dattn_mask, dsinks``, with None for what there is not; differentiable."""

    def weights(s):
        blind = lse == -math.inf  # sees no key anywhere
        return torch.exp(s - lse.masked_fill(blind, math.inf)[..., None]).to(s.dtype)

    saved = (q, k, v, attn_mask, sinks, alibi_slopes, None, out, lse)
    needs = (True, True, True, mask_grad, sinks is not None, False, False)
    return one.attention_bwd(saved, (dout, dlse), needs=needs, weights=weights, **options)[:5]


def attention_backward_fwd(*tensors, keep=True, **options):
    """See `pykernels._backends` for the contract."""
    with torch.no_grad():
        return attention_backward(*tensors, **options), tensors


def attention_backward_bwd(saved, grads, *, needs, **options):
    """By autograd through the formula, for every backend."""
    wanted = [i for i, need in enumerate(needs) if need]

    def formula(*given):
        own = list(saved)
        for i, t in zip(wanted, given, strict=True):
            own[i] = t
        found = attention_backward(*own, **options)
        return tuple(found[0].new_zeros(()) if t is None else t for t in found)

    made, pull = torch.func.vjp(formula, *(saved[i] for i in wanted))
    pairs = zip(made, grads, strict=True)
    sent = tuple(torch.zeros_like(t) if grad is None else grad for t, grad in pairs)
    found = dict(zip(wanted, pull(sent), strict=True))
    return tuple(found.get(i) for i in range(len(saved)))
