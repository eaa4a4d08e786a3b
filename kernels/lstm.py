"""Long short-term memory on a GPU: c_t = f c_{t-1} + i g and h_t = o tanh(c_t).

Of the sums W_i. x_t + b_i. + W_h. h_{t-1} + b_h. of the gates i, f, g, o, in this order, g is the
tanh and the others are the logistic sigmoid. Only the product with W_hh lives in the time loop
(`_recurrence`). W_ih goes over all T * B rows at once before it; all gradients but those of the
sums and of c are large products after it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import compute_dtype, sigmoid, tanh
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
    sums_ptr = io[0]  # [T, B, 4, H], W_ih x + b_ih + b_hh
    return (
        read(sums_ptr, here, n, ok, H, 0, 4),
        read(sums_ptr, here, n, ok, H, 1, 4),
        read(sums_ptr, here, n, ok, H, 2, 4),
        read(sums_ptr, here, n, ok, H, 3, 4),
    )


@triton.jit
def _cell(io, here, n, ok, H, sums, inputs, c, storage: tl.constexpr):
    _, gates_ptr, cells_ptr = io  # [T, B, 4, H], [T, B, H], each written where it is no None
    i = sigmoid(sums[0] + inputs[0])
    f = sigmoid(sums[1] + inputs[1])
    g = tanh(sums[2] + inputs[2])
    o = sigmoid(sums[3] + inputs[3])
    c = f * c + i * g
    write(gates_ptr, here, n, ok, H, 0, 4, i)
    write(gates_ptr, here, n, ok, H, 1, 4, f)
    write(gates_ptr, here, n, ok, H, 2, 4, g)
    write(gates_ptr, here, n, ok, H, 3, 4, o)
    write(cells_ptr, here, n, ok, H, 0, 1, c)
    return (o * tanh(c),), c


@triton.jit
def _load_grad(io, here, after, batch, n, ok, H, is_first, is_last):
    gates_ptr, cells_ptr, c0_ptr, dy_ptr, dcells_ptr, dh_n_ptr = io
    return (
        read(gates_ptr, here, n, ok, H, 0, 4),
        read(gates_ptr, here, n, ok, H, 1, 4),
        read(gates_ptr, here, n, ok, H, 2, 4),
        read(gates_ptr, here, n, ok, H, 3, 4),
        read(cells_ptr, here, n, ok, H, 0, 1),
        read(cells_ptr, after, n, ok & ~is_last, H, 0, 1),
        read(c0_ptr, batch, n, ok & is_last, H, 0, 1),
        read(dy_ptr, here, n, ok, H, 0, 1),
        read(dcells_ptr, here, n, ok, H, 0, 1),
        read(dh_n_ptr, batch, n, ok & is_first, H, 0, 1),
    )


@triton.jit
def _cell_grad(io, here, n, ok, H, sums, inputs, dc, storage: tl.constexpr):
    i, f, g, o, c, c_before, c0, dy, dcells, dh_n = inputs
    dh = sums[0] + dy + dh_n
    tanh_c = tanh(c)
    dc = dc + dcells + dh * o * (1 - tanh_c * tanh_c)
    di = dc * g * i * (1 - i)
    df = dc * (c_before + c0) * f * (1 - f)  # one of the two is zero
    dg = dc * i * (1 - g * g)
    do = dh * tanh_c * o * (1 - o)
    return (di, df, dg, do), dc * f


_FORWARD, _BACKWARD = Cell(_load, _cell), Cell(_load_grad, _cell_grad)


def lstm_extras(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    *_: Maybe,
    batch_sizes: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, None]:
    """See `pykernels._backends` for the contract: gates [T, B, 4H], cell states [T, B, H]."""
    H, dtype = w_hh.shape[1], compute_dtype(x.dtype)
    sizes = padded_sizes(x, batch_sizes)
    gates = torch.empty(*sizes, 4 * H, dtype=dtype, device=x.device)
    return gates, torch.empty(*sizes, H, dtype=dtype, device=x.device), None


def lstm_fwd(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Maybe,
    b_hh: Maybe,
    h0: Maybe,
    c0: Maybe,
    w_hr: None,
    *,
    reverse: bool,
    return_cell_states: bool,
    batch_sizes: Sequence[int] | None = None,
    keep: bool = True,
) -> tuple[tuple[Tensor, ...], tuple[Maybe, ...]]:
    """The whole sequence.

    Args:
        x: [T, B, I].
        w_ih: [4H, I].
        w_hh: [4H, H].
        b_ih, b_hh: [4H], or None.
        h0, c0: [B, H], or None for zeros.
        w_hr: None, as no projection is served.
        reverse: walk from t = T - 1 to 0.
        return_cell_states: return c too.
        batch_sizes: None, or [T]: x is [N, I], packed rows, and so are y and c.

    Returns:
        ``((y [T, B, H], h_n [B, H], c_n [B, H]), saved)``; c [T, B, H] behind c_n if asked for.
    """
    if batch_sizes is not None:
        tensors = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr)
        own = {"return_cell_states": return_cell_states, "reverse": reverse, "keep": keep}
        return ragged_forward(lstm_fwd, tensors, batch_sizes, **own)
    T, B, _ = x.shape
    H = w_hh.shape[1]
    y = torch.empty(T, B, H, dtype=x.dtype, device=x.device)
    h_n, c_n = state_after(h0, B, H, x, T), state_after(c0, B, H, x, T)
    gates = cells = None
    if keep or return_cell_states:
        _, cells, _ = lstm_extras(x, w_ih, w_hh)
    if y.numel() > 0:
        sums = input_sums(x, w_ih, b_ih, b_hh, 4 * H)
        gates = sums if keep else None  # in the same memory
        io = (sums, gates, cells)
        states = {"start": dense(h0), "final": h_n, "carry": dense(c0), "carry_n": c_n}
        walk(_FORWARD, io, y, w_hh.contiguous(), **states, backward=False, from_end=reverse)
    elif keep:
        gates, _, _ = lstm_extras(x, w_ih, w_hh)
    outputs = (y, h_n, c_n)
    if return_cell_states:
        # what is saved for backward must not be what the caller may write to
        outputs = (*outputs, cells.to(x.dtype, copy=keep))
    return outputs, (x, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr, y, gates, cells, None)


def lstm_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, ...],
    *,
    reverse: bool,
    return_cell_states: bool,
    batch_sizes: Sequence[int] | None = None,
    needs: tuple[bool, ...],
) -> tuple[Maybe, ...]:
    """Backward through time.

    Args:
        saved: what `lstm_fwd` returned: its eight tensors, y, the gates, the cell states, None.
        grads: (dy [T, B, H], dh_n [B, H], dc_n [B, H]), then dc [T, B, H] if c was returned; None
            for zeros.
        reverse, return_cell_states, batch_sizes: as in `lstm_fwd`.
        needs: which of the eight gradients are wanted.

    Returns:
        ``(dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0, None)``, None where not wanted.
    """
    if batch_sizes is not None:
        own = {"return_cell_states": return_cell_states, "reverse": reverse, "needs": needs}
        return ragged_backward(lstm_bwd, saved, grads, batch_sizes, **own)
    x, w_ih, w_hh, _, _, h0, c0, _, y, gates, cells, _ = saved
    dy, dh_n, dc_n, dcells = (*grads, None)[:4]
    T, B, H = y.shape
    da = torch.empty(T, B, 4 * H, dtype=x.dtype, device=x.device)
    dc0 = state_after(dc_n, B, H, x, T)
    if da.numel() > 0:
        io = (gates, cells, *map(dense, (c0, dy, dcells, dh_n)))
        states = {"carry": dense(dc_n), "carry_n": dc0}
        walk(_BACKWARD, io, da, w_hh.contiguous(), **states, backward=True, from_end=not reverse)
    dh = None if T > 0 else dh_n
    found = gradients(x, w_ih, w_hh, h0, y, da, da, dh, needs[:6], reverse=reverse)
    return *found, dc0, None
