"""Launches csrc/ops/gru.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pykernels import _backends, cpp
from pykernels.cpp import _recurrent, address
from pykernels.cpp._recurrent import Maybe, Packed

DTYPES = frozenset(cpp.DTYPES)
FEATURES = frozenset({"ragged"})


def gru_fwd(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Maybe,
    b_hh: Maybe,
    h0: Maybe,
    *,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    keep: bool = True,
    packed: Packed | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Maybe, ...]]:
    """See `pykernels._backends` for the contract."""
    call = _recurrent.describe(x, w_hh, 3, batch_sizes, reverse)
    _, B, _, H, _ = call[2]
    rows = x.shape[:-1]
    y, h_n = x.new_empty(*rows, H), x.new_empty(B, H)
    gates = _recurrent.empty_gates(x, H) if keep else None
    _kept, inputs = _recurrent.forward_addresses(x, w_ih, w_hh, b_ih, b_hh, h0, None, packed=packed)
    outputs = (address(y), address(h_n))
    _backends.load_extension().gru_forward(*call, inputs, outputs, address(gates))
    return (y, h_n), (x, w_ih, w_hh, b_ih, b_hh, h0, y, gates)


def gru_pack(w_ih: Tensor, w_hh: Tensor, b_ih: Maybe, b_hh: Maybe) -> Packed:
    """See `pykernels._backends` for the contract."""
    return _recurrent.pack("gru", 3, w_ih, w_hh, b_ih, b_hh, None)


def gru_step(packed: Packed, weights: tuple[Maybe, ...]) -> Callable[..., Any] | None:
    """See `pykernels._backends` for the contract."""
    return _recurrent.step("gru", packed, *weights)


def gru_bwd(
    saved: tuple[Maybe, ...],
    grads: tuple[Maybe, Maybe],
    *,
    reverse: bool,
    batch_sizes: tuple[int, ...] | None,
    needs: tuple[bool, ...],
) -> tuple[Maybe, ...]:
    """See `pykernels._backends` for the contract."""
    x, w_ih, w_hh, _, _, h0, y, gates = saved
    call = _recurrent.describe(x, w_hh, 3, batch_sizes, reverse)
    found = _recurrent.gradients(x, w_ih, w_hh, call[2], needs, one_bias=False)
    _kept, inputs = _recurrent.addresses((x, w_ih, w_hh, h0, None, y, *grads))
    outputs = [*map(address, found), 0]
    _backends.load_extension().gru_backward(*call, inputs, outputs, address(gates))
    return tuple(found)
