"""The gated recurrent unit on a GPU: h_t = (1 - z) n + z h_{t-1}.

r and z are the logistic sigmoid of W_i. x_t + b_i. + W_h. h_{t-1} + b_h., and n is
tanh(W_in x_t + b_in + r q), q = W_hn h_{t-1} + b_hn; the gates lie in the weights in the order r,
z, n. Only the product with W_hh lives in the time loop (`_recurrence`). W_ih goes over all T * B
rows at once before it; all gradients but those of the sums are large products after it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import compute_dtype, sigmoid, tanh, to_storage
from ._recurrence import Cell, read, walk, write
from ._sequence import (
    Maybe,
    dense,
    gradients,
    input_sums,
    padded_sizes,
    ragged_backward,
    ragged_forward,
    state_after,
)

DTYPES = _common.DTYPES
FEATURES = frozenset({"ragged"})


@triton.jit
def _load(io, here, after, batch, n, ok, H, is_first, is_last):
    sums_ptr, b_ptr, _ = io  # [T, B, 4, H], the fourth unused; [H]
    return (
        read(sums_ptr, here, n, ok, H, 0, 4),
        read(sums_ptr, here, n, ok, H, 1, 4),
        read(sums_ptr, here, n, ok, H, 2, 4),
        read(b_ptr, batch * 0, n, ok, H, 0, 1),
    )


@triton.jit
def _cell(io, here, n, ok, H, sums, inputs, h, storage: tl.constexpr):
    gates_ptr = io[2]  # [T, B, 4, H], written if not None
    r = sigmoid(sums[0] + inputs[0])
    z = sigmoid(sums[1] + inputs[1])
    q = sums[2] + inputs[3]
    new = tanh(inputs[2] + r * q)
    write(gates_ptr, here, n, ok, H, 0, 4, r)
    write(gates_ptr, here, n, ok, H, 1, 4, z)
    write(gates_ptr, here, n, ok, H, 2, 4, new)
    write(gates_ptr, here, n, ok, H, 3, 4, q)
    h = to_storage((1 - z) * new + z * h, storage)  # as the product of the next step has it
    h = h.to(q.dtype)
    return (h,), h


@triton.jit
def _load_grad(io, here, after, batch, n, ok, H, is_first, is_last):
    gates_ptr, y_ptr, h0_ptr, dy_ptr, dh_n_ptr = io
    return (
        read(gates_ptr, here, n, ok, H, 0, 4),
        read(gates_ptr, here, n, ok, H, 1, 4),
        read(gates_ptr, here, n, ok, H, 2, 4),
        read(gates_ptr, here, n, ok, H, 3, 4),
        read(y_ptr, after, n, ok & ~is_last, H, 0, 1),
        read(h0_ptr, batch, n, ok & is_last, H, 0, 1),
        read(dy_ptr, here, n, ok, H, 0, 1),
        read(dh_n_ptr, batch, n, ok & is_first, H, 0, 1),
    )


@triton.jit
def _cell_grad(io, here, n, ok, H, sums, inputs, dh, storage: tl.constexpr):
    r, z, new, q, h, h0, dy, dh_n = inputs
    dh = sums[0] + dh + dy + dh_n
    da_n = dh * (1 - z) * (1 - new * new)
    da_z = dh * (h + h0 - new) * z * (1 - z)  # one of h and h0 is zero
    da_r = da_n * q * r * (1 - r)
    # The first three are what h sends on, the last three what x does.
    return (da_n * r, da_r, da_z, da_n), z * dh


_FORWARD, _BACKWARD = Cell(_load, _cell), Cell(_load_grad, _cell_grad)


def gru_extras(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    *_: Maybe,
    batch_sizes: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor]:
    """See `pykernels._backends` for the contract: r, z, n, q, [T, B, 4H]."""
    shape, dtype = (*padded_sizes(x, batch_sizes), 4 * w_hh.shape[1]), compute_dtype(x.dtype)
    return (torch.empty(shape, dtype=dtype, device=x.device),)


def gru_fwd(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Maybe,
    b_hh: Maybe,
    h0: Maybe,
    *,
    reverse: bool,
    batch_sizes: Sequence[int] | None = None,
    keep: bool = True,
) -> tuple[tuple[Tensor, Tensor], tuple[Maybe, ...]]:
    """The whole sequence.

    Args:
        x: [T, B, I].
        w_ih: [3H, I].
        w_hh: [3H, H].
        b_ih, b_hh: [3H], or None.
        h0: [B, H], or None for zeros.
        reverse: walk from t = T - 1 to 0.
        batch_sizes: None, or [T]: x is [N, I], packed rows, and so is y.

    Returns:
        ``((y [T, B, H], h_n [B, H]), saved)``.
    """
    if batch_sizes is not None:
        tensors = (x, w_ih, w_hh, b_ih, b_hh, h0)
        return ragged_forward(gru_fwd, tensors, batch_sizes, reverse=reverse, keep=keep)
    T, B, _ = x.shape
    H = w_hh.shape[1]
    y = torch.empty(T, B, H, dtype=x.dtype, device=x.device)
    h_n = state_after(h0, B, H, x, T)
    gates = None
    if y.numel() > 0:
        b_rz = b_n = None
        if b_hh is not None:
            b_rz, b_n = b_hh.clone(), b_hh[2 * H :].contiguous()
            b_rz[2 * H :].zero_()  # that of n is within r q
        sums = input_sums(x, w_ih, b_ih, b_rz, 4 * H)
        gates = sums if keep else None  # in the same memory
        io = (sums, b_n, gates)
        states = {"start": dense(h0), "final": h_n, "carry": dense(h0)}
        walk(_FORWARD, io, y, w_hh.contiguous(), **states, backward=False, from_end=reverse)
    elif keep:
        (gates,) = gru_extras(x, w_ih, w_hh)
    return (y, h_n), (x, w_ih, w_hh, b_ih, b_hh, h0, y, gates)


def gru_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, Maybe],
    *,
    reverse: bool,
    batch_sizes: Sequence[int] | None = None,
    needs: tuple[bool, ...],
) -> tuple[Maybe, ...]:
    """Backward through time.

    Args:
        saved: what `gru_fwd` returned: its six tensors, y, the gates.
        grads: (dy [T, B, H], dh_n [B, H]), None for zeros.
        reverse, batch_sizes: as in `gru_fwd`.
        needs: which of the six gradients are wanted.

    Returns:
        ``(dx, dw_ih, dw_hh, db_ih, db_hh, dh0)``, None where not wanted.
    """
    if batch_sizes is not None:
        return ragged_backward(gru_bwd, saved, grads, batch_sizes, reverse=reverse, needs=needs)
    x, w_ih, w_hh, _, _, h0, y, gates = saved
    dy, dh_n = grads
    T, B, H = y.shape
    d = torch.empty(T, B, 4 * H, dtype=x.dtype, device=x.device)
    dh = dh_n
    w = w_hh.roll(H, 0)  # n, r, z
    if d.numel() > 0:
        dh = torch.empty(B, H, dtype=compute_dtype(x.dtype), device=x.device)
        io = (gates, y, *map(dense, (h0, dy, dh_n)))
        walk(_BACKWARD, io, d, w, carry_n=dh, backward=True, from_end=not reverse)
    da, dq = d[..., H:], d[..., : 3 * H]
    found = gradients(x, w_ih, w, h0, y, da, dq, dh, needs, reverse=reverse)
    for index in (2, 4):  # back into the order of the weights
        found[index] = None if found[index] is None else found[index].roll(-H, 0)
    return tuple(found)
