"""The gradient of attention from an output and log-sum-exp from outside: `attention`'s kernels."""

from __future__ import annotations

from torch import Tensor

from pykernels.kernels import attention

DTYPES = attention.DTYPES
FEATURES = attention.FEATURES - {"dropout"}


def attention_backward_fwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dlse: Tensor | None,
    *,
    mask_grad: bool = False,
    keep: bool = True,
    **options: object,
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """``(dq, dk, dv, dattn_mask, dsinks)``, None for what there is not, and what they were made of;
    arguments as in `attention_bwd`."""
    saved = (q, k, v, attn_mask, sinks, alibi_slopes, None, out, lse.contiguous())
    needs = (True, True, True, mask_grad, sinks is not None, False, False)
    found = attention.attention_bwd(saved, (dout, dlse), needs=needs, **options)
    return found[:5], (dout, q, k, v, out, lse, attn_mask, sinks, alibi_slopes, dlse)
