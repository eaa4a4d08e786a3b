"""The Elman recurrence on a GPU: h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), f = tanh or relu.

Only the product with W_hh lives in the time loop (`_recurrence`). W_ih goes over all T * B rows at
once before it; all gradients but that of the sums inside f are large products after it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import tanh
from ._recurrence import Cell, read, walk
from ._sequence import (
    Maybe,
    dense,
    gradients,
    input_sums,
    ragged_backward,
    ragged_forward,
    state_after,
)

DTYPES = _common.DTYPES
FEATURES = frozenset({"ragged"})


@triton.jit
def _load(io, here, after, batch, n, ok, H, is_first, is_last):
    return (read(io[0], here, n, ok, H, 0, 1),)  # [T, B, H], W_ih x + b_ih + b_hh


@triton.jit
def _tanh(io, here, n, ok, H, sums, inputs, carry, storage: tl.constexpr):
    return (tanh(sums[0] + inputs[0]),), carry


@triton.jit
def _relu(io, here, n, ok, H, sums, inputs, carry, storage: tl.constexpr):
    z = sums[0] + inputs[0]
    return (tl.where(z < 0, 0.0, z),), carry  # not maximum, which drops a NaN


@triton.jit
def _load_grad(io, here, after, batch, n, ok, H, is_first, is_last):
    y_ptr, dy_ptr, dh_n_ptr = io  # [T, B, H], [T, B, H], [B, H]
    return (
        read(y_ptr, here, n, ok, H, 0, 1),
        read(dy_ptr, here, n, ok, H, 0, 1),
        read(dh_n_ptr, batch, n, ok & is_first, H, 0, 1),
    )


@triton.jit
def _tanh_grad(io, here, n, ok, H, sums, inputs, carry, storage: tl.constexpr):
    y, dy, dh_n = inputs
    y = y.to(carry.dtype)
    return ((sums[0] + dy + dh_n) * (1 - y * y),), carry


@triton.jit
def _relu_grad(io, here, n, ok, H, sums, inputs, carry, storage: tl.constexpr):
    y, dy, dh_n = inputs
    return (tl.where(y <= 0, 0.0, sums[0] + dy + dh_n),), carry


_CELLS = {
    "tanh": (Cell(_load, _tanh), Cell(_load_grad, _tanh_grad)),
    "relu": (Cell(_load, _relu), Cell(_load_grad, _relu_grad)),
}


def rnn_fwd(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Maybe,
    b_hh: Maybe,
    h0: Maybe,
    *,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: Sequence[int] | None = None,
    keep: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[Maybe, ...]]:
    """The whole sequence.

    Args:
        x: [T, B, I].
        w_ih: [H, I].
        w_hh: [H, H].
        b_ih, b_hh: [H], or None.
        h0: [B, H], or None for zeros.
        nonlinearity: "tanh" or "relu".
        reverse: walk from t = T - 1 to 0.
        batch_sizes: None, or [T]: x is [N, I], packed rows, and so is y.

    Returns:
        ``((y [T, B, H], h_n [B, H]), saved)``.
    """
    if batch_sizes is not None:
        tensors = (x, w_ih, w_hh, b_ih, b_hh, h0)
        own = {"nonlinearity": nonlinearity, "reverse": reverse, "keep": keep}
        return ragged_forward(rnn_fwd, tensors, batch_sizes, **own)
    T, B, _ = x.shape
    H = w_hh.shape[1]
    y = torch.empty(T, B, H, dtype=x.dtype, device=x.device)
    h_n = state_after(h0, B, H, x, T)
    if y.numel() > 0:
        io = (input_sums(x, w_ih, b_ih, b_hh, H),)
        cell, _ = _CELLS[nonlinearity]
        states = {"start": dense(h0), "final": h_n}
        walk(cell, io, y, w_hh.contiguous(), **states, backward=False, from_end=reverse)
    return (y, h_n), (x, w_ih, w_hh, b_ih, b_hh, h0, y)


def rnn_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, Maybe],
    *,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: Sequence[int] | None = None,
    needs: tuple[bool, ...],
) -> tuple[Maybe, ...]:
    """Backward through time.

    Args:
        saved: what `rnn_fwd` returned: its six tensors, then y.
        grads: (dy [T, B, H], dh_n [B, H]), None for zeros.
        nonlinearity, reverse, batch_sizes: as in `rnn_fwd`.
        needs: which of the six gradients are wanted.

    Returns:
        ``(dx, dw_ih, dw_hh, db_ih, db_hh, dh0)``, None where not wanted.
    """
    if batch_sizes is not None:
        own = {"nonlinearity": nonlinearity, "reverse": reverse, "needs": needs}
        return ragged_backward(rnn_bwd, saved, grads, batch_sizes, **own)
    x, w_ih, w_hh, _, _, h0, y = saved
    dy, dh_n = grads
    da = torch.empty_like(y)  # gradients of the sums inside f
    if da.numel() > 0:
        io = (y, dense(dy), dense(dh_n))
        _, cell = _CELLS[nonlinearity]
        walk(cell, io, da, w_hh.contiguous(), backward=True, from_end=not reverse)
    dh = None if len(y) > 0 else dh_n
    return tuple(gradients(x, w_ih, w_hh, h0, y, da, da, dh, needs, reverse=reverse))
