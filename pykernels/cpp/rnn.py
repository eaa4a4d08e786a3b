"""Launches csrc/ops/rnn.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import address, contiguous

DTYPES = frozenset(cpp.DTYPES)
FEATURES: frozenset[str] = frozenset()


def rnn_fwd(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    *,
    nonlinearity: str,
    reverse: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """See `pykernels._backends` for the contract."""
    T, B, I = x.shape
    H = w_hh.shape[0]
    y, h_n = x.new_empty(T, B, H), x.new_empty(B, H)
    # The contiguous copies must outlive the call: their addresses alone reach it.
    inputs = [contiguous(t) for t in (x, w_ih, w_hh, b_ih, b_hh, h0)]
    _backends.load_extension().rnn_forward(
        cpp.DTYPES[x.dtype],
        torch.get_num_threads(),
        (T, B, I, H),
        nonlinearity == "relu",
        reverse,
        [address(t) for t in inputs],
        address(y),
        address(h_n),
    )
    return (y, h_n), (x, w_ih, w_hh, h0, y)


def rnn_bwd(
    saved: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, Tensor | None],
    *,
    nonlinearity: str,
    reverse: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """See `pykernels._backends` for the contract."""
    x, w_ih, w_hh, h0, y = saved
    T, B, I = x.shape
    H = w_hh.shape[0]
    need_x, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_h0 = needs
    dx = x.new_empty(T, B, I) if need_x else None
    dw_ih = x.new_empty(H, I) if need_w_ih else None
    dw_hh = x.new_empty(H, H) if need_w_hh else None
    db = x.new_empty(H) if need_b_ih or need_b_hh else None
    dh0 = x.new_empty(B, H) if need_h0 else None
    inputs = [contiguous(t) for t in (x, w_ih, w_hh, h0, y, *grads)]
    _backends.load_extension().rnn_backward(
        cpp.DTYPES[x.dtype],
        torch.get_num_threads(),
        (T, B, I, H),
        nonlinearity == "relu",
        reverse,
        [address(t) for t in inputs],
        [address(t) for t in (dx, dw_ih, dw_hh, db, dh0)],
    )
    return dx, dw_ih, dw_hh, db, db.clone() if need_b_ih and need_b_hh else db, dh0
