"""`MultiheadAttention` with the interface of torch.nn, over `functional.attention`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykernels import _autocast, _checks, functional

_OP = "MultiheadAttention"


class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""`torch.nn.MultiheadAttention` on fused kernels.

    .. math:: \mathrm{head}_i = \mathrm{softmax}(Q_i K_i^T / \sqrt{D} + \mathrm{mask}) V_i, \quad
              \mathrm{out} = [\mathrm{head}_1, \dots, \mathrm{head}_N] W^O + b^O

    Constructor, parameters and state_dict are those of `torch.nn.MultiheadAttention`, and so are
    the masks (boolean: True = ignore; float: added). What differs:

    * A query that sees no key gets the weights 0 and the output b^O; torch returns NaN on some
      paths.
    * The weights are an output beside the fused one. ``need_weights=True``, the default as in
      torch, computes them in plain torch: one more [L, S] product per head and its
      [B, N, L, S] memory, forward and backward. Pass ``need_weights=False`` for the fused kernel
      alone.
    * ``is_causal=True`` is a hint and changes no value. Torch's hides the keys of `add_bias_kv` and
      `add_zero_attn` from every query, but only with ``need_weights=False`` and no padding mask;
      else every query sees them, as here always.
    * `attn_mask` and `key_padding_mask` together become one mask [B, 1, L, S], or [B, N, L, S].
    * ``dropout > 0`` in training draws the weights that it drops with torch's seed, but, unless the
      weights are an output, not torch's numbers.
    * Nested tensors are a TypeError.

    Args:
        embed_dim: E, the size of query and output.
        num_heads: N; each head has D = E / N.
        dropout: the probability, in training, of dropping a weight.
        bias: whether the projections of query, key, value and output have biases.
        add_bias_kv: one more key and value, learned, behind the others of each sequence.
        add_zero_attn: one more key and value, of zeros, behind them.
        kdim, vdim: the sizes of key and value; E where None.
        batch_first: query, key, value and output are [B, ., E] instead of [., B, E].
        device, dtype: of the parameters.

    Parameters:
        in_proj_weight: W^Q, W^K, W^V one below the other, [3E, E]; where `kdim` or `vdim` differs
            from E, q_proj_weight [E, E], k_proj_weight [E, kdim], v_proj_weight [E, vdim].
        in_proj_bias: [3E].
        out_proj.weight, out_proj.bias: W^O, [E, E], and b^O, [E].
        bias_k, bias_v: the learned key and value, [1, 1, E].

    Example::

        layer = pykernels.nn.MultiheadAttention(8, 2, batch_first=True)
        x = torch.randn(3, 5, 8)
        out, _ = layer(x, x, x, need_weights=False)  # [B, L, E] -> [B, L, E]

    `torch.nn.TransformerEncoderLayer` has an inference path (eval mode without gradients) that
    reads this module's weights and never calls its forward: there stock kernels run. It is left by
    ``torch.backends.mha.set_fastpath_enabled(False)``, and by `pykernels.replace_modules`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See the class.

        Raises:
            TypeError: a size is no integer, or `dropout` no number.
            ValueError: a size is not positive, `num_heads` does not divide `embed_dim`, or
                `dropout` is no probability.
        """
        for name, size in (
            ("embed_dim", embed_dim),
            ("num_heads", num_heads),
            ("kdim", embed_dim if kdim is None else kdim),
            ("vdim", embed_dim if vdim is None else vdim),
        ):
            _checks.integer(_OP, name, size)
            _checks.positive(_OP, name, size)
        if embed_dim % num_heads:
            must = f"a multiple of `num_heads` = {num_heads}"
            _checks.fail(_OP, "embed_dim", must, embed_dim)
        _checks.number(_OP, "dropout", dropout)
        if not 0 <= dropout <= 1:
            _checks.fail(_OP, "dropout", "from 0 to 1", dropout)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: [L, B, E], or [B, L, E] with `batch_first`, or [L, E].
            key: [S, B, kdim], or [B, S, kdim], or [S, kdim].
            value: [S, B, vdim], or [B, S, vdim], or [S, vdim].
            key_padding_mask: [B, S], or [S] for unbatched input: boolean, True where a key is to
                be ignored, or float, added to the scores.
            need_weights: return the attention weights too; see the class for their cost.
            attn_mask: [L, S] or [B * N, L, S], boolean or float as above.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: says that `attn_mask`, which must be given, is the causal mask; the kernel
                then skips what it hides and never reads it.

        Returns:
            out in the layout of `query`, and the weights [B, L, S] (averaged) or [B, N, L, S],
            without B for unbatched input, or None.

        Raises:
            TypeError: something is no tensor, dtypes differ, or a mask is neither boolean nor
                floating.
            ValueError: a rank, size or device is wrong, or is_causal comes without a mask.
        """
        self._check(query, key, value)
        batched = query.dim() == 3
        q, k, v = (self._split_heads(x, batched) for x in self._project(query, key, value))
        B, N, L, _ = q.shape
        S = k.shape[2]
        if is_causal and attn_mask is None:
            _checks.fail(_OP, "attn_mask", "given where is_causal is True", None)
        masks = {
            "attn_mask": _check_attn_mask(attn_mask, query, B, N, L, S),
            "key_padding_mask": _check_key_padding_mask(key_padding_mask, query, B, S, batched),
        }
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).view(1, N, 1, -1).expand(B, -1, -1, -1)], 2)
            v = torch.cat([v, self.bias_v.to(v.dtype).view(1, N, 1, -1).expand(B, -1, -1, -1)], 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        extra = k.shape[2] - S  # keys that every query sees, behind those that the masks speak of
        dropout = self.dropout if self.training else 0.0

        # The hint replaces the mask where both surely mean the same: square, nothing behind it, and
        # no plain torch that needs the mask in full.
        causal = is_causal and L == S and not extra and not need_weights
        if causal:
            del masks["attn_mask"]
        mask = _merge([F.pad(m, (0, extra)) for m in masks.values() if m is not None], q.dtype)

        out: Any
        weights = None
        if need_weights:
            out, weights = _attend_with_weights(q, k, v, mask, dropout)
        else:
            out = functional.attention(q, k, v, mask, is_causal=causal, dropout_p=dropout)

        out = F.linear(self._join_heads(out, batched), self.out_proj.weight, self.out_proj.bias)
        if weights is None:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights[0]

    def _order(self, batched: bool, *batch_length_width: Any) -> tuple[Any, ...]:
        """Batch, length and width (names or sizes) in the order of this module's inputs."""
        batch, length, width = batch_length_width
        if not batched:
            return length, width
        return (batch, length, width) if self.batch_first else (length, batch, width)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        _checks.tensor(_OP, "query", query)
        _checks.floating(_OP, "query", query)
        _checks.rank(_OP, "query", query, ", ".join(self._order(True, "B", "L", "E")), "L, E")
        batched = query.dim() == 3
        length_axis = self._order(batched, 0, 1, 2).index(1)
        batch = query.shape[self._order(batched, 0, 1, 2).index(0)] if batched else 1
        # autocast brings the dtypes together itself, inside the projections
        like = None if _autocast.on(query.device) else query
        for name, x, length_name, width_name, width in (
            ("query", query, "L", "E", self.embed_dim),
            ("key", key, "S", "kdim", self.kdim),
            ("value", value, "S", "vdim", self.vdim),
        ):
            axes = ", ".join(self._order(batched, "B", length_name, width_name))
            _checks.tensor(_OP, name, x, like)
            _checks.device(_OP, name, x, query)
            _checks.rank(_OP, name, x, axes)
            length = (key if name == "value" else x).shape[length_axis]
            _checks.shape(_OP, name, x, axes, self._order(batched, batch, length, width))
        _checks.tensor(_OP, "out_proj.weight", self.out_proj.weight, like)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """The three input projections, each of width E: one product for self-attention."""
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(*each) for each in zip((query, key, value), weights, biases, strict=True)]

    def _split_heads(self, x: Tensor, batched: bool) -> Tensor:
        """A view [B, N, L, D] of a projection in the order of this module's inputs."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _join_heads(self, out: Tensor, batched: bool) -> Tensor:
        """The way back of `_split_heads`, from [B, N, L, D]."""
        if not batched:
            return out[0].transpose(0, 1).flatten(-2)
        return (out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)).flatten(-2)


def _check_attn_mask(
    mask: Tensor | None, query: Tensor, B: int, N: int, L: int, S: int
) -> Tensor | None:
    """`attn_mask` as [1, 1, L, S] or [B, N, L, S]."""
    if mask is None:
        return None
    _check_mask("attn_mask", mask, query)
    _checks.rank(_OP, "attn_mask", mask, "L, S", "B * N, L, S")
    if mask.dim() == 2:
        _checks.shape(_OP, "attn_mask", mask, "L, S", (L, S))
        return mask[None, None]
    _checks.shape(_OP, "attn_mask", mask, "B * N, L, S", (B * N, L, S))
    return mask.reshape(B, N, L, S)


def _check_key_padding_mask(
    mask: Tensor | None, query: Tensor, B: int, S: int, batched: bool
) -> Tensor | None:
    """`key_padding_mask` as [B, 1, 1, S]."""
    if mask is None:
        return None
    _check_mask("key_padding_mask", mask, query)
    axes, sizes = ("B, S", (B, S)) if batched else ("S", (S,))
    _checks.shape(_OP, "key_padding_mask", mask, axes, sizes)
    return mask.reshape(B, 1, 1, S)


def _check_mask(name: str, mask: Tensor, query: Tensor) -> None:
    _checks.tensor(_OP, name, mask)
    _checks.device(_OP, name, mask, query)
    if mask.dtype != torch.bool:
        _checks.floating(_OP, name, mask)


def _merge(masks: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    """One 4-D mask for `functional.attention` (True = attend) of torch.nn's (True = ignore)."""
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~functools.reduce(torch.logical_or, masks)
    zero = torch.zeros((), dtype=dtype, device=masks[0].device)
    return functools.reduce(
        torch.add,
        (zero.masked_fill(m, -math.inf) if m.dtype == torch.bool else m.to(dtype) for m in masks),
    )


def _attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """out [B, N, L, D] and the weights [B, N, L, S], which nothing but plain torch builds."""
    # autocast has a softmax on a GPU, and on no CPU, return float32
    held = torch.float32 if q.is_cuda and _autocast.on(q.device) else q.dtype
    with _autocast.disabled(q.device):
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        elif mask is not None:
            scores = scores + mask
        blind = (scores == -math.inf).all(-1, keepdim=True)  # sees no key
        weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0).to(held)
        if not dropout:
            out: Any = functional.attention(q, k, v, mask)
            return out, weights
        weights = F.dropout(weights, dropout)
        return weights.to(v.dtype) @ v, weights
