"""The gradient of `attention` without its forward pass: from an output and a log-sum-exp."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykernels import _backends, _checks
from pykernels.ops import _autograd, _calls, _library
from pykernels.ops import attention as _attention
from pykernels.ops._calls import Call

OP = "attention_backward"


class AttentionGradients(NamedTuple):
    """What `attention_backward` returns; None for what was not asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dattn_mask: Tensor | None
    dsinks: Tensor | None


def _differentiable(backend: ModuleType) -> SimpleNamespace:
    """`backend` with the gradient of the gradient, which is the reference's for all."""
    reference = _backends.module("reference", OP)
    return SimpleNamespace(
        attention_backward_fwd=backend.attention_backward_fwd,
        attention_backward_bwd=reference.attention_backward_bwd,
    )


class AttentionBackwardFunction(_autograd.Function):
    """Autograd over one backend's ``attention_backward_fwd``: the gradient of the gradient."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        found = _autograd.Function.forward(ctx, call, *tensors)
        ctx.call = call.on(_differentiable(call.backend))
        return found


@_calls.once
def _checked(
    tensors: tuple[Any, ...],
    backend: str | None,
    is_causal: bool,
    window: Any,
    causal_alignment: str,
    scale: float | None,
    softcap: float,
    enable_gqa: bool,
    mask_grad: bool,
) -> Call:
    dout, q, k, v, out, lse, mask, sinks, alibi_slopes, dlse = tensors
    _checks.flags(OP, is_causal=is_causal, enable_gqa=enable_gqa, mask_grad=mask_grad)
    _attention.check_inputs(OP, q, k, v, mask, sinks, alibi_slopes, enable_gqa)
    _attention.check_options(OP, scale, window, softcap, causal_alignment, 0.0)
    B, N, S_q, D = q.shape
    S_k, D_v = v.shape[2:]
    for name, value in (("dout", dout), ("out", out)):
        _checks.tensor(OP, name, value, q)
        _checks.shape(OP, name, value, "B, N, S_q, D_v", (B, N, S_q, D_v))
    for name, number in (("lse", lse), ("dlse", dlse)):
        if number is not None or name == "lse":
            _check_by_query(name, number, q)
    if mask_grad and (mask is None or mask.dtype == torch.bool):
        got = "None" if mask is None else "a boolean one"
        _checks.fail(OP, "attn_mask", "additive where mask_grad is True", got)
    band = _attention.band_of(S_q, S_k, is_causal, window, causal_alignment)
    wanted = _attention.features(
        q.dtype, D, D_v, band, softcap, sinks is not None, alibi_slopes is not None
    )
    if mask_grad:
        wanted |= {"mask_grad"}
    chosen = _backends.select(OP, backend, q.device, q.dtype, wanted)
    diagonal = _attention.diagonal_of(S_q, S_k, causal_alignment)
    options = _attention.options_of(q, band, scale, softcap, alibi_slopes, diagonal)
    if mask_grad:
        options["mask_grad"] = True
    return Call(OP, AttentionBackwardFunction, chosen, options)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dlse: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    causal_alignment: str = "top-left",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    enable_gqa: bool = False,
    mask_grad: bool = False,
    backend: str | None = None,
) -> AttentionGradients:
    r"""The gradients of `attention` from its results, which need not come from one call.

    .. math:: P = \exp(S - \mathrm{lse}), \quad \delta = \mathrm{out} \cdot \mathrm{dout} -
              \mathrm{dlse}, \quad dS = P \odot (\mathrm{dout}\, V^T - \delta), \quad
              dV = P^T \mathrm{dout}, \quad dQ = \mathrm{scale} \cdot dS K, \quad
              dK = \mathrm{scale} \cdot dS^T Q

    with S the scores after scale, cap, slopes and mask (T. Dao et al., "FlashAttention", 2022,
    algorithm 4). The weights come from `lse`, not from the keys that are here: of keys in pieces,
    computed one after the other or on several machines (H. Liu et al., "Ring attention", 2023),
    each piece with `out` and `lse` of all gives its own gradients, exactly::

        (out_a, lse_a), (out_b, lse_b) = (attention(q, *kv, return_lse=True) for kv in halves)
        lse = torch.logaddexp(lse_a, lse_b)
        out = sum(o * (l - lse).exp()[..., None] for o, l in ((out_a, lse_a), (out_b, lse_b)))
        a, b = (attention_backward(dout, q, *kv, out, lse) for kv in halves)
        dq, dk, dv = a.dq + b.dq, torch.cat([a.dk, b.dk], 2), torch.cat([a.dv, b.dv], 2)

    There is no dropout, whose draw belongs to one call of `attention`. Differentiable again, by the
    reference's formula.

    Args:
        dout: the gradient of `out`, [B, N, S_q, D_v].
        q, k, v, attn_mask: as `attention` takes them, of this piece: [B, N, S_q, D],
            [B, N_kv, S_k, D], [B, N_kv, S_k, D_v], broadcastable to [B, N, S_q, S_k].
        out: the output over all keys, [B, N, S_q, D_v].
        lse: the log-sum-exp over all keys, sinks included, [B, N, S_q] in float32 (float64 for
            float64); -inf for a query that sees no key, which gets no gradient. Weights are as good
            as it is: where all scores of a query are so low (a mask of -1e9 or finfo.min) that it
            has been rounded to the highest, each of its weights counts as 1. `attention` keeps more
            than this number for its own gradient, and has no such loss.
        dlse: the gradient of `lse`, like it; None for zeros.
        is_causal, window, causal_alignment, scale, softcap, alibi_slopes, enable_gqa: as in
            `attention`, of this piece: with as many queries as keys in all, places in the last keys
            are right with "bottom-right", in the first with "top-left".
        sinks: [N], for their gradient alone, as `lse` has counted them: it is whole in each piece.
        mask_grad: return the gradient of an additive `attn_mask` too, summed over what was
            broadcast.
        backend: "cpp", "triton" or "reference"; None takes the fastest that serves the call.

    Returns:
        ``(dq, dk, dv, dattn_mask, dsinks)``, each like what it is the gradient of; the fourth is
        None without `mask_grad`, the fifth without `sinks`.

    Raises:
        TypeError: as `attention`; also where `lse` or `dlse` has another dtype than said.
        ValueError: as `attention`; also where `mask_grad` has no additive mask to be of.
    """
    tensors = (dout, q, k, v, out, lse, attn_mask, sinks, alibi_slopes, dlse)
    call = _checked(
        tensors, backend, is_causal, window, causal_alignment, scale, softcap, enable_gqa, mask_grad
    )
    if attn_mask is not None:
        mask = _attention.four_axes(attn_mask)
        tensors = (dout, q, k, v, out, lse, mask, sinks, alibi_slopes, dlse)
    dq, dk, dv, dmask, dsinks = call.outputs(tensors)
    dmask = dmask.reshape(attn_mask.shape) if mask_grad and attn_mask is not None else None
    return AttentionGradients(dq, dk, dv, dmask, None if sinks is None else dsinks)


def _check_by_query(name: str, value: Any, q: Tensor) -> None:
    """`value` has a number for each query, in the dtype of a log-sum-exp."""
    wide = torch.promote_types(q.dtype, torch.float32)
    _checks.tensor(OP, name, value)
    if value.dtype != wide:
        raise TypeError(f"{OP}: `{name}` must have dtype {wide}, got {value.dtype}")
    _checks.device(OP, name, value, q)
    _checks.shape(OP, name, value, "B, N, S_q", q.shape[:3])


def _empty(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any, **options: Any
) -> tuple[Tensor | None, ...]:
    _, _, mask, sinks, _, _ = others
    given = (q, k, v, mask if options.get("mask_grad") else None, sinks)
    return tuple(None if t is None else t.new_empty(t.shape) for t in given)


def _formula(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
    found = _backends.module("reference", OP).attention_backward(*tensors, **options)
    return tuple(tensors[0].new_empty(0) if t is None else t for t in found)


def _axes(*tensors: Any, mask_grad: bool = False, **options: Any) -> Any:
    slopes, sinks = tensors[8], tensors[7]
    if mask_grad or sinks is not None:
        return None  # whose gradients are sums over the batch
    mapped = 0 if slopes is not None and slopes.dim() == 2 else None
    return (0, 0, 0, 0, 0, 0, 0, None, mapped, 0), (0, 0, 0, None, None)


_library.Operator(
    OP,
    tensors="Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, Tensor? dlse",
    options="SymInt?[2] band, float scale, float softcap=0.0, SymInt diagonal=0, "
    "bool mask_grad=False",
    outputs="dq dk dv dattn_mask dsinks",
    saves=0,
    empty=_empty,
    formula=_formula,
    axes=_axes,
    adapt=_differentiable,
    name="attention_backward_from_lse",  # attention_backward is what autograd calls
)
