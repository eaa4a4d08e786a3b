"""Launches csrc/ops/rnn.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import _recurrent, address
from pykernels.cpp._recurrent import Maybe, Packed

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged"})


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
    batch_sizes: tuple[int, ...] | None,
    keep: bool = True,
    packed: Packed | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    call = _recurrent.describe(x, w_hh, 1, batch_sizes, reverse)
    _, B, _, H, _ = call[2]
    y, h_n = x.new_empty(*x.shape[:-1], H), x.new_empty(B, H)
    _kept, inputs = _recurrent.forward_addresses(x, w_ih, w_hh, b_ih, b_hh, h0, None, packed=packed)
    outputs = (address(y), address(h_n))
    _backends.load_extension().rnn_forward(*call, nonlinearity == "relu", inputs, outputs)
    return (y, h_n), (x, w_ih, w_hh, b_ih, b_hh, h0, y)


def rnn_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe) -> Packed:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("rnn", 1, w_ih, w_hh, b_ih, b_hh, None)


def rnn_step(packed: Packed, weights: tuple[Maybe, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    return _recurrent.step("rnn", packed, *weights)


def rnn_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, Maybe],
    *,
    nonlinearity: str,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    needs: tuple[bool, ...],
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    x, w_ih, w_hh, _, _, h0, y = saved
    call = _recurrent.describe(x, w_hh, 1, batch_sizes, reverse)
    found = _recurrent.gradients(x, w_ih, w_hh, call[2], needs, one_bias=True)
    _kept, inputs = _recurrent.addresses((x, w_ih, w_hh, h0, None, y, *grads))
    outputs = [*map(address, found), 0]
    _backends.load_extension().rnn_backward(*call, nonlinearity == "relu", inputs, outputs)
    _recurrent.share_bias(found, needs)
    return tuple(found)
