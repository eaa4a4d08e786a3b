"""``attn_implementation="pykernels"`` for Hugging Face transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pykernels import functional

NAME = "pykernels"


def register() -> None:
    """Makes ``attn_implementation="pykernels"`` known to transformers; again does no harm.

    Any model that takes its attention from transformers' `AttentionInterface` then runs on ours:
    ``AutoModelForCausalLM.from_pretrained(name, attn_implementation="pykernels")``, or
    ``model.set_attn_implementation("pykernels")``. Grouped key heads are read in place, not
    repeated; soft caps (Gemma 2), sinks (gpt-oss), position biases and dropout are served. Padding
    and a sliding window come as transformers' boolean mask, one for all heads and layers.
    """
    transformers.AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the caller; its `is_causal` holds where the argument is None.
        query: [B, N, S_q, D], any floating dtype.
        key: [B, N_kv, S_k, D]; N is a multiple of N_kv.
        value: [B, N_kv, S_k, D_v].
        attention_mask: broadcastable to [B, N, S_q, S_k], boolean (True = attend) or floating and
            added to the scores: all that `is_causal` and `sliding_window` would say; None where
            they alone say it.
        dropout: the share of weights that is dropped.
        scaling: 1/sqrt(D) if None.
        sliding_window: how many keys a query sees, its own place included.
        softcap: c makes c * tanh(score / c) of the scaled scores.
        s_aux: [N], a sink to each head.
        position_bias: broadcastable to [B, N, S_q, S_k], added to the scores.
        kwargs: what other implementations take.

    Returns:
        out [B, S_q, N, D_v], and None for the weights, which are never built.

    Raises:
        TypeError, ValueError: as `functional.attention`; also where continuous batching or
            attention weights are asked for.
    """
    if kwargs.get("cache") is not None:
        raise ValueError("pykernels: continuous batching is not served; use another implementation")
    if kwargs.get("output_attentions"):
        raise ValueError('pykernels: output_attentions=True asks for attn_implementation="eager"')
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # A mask says it all, and one query stands at the last key. Otherwise query i stands at key i:
    # keys behind S_q are places of a static cache that are still empty.
    is_causal = bool(is_causal) and query.shape[2] > 1 and attention_mask is None
    window = None
    if sliding_window is not None and is_causal:
        window = (sliding_window - 1, None)
    if position_bias is not None:
        attention_mask = _with_bias(position_bias, attention_mask)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.to(query.dtype)
    out: Any = functional.attention(
        query,
        key,
        value,
        attention_mask,
        is_causal=is_causal,
        window=window,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.to(query.dtype),
        dropout_p=dropout,
        enable_gqa=True,
    )
    return out.transpose(1, 2).contiguous(), None


def _with_bias(position_bias: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask and the bias as one additive mask."""
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return position_bias.masked_fill(~attention_mask, -math.inf)
    return position_bias + attention_mask
